"""What the cached prompt saves: one training step on the prompt's KV against the same step on the whole prompt.

    python benchmarks/train_step.py [--rounds 5] [--threads 2] [--json] [--out FILE] [--quick]

Both steps are the project's own: `step_batch` (its traces read from disk), `step_losses` with every term, backward, and
Adam. Adam's learning rate is 0, so that it does its work and every step of the run sees the same weights. They differ
in one thing:

    cached   the KV of all prompt columns but the last comes from the trace store; `horizon` positions a row are run
    whole    no cache: prompt and continuation are run, and the edit is held to the same `horizon` last columns

The order alternates from round to round; speed-up = whole / cached, paired by round. Bars: 2x at 32 prompt tokens, 8x at
256, 25x at 1024. The losses must agree to 1e-3: that is checked in float32 (one step each, the same rows; gradients are
compared too), and the difference in the timed dtype is shown beside it, where rounding is part of it.

Two floors, computed by `floors` from the model's shape, of what either step needs at least:

    operations   a multiply and an add for each weight and position, forward and (from the first edited layer up) back
                 through the frozen weights, attention, experts three times (their own gradient too)
    bytes        the frozen weights once each way, and the cached KV: stored, joined, and attended to each way

Their quotient between whole and cached is the largest speed-up that a step bound by operations can show. What autograd
keeps between forward and backward is not in the floor: it depends on the implementation.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from paired import (
    ModelSize,
    lively_controller,
    machine,
    machine_line,
    model_size,
    ratio_over_rounds,
    rotated_rounds,
    synchronise,
)
from paving.backbone import EMBEDDED, Backbone, load_backbone
from paving.controller import ResidualPaving
from paving.controller.weights import Edit, Experts, Router
from paving.prompts.types import Bucket
from paving.traces.base import BaseTraces, Forced, forced_batch
from paving.traces.store import TraceStore
from paving.traces.targets import EditTarget
from paving.training.config import TrainingConfig
from paving.training.data import TrainingRows, boundary_of, step_batch
from paving.training.stages import set_residual_sizes, standardise, step_losses

SPEED_BARS = {32: 2.0, 256: 8.0, 1024: 25.0}
LOSS_BAR = 1e-3


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="dtype of the timed steps")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SPEED_BARS), help="prompt tokens")
    parser.add_argument("--rows", type=int, nargs=3, default=[4, 2, 2], metavar=("EDIT", "BENIGN", "HARMFUL"))
    parser.add_argument("--horizon", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: what torch has)")
    parser.add_argument("--no-equality", action="store_true", help="leave the float32 comparison out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON object to FILE")
    parser.add_argument("--quick", action="store_true", help="smoke test: 1 round, rows 1 1 1, lengths 32 and 64")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.rows, args.lengths = 1, [1, 1, 1], [32, 64]
    if args.rounds < 1 or min(args.rows) < 1 or min(args.lengths) < 2:
        parser.error("--rounds and every count of --rows must be at least 1, every length at least 2")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    backbone = load_backbone(args.model, dtype=args.dtype)
    longest = backbone.context_length - args.horizon
    if max(args.lengths) > longest:
        parser.error(f"{backbone.name} takes prompts of at most {longest} tokens at horizon {args.horizon}")
    facts = machine(backbone) | {"dtype": args.dtype}
    results = [timed(backbone, length, args) for length in args.lengths]
    if not args.no_equality:
        del backbone  # two copies are not needed at once
        backbone = load_backbone(args.model, dtype="float32")
        for length, result in zip(args.lengths, results, strict=True):
            result["float32"] = compared(backbone, length, args)
    report = {
        "machine": facts,
        "rows": dict(zip(("edit", "benign_keep", "harmful_keep"), args.rows, strict=True)),
        "horizon": args.horizon,
        "rounds": args.rounds,
        "loss_bar": LOSS_BAR,
        "results": results,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


# --- the two steps ---


@dataclass(frozen=True)
class Way:
    """How a step reads its prompts: the traces to collate from, and the controller whose edits fit the columns run."""

    traces: BaseTraces
    controller: ResidualPaving


class WholePrompts(BaseTraces):
    """Traces without the prompt KV: `step_batch` then makes a batch that runs the whole prompt."""

    def prefix(self, rows):
        return forced_batch(self.backbone, rows), None


@dataclass(frozen=True)
class LastColumns:
    """The experts, held to the last `n_columns` columns: in a pass over the whole prompt those are its last token and
    the continuation, which is all that a pass on the cache covers."""

    experts: Experts
    n_columns: int

    def edits(self, strength: Tensor, dtype: torch.dtype) -> dict[int, Edit]:
        return {la: self._held(edit) for la, edit in self.experts.edits(strength, dtype).items()}

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    def _held(self, edit: Edit) -> Edit:
        n = self.n_columns
        return lambda resid: torch.cat([resid[:, :-n], edit(resid[:, -n:])], dim=1)


@dataclass(frozen=True)
class HeldWeights:
    """What `step_losses` asks of a controller's weights."""

    router: Router
    experts: LastColumns


@dataclass(frozen=True)
class Bench:
    """One prompt length, ready to step: both ways share every weight and every trace but the KV."""

    backbone: Backbone
    ways: dict[str, Way]
    rows: TrainingRows
    harmful_z: Tensor
    config: TrainingConfig
    optimiser: torch.optim.Optimizer

    @property
    def parameters(self) -> list[Tensor]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]


def bench(backbone: Backbone, length: int, args: argparse.Namespace, folder: Path) -> Bench:
    rows = random_rows(backbone, length, args.rows, args.horizon)
    store = TraceStore(folder)
    cached = BaseTraces(backbone, store)
    print(f"{length} prompt tokens: tracing the base ({backbone.dtype})", file=sys.stderr)
    cached.build([*rows.edit, *rows.teacher.values()], with_resid=True)
    cached.build([*rows.benign_keep, *rows.harmful_keep])
    controller = lively_controller(backbone)
    controller.weights.train().requires_grad_(True)
    weights = controller.weights
    boundary = boundary_of(cached, rows.all(), controller.config, backbone.device)
    standardise(weights.router, boundary.z)
    set_residual_sizes(weights.experts, cached, rows)
    held = HeldWeights(weights.router, LastColumns(weights.experts, args.horizon))
    parameters = [*weights.router.parameters(), *weights.experts.parameters()]
    return Bench(
        backbone=backbone,
        ways={
            "cached": Way(cached, controller),
            "whole": Way(WholePrompts(backbone, store), replace(controller, weights=held)),
        },
        rows=rows,
        harmful_z=boundary.harmful,
        config=TrainingConfig(horizon=args.horizon, rows_per_step=tuple(args.rows)),
        optimiser=torch.optim.Adam(parameters, lr=0.0),
    )


def random_rows(backbone: Backbone, length: int, counts: Sequence[int], horizon: int) -> TrainingRows:
    """Rows of exactly `length` prompt tokens and `horizon` forced ones, drawn from the ordinary vocabulary."""
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(backbone.tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(length)

    def drawn(n: int) -> tuple[int, ...]:
        return tuple(ordinary[torch.randint(len(ordinary), (n,), generator=generator)].tolist())

    by_bucket = {
        bucket: tuple(Forced(f"{bucket.value}-{i}", bucket, drawn(length), drawn(horizon)) for i in range(count))
        for bucket, count in zip((Bucket.EDIT, Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP), counts, strict=True)
    }
    teacher = {r.id: Forced(f"{r.id}-teacher", Bucket.EDIT, drawn(length), r.continuation) for r in by_bucket[Bucket.EDIT]}
    targets = {
        r.id: EditTarget(r.continuation, r.continuation[:2], teacher[r.id].prompt_ids, "own") for r in by_bucket[Bucket.EDIT]
    }
    return TrainingRows(
        edit=by_bucket[Bucket.EDIT],
        benign_keep=by_bucket[Bucket.BENIGN_KEEP],
        harmful_keep=by_bucket[Bucket.HARMFUL_KEEP],
        targets=targets,
        teacher=teacher,
        p_edit={},
    )


@dataclass(frozen=True)
class Step:
    seconds: float
    loss: float


def step(bench: Bench, way: Way) -> Step:
    """One whole training step; its gradients stay on the weights."""
    synchronise(bench.backbone.device)
    start = time.perf_counter()
    chosen, shape = bench.rows.all(), way.controller.config
    batch = step_batch(bench.backbone, way.traces, bench.rows, chosen, bench.config.horizon, shape)
    terms = step_losses(bench.backbone, way.controller, batch, bench.harmful_z, bench.config, anchor=False)
    total = torch.stack(list(terms.values())).sum()
    bench.optimiser.zero_grad(set_to_none=True)
    total.backward()
    bench.optimiser.step()
    synchronise(bench.backbone.device)
    return Step(time.perf_counter() - start, total.item())


def timed(backbone: Backbone, length: int, args: argparse.Namespace) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="paving-bench-") as folder:
        ready = bench(backbone, length, args, Path(folder))
        step(ready, ready.ways["cached"])  # not counted; the whole way needs no warm-up that this does not give
        steps: dict[str, list[Step]] = {name: [] for name in ready.ways}
        for i, order in enumerate(rotated_rounds(list(ready.ways), args.rounds), 1):
            for name in order:
                steps[name].append(step(ready, ready.ways[name]))
            print(f"{length} prompt tokens: round {i}/{args.rounds}", file=sys.stderr)
        costs = floors(model_size(backbone), experts_size(ready), length, args.horizon, sum(args.rows))
    seconds = {name: [s.seconds for s in done] for name, done in steps.items()}
    return {
        "prompt_tokens": length,
        "bar": SPEED_BARS.get(length),
        "speed_up": asdict(ratio_over_rounds(seconds["whole"], seconds["cached"])),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "floors": {name: asdict(cost) for name, cost in costs.items()},
        "floor_speed_up": costs["whole"].operations / costs["cached"].operations,
        "loss": difference(steps["cached"][0].loss, steps["whole"][0].loss),
    }


def compared(backbone: Backbone, length: int, args: argparse.Namespace) -> dict[str, float]:
    """Loss and gradients of one step each way, in float32."""
    with tempfile.TemporaryDirectory(prefix="paving-bench-") as folder:
        ready = bench(backbone, length, args, Path(folder))
        loss, gradient = {}, {}
        for name, way in ready.ways.items():
            loss[name] = step(ready, way).loss
            gradient[name] = torch.cat([p.grad.flatten() for p in ready.parameters if p.grad is not None])
    apart = (gradient["cached"] - gradient["whole"]).norm() / gradient["whole"].norm()
    return difference(loss["cached"], loss["whole"]) | {"gradient_relative": apart.item()}


def difference(cached: float, whole: float) -> dict[str, float]:
    return {
        "cached": cached,
        "whole": whole,
        "absolute": abs(cached - whole),
        "relative": abs(cached - whole) / abs(whole) if whole else float("nan"),
    }


# --- the floors ---


@dataclass(frozen=True)
class ExpertsSize:
    """weights: of the expert matrices in use; first_layer: the lowest edited one, below which nothing needs a gradient."""

    weights: int
    first_layer: int


@dataclass(frozen=True)
class Floor:
    operations: float
    bytes: float


def experts_size(bench: Bench) -> ExpertsSize:
    experts = bench.ways["cached"].controller.weights.experts
    width, d = experts.w_out.shape[-2:]
    return ExpertsSize(int((experts.window > 0).sum()) * 2 * width * d, min(experts.layers))


def floors(size: ModelSize, experts: ExpertsSize, length: int, horizon: int, n_rows: int) -> dict[str, Floor]:
    """What each way must compute and read at least, a step of n_rows rows."""
    back = (size.n_layers - 1 - experts.first_layer) / size.n_layers  # share of the blocks that a gradient passes
    blocks = size.linear - size.head
    # Positions of the continuation see the prompt; in the whole way the prompt's own positions see half of it each.
    seen = horizon * (length - 1) + horizon * (horizon + 1) / 2
    seen_by_prompt = (length - 1) * length / 2
    always = n_rows * horizon * (2 * 2 * size.head + 3 * 2 * experts.weights)

    def operations(positions: int, columns: float) -> float:
        # Attention costs twice its forward to go back through: scores and values both have two factors.
        attention = size.attention_operations(columns) * (1 + 2 * back)
        return always + n_rows * (2 * blocks * positions * (1 + back) + attention)

    weights = size.item_bytes * (blocks * (1 + back) + 2 * size.head)
    kv = n_rows * (length - 1) * size.kv_bytes
    return {
        "cached": Floor(operations(horizon, seen), weights + kv * (2 + 1 + back)),
        "whole": Floor(operations(length - 1 + horizon, seen + seen_by_prompt), weights),
    }


# --- the table ---


def as_text(report: dict) -> str:
    rows = report["rows"]
    lines = [
        machine_line(report["machine"]),
        f"rows {' + '.join(f'{n} {bucket}' for bucket, n in rows.items())}, horizon {report['horizon']}, "
        f"{report['rounds']} rounds, peak {report['peak_gib']:.1f} GiB",
        "",
        f"{'prompt':>6}  {'speed-up [min, max]':<22} {'bar':<12} {'by operations':>13}  {'cached':>8} {'whole':>8}  "
        f"{'Gop/s':>13}  {'loss apart, abs / rel'}",
    ]
    for r in report["results"]:
        up, bar = r["speed_up"], r["bar"]
        verdict = "" if bar is None else f"{bar:.0f}x {'met' if up['median'] >= bar else 'missed'}"
        spread = f"{up['median']:.2f} [{up['least']:.2f}, {up['greatest']:.2f}]"
        rates = " / ".join(f"{r['floors'][w]['operations'] / r['seconds'][w] / 1e9:.0f}" for w in ("cached", "whole"))
        lines.append(
            f"{r['prompt_tokens']:>6}  {spread:<22} {verdict:<12} {r['floor_speed_up']:>12.1f}x  "
            f"{r['seconds']['cached']:>7.2f}s {r['seconds']['whole']:>7.2f}s  {rates:>13}  "
            f"{r['loss']['absolute']:.1e} / {r['loss']['relative']:.1e} ({report['machine']['dtype']})"
        )
        if "float32" in r:
            same = r["float32"]
            met = max(same["absolute"], same["relative"]) <= report["loss_bar"]
            lines.append(
                f"{'':>6}  float32: loss {same['whole']:.6f}, apart {same['absolute']:.1e} / {same['relative']:.1e} "
                f"(bar {report['loss_bar']:.0e} {'met' if met else 'missed'}); gradients {same['gradient_relative']:.1e}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
