"""What both timing scripts share: paired ratios over interleaved rounds, a model's size, a line about the machine."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import nn

from paving.backbone import Backbone
from paving.backbone.layers import text_config
from paving.controller import ControllerConfig, ResidualPaving, fresh_controller


@dataclass(frozen=True)
class Ratio:
    """Median, least and greatest of per-round ratios; n rounds."""

    median: float
    least: float
    greatest: float
    n: int


def ratio_over_rounds(times: Sequence[float], reference: Sequence[float]) -> Ratio:
    """times[r] / reference[r], summarised. Paired by round, so that a machine that is slower in one round than in
    another slows both sides of a quotient. raises ValueError for lists of unequal length or without a round."""
    if not times or len(times) != len(reference):
        raise ValueError(f"paired ratios need the same rounds on both sides; got {len(times)} and {len(reference)}.")
    ratios = [t / r for t, r in zip(times, reference, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios), len(ratios))


def rotated_rounds(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Every name once a round; each round begins one further on, so that none is always first, or always after the
    same one's cache."""
    for r in range(rounds):
        start = r % len(names)
        yield [*names[start:], *names[:start]]


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a decoder-only model that its cost follows from.

    linear       weights of all matrices that a token is multiplied with, head included, embedding look-up not
    head         those of the head alone
    item_bytes   bytes of one weight and of one cached key or value number
    """

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    linear: int
    head: int
    item_bytes: int

    def attention_operations(self, context: float) -> float:
        """Scores and weighted sum of one token that sees `context` columns, all layers: a multiply and an add each."""
        return 4 * self.n_layers * self.n_heads * self.head_dim * context

    @property
    def kv_bytes(self) -> int:
        """Cached keys and values of one column, all layers."""
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * self.item_bytes


def model_size(backbone: Backbone) -> ModelSize:
    config = text_config(backbone.model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        n_layers=backbone.n_layers,
        d_model=backbone.d_model,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        # A head tied to the embedding is an nn.Linear like any other, and the embedding itself is none.
        linear=sum(m.weight.numel() for m in backbone.model.modules() if isinstance(m, nn.Linear)),
        head=backbone.model.get_output_embeddings().weight.numel(),
        item_bytes=next(backbone.model.parameters()).element_size(),
    )


def machine(backbone: Backbone) -> dict[str, object]:
    return {
        "model": backbone.name,
        "device": str(backbone.device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine_line(facts: Mapping[str, object]) -> str:
    return ", ".join(f"{k} {v}" for k, v in facts.items())


def synchronise(device: torch.device) -> None:
    """Wait for an accelerator; a CPU has nothing to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def lively_controller(backbone: Backbone, config: ControllerConfig | None = None) -> ResidualPaving:
    """The default shape with weights that edit: small enough for fluent states. At its start of zero, W_out would edit
    nothing and give the other expert weights no gradient."""
    controller = fresh_controller(backbone, config or ControllerConfig(), seed=0)
    experts = controller.weights.experts
    with torch.no_grad():
        drawn = torch.randn(experts.w_out.shape, generator=torch.Generator().manual_seed(0)) * 0.02
        experts.w_out.copy_(drawn.to(experts.w_out.device))
    return controller
