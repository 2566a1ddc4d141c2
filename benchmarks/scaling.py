"""Memory, storage and device hours of every stage for models and prompt sets that do not fit here: counted, not run.

    python benchmarks/scaling.py [--prompts 1000000] [--tokens 128] [--flops 4e14] [--bandwidth 2e12] [--json]

What a prompt leaves on disk and what experts hold follow from the model's shape; tests hold both formulas against what this
project really writes and builds, on models of two shapes. Times are the larger of two floors, operations at --flops a second
and bytes at --bandwidth, sustained, of one device: what a stage needs at least. Nothing here was measured on such a device.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from paving.controller.config import ControllerConfig
from paving.training.config import TrainingConfig

BF16, FP32 = 2, 4
TEACHER = 64  # tokens of a teacher's instruction around a prompt
ADAM = 4 * FP32  # a parameter, its gradient and two moments


@dataclass(frozen=True)
class Shape:
    """A decoder. kv: width of all key heads together."""

    name: str
    layers: int
    d_model: int
    d_ff: int
    kv: int
    vocab: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Of attention (q, k, v, o), a gated FFN, and the embeddings; norms are left out."""
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.kv
        embeddings = self.vocab * self.d_model * (1 if self.tied else 2)
        return self.layers * (attention + 3 * self.d_model * self.d_ff) + embeddings


SHAPES = (
    Shape("7B", 32, 4096, 11008, 4096, 32_000),
    Shape("70B", 80, 8192, 28672, 1024, 128_256),
    Shape("405B", 126, 16384, 53248, 1024, 128_256),
)


def trace_bytes(shape: Shape, steps: int, k: int) -> int:
    """Of one prompt: boundary states at and over it for every layer, the base's top k along `steps` tokens."""
    return 2 * shape.layers * shape.d_model * BF16 + steps * k * (FP32 + 4)


def resid_bytes(shape: Shape, steps: int) -> int:
    """Of an edit prompt on top: the base's states along its target."""
    return shape.layers * steps * shape.d_model * BF16


def prefix_bytes(shape: Shape, tokens: int) -> int:
    """KV of all prompt tokens but the last; may be thrown away and built again."""
    return 2 * shape.layers * shape.kv * (tokens - 1) * BF16


def expert_parameters(shape: Shape, config: ControllerConfig) -> int:
    """All experts at every edited layer, those outside their window included: they are stored."""
    edited = len(config.edit_layers) if config.edit_layers is not None else shape.layers - max(config.route_layers) - 1
    width = shape.d_model // config.bottleneck_ratio
    return edited * config.n_experts * (2 * shape.d_model * width + width + 1)


def delta_bytes(shape: Shape, fraction: float) -> int:
    """Δθ and the base's own slices of κ channels of every layer but the first, in bfloat16."""
    return 2 * (shape.layers - 1) * round(fraction * shape.d_ff) * shape.d_model * BF16


@dataclass(frozen=True)
class Stage:
    """hours: of one device, at the larger of its floors. device_bytes: what has to lie on devices at a time."""

    name: str
    hours: float
    device_bytes: float
    disk_bytes: float


def stages(shape: Shape, n: int, tokens: int, flops: float, bandwidth: float) -> list[Stage]:
    """n prompts, half of them edit prompts, `tokens` long, with the paper's training (table 5). An edit prompt is traced
    twice, once more with the teacher's words around it (TEACHER)."""
    training, controller = TrainingConfig(), ControllerConfig()
    h, batch, weights = training.horizon, 8, shape.parameters * BF16
    experts = expert_parameters(shape, controller)

    def hours(operations: float, moved: float) -> float:
        return max(operations / flops, moved / bandwidth) / 3600

    def passes(tokens_run: float, calls: float, through: float = 2.0) -> float:
        """through: operations a weight and token; a call reads the weights once."""
        return hours(through * shape.parameters * tokens_run, calls * weights)

    traced = 1.5 * n * trace_bytes(shape, h, training.top_k) + n * resid_bytes(shape, h)
    prefixes = n * prefix_bytes(shape, tokens) + n / 2 * prefix_bytes(shape, tokens + TEACHER)
    one_epoch = (n / 2) / training.rows_per_step[0]
    first, second, third = training.stage_epochs
    steps = (training.contrastive_epochs + first + second + third) * one_epoch
    run = (first * training.short_horizon + (training.contrastive_epochs + second + third) * h) * one_epoch
    rows = sum(training.rows_per_step)
    # Forward and back through the frozen weights for the horizon's tokens; the experts' own three products beside it.
    trained = rows * run * (4.0 * shape.parameters + 6.0 * experts)
    read = steps * (2 * weights + rows * prefix_bytes(shape, tokens))
    alpha = [n * 50, n * 50 / 64]  # answers of 50 tokens, 64 at a time
    return [
        Stage("base answers (64 at a time)", passes(n * tokens + alpha[0], n * tokens / 4096 + alpha[1]), weights, 0),
        Stage("traces", passes(n * (tokens + h) + n / 2 * (tokens + TEACHER + h), 1.5 * n / batch), weights, traced),
        Stage("prompt KV, kept", 0.0, 0.0, prefixes),
        Stage("training, KV kept", hours(trained, read), weights + experts * ADAM, 0),
        Stage("training, KV built again", hours(trained + steps * rows * tokens * 2.0 * shape.parameters, read),
              weights + experts * ADAM, 0),
        Stage("attribution of channels, m = 3, 200 pairs", passes(200 * 2 * tokens * 3, 200 * 3, 4.0), 2 * weights, 0),
        Stage("θ+ on slices of 6 %, one epoch", passes(n * (tokens + 16), n / batch, 4.0),
              weights + delta_bytes(shape, 0.06) / 2 / BF16 * ADAM, delta_bytes(shape, 0.06)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--flops", type=float, default=4e14, help="a second, sustained")
    parser.add_argument("--bandwidth", type=float, default=2e12, help="bytes a second, sustained")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = {s.name: stages(s, args.prompts, args.tokens, args.flops, args.bandwidth) for s in SHAPES}
    if args.json:
        print(json.dumps({name: [asdict(stage) for stage in each] for name, each in found.items()}, indent=1))
        return
    print("| stage | " + " | ".join(f"{s.name}: hours, on devices, on disk" for s in SHAPES) + " |")
    print("| --- |" + " --- |" * len(SHAPES))
    for row in zip(*found.values(), strict=True):
        print(f"| {row[0].name} | " + " | ".join(map(shown, row)) + " |")
    config = ControllerConfig()
    experts = " | ".join(f"{expert_parameters(s, config) / 1e9:.2g} B parameters" for s in SHAPES)
    print(f"| experts (K = {config.n_experts}, d / {config.bottleneck_ratio}) | {experts} |")


def shown(stage: Stage) -> str:
    hours = "–" if not stage.hours else "< 0.1 h" if stage.hours < 0.05 else f"{stage.hours:,.1f} h"
    return f"{hours}, {size(stage.device_bytes)}, {size(stage.disk_bytes)}"


def size(n: float) -> str:
    if not n:
        return "–"
    unit = next(u for u in ("GB", "TB") if n < 1e12 or u == "TB")
    return f"{n / {'GB': 1e9, 'TB': 1e12}[unit]:,.3g} {unit}"


if __name__ == "__main__":
    main()
