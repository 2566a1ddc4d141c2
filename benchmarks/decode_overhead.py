"""What decoding costs with the edit: time against the plain model's, every variant interleaved in one run.

    python benchmarks/decode_overhead.py [--rounds 15] [--threads 2] [--json] [--out FILE] [--quick]

Variants, all through one function (enter a context, call `model.generate`, leave it):

    plain          the Hugging Face model as it is
    closed         paving, every gate closed                                                         bar 1.02
    open           paving, every gate open: default K, random weights, scale 1, every edit layer      bar 1.10
    late closed    the router reads blocks in the middle, above the first edited one; every gate closed
    late open      the same, every gate open: the last prompt token is run again, one decode step a call
    steering       the steering-vectors library, one vector on each of the same layers
    repeng         the repeng library, the same vectors, on a second copy of the model, whose blocks it wraps
    lora           PEFT, LoRA r=16 on down_proj of the same layers, unmerged, adapters in the model's own dtype
                   (PEFT would otherwise keep them in float32), on a second copy of the model

The ratio charges a variant with everything it adds to a call, over the plain model's decoding alone:

    1 + (call - plain call) / (plain call from its first token to its last)

per round, so that setting up `apply`, routing and editing in the prompt's pass count as decoding cost. Beside it stand
`steps` (first token to last, set-up left out) and `call` (the whole of it). The order rotates from round to round.

Two floors, computed by `floors` from the model's shape, below which no implementation of the variant can go:

    operations   a token's multiplications and additions, base and edit, over the base's
    bytes        what a step must read (every weight once a batch, each row's KV), base and edit, over the base's

A step of a small batch is bound by bytes, a large one by operations; the edit's weights are counted without those of
experts whose window is zero at a layer.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from paired import (
    ModelSize,
    Ratio,
    lively_controller,
    machine,
    machine_line,
    model_size,
    ratio_over_rounds,
    rotated_rounds,
    synchronise,
)
from paving.backbone import EMBEDDED, Backbone, PromptBatch, as_backbone, load_backbone
from paving.backbone.hooks import contiguous_head_input
from paving.controller import AlwaysOpen, Closed, ControllerConfig, ResidualPaving

BARS = {"closed": 1.02, "open": 1.10, "late closed": 1.02}
LORA_RANK, LORA_TARGET = 16, "down_proj"


@dataclass(frozen=True)
class Variant:
    """A model to be generated with, inside a context entered once a call."""

    name: str
    backbone: Backbone
    generate: Callable[..., torch.Tensor]
    context: Callable[[PromptBatch], AbstractContextManager]


@dataclass(frozen=True)
class Call:
    """Seconds of one call: all of it, and from its first new token to its last."""

    whole: float
    steps: float


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="batch sizes (default: 1 16)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens (default: 32)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens a call (default: 32)")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each variant (default: 15)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: what torch has)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON object to FILE")
    parser.add_argument("--quick", action="store_true", help="smoke test: 3 rounds of 4 tokens, batch 1 and 2")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.tokens, args.batch = 3, 4, [1, 2]
    if args.tokens < 2 or args.rounds < 1:
        parser.error("a decode step needs --tokens of at least 2, a ratio --rounds of at least 1")
    missing = missing_comparators()
    if missing:
        print(
            f"not installed: {', '.join(missing)}; no comparator is left out silently. Install them: "
            "pip install 'paving[bench]' && pip install --no-deps steering-vectors repeng "
            "(--no-deps, as one asks for transformers 4 but runs with 5)",
            file=sys.stderr,
        )
        return 2
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    backbone = load_backbone(args.model, dtype=args.dtype)
    controller = lively_controller(backbone).with_scale(1.0)
    controller.weights.eval().requires_grad_(False)
    every_variant = variants(backbone, controller)
    results = []
    for n in args.batch:
        times = measure(every_variant, backbone, n, args)
        context = args.prompt + args.tokens / 2
        costs = floors(model_size(backbone), edit_weights(every_variant, controller), n, context, args.tokens)
        results.append({"batch": n, "variants": summary(times, costs, args.tokens)})
    report = {
        "machine": machine(backbone) | {"dtype": args.dtype},
        "prompt_tokens": args.prompt,
        "new_tokens": args.tokens,
        "rounds": args.rounds,
        "edit_layers": list(controller.config.edit_layers),
        "bars": BARS,
        "results": results,
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def missing_comparators() -> list[str]:
    packages = {"steering_vectors": "steering-vectors", "repeng": "repeng", "peft": "peft"}
    return [package for module, package in packages.items() if find_spec(module) is None]


# --- the variants ---


def variants(backbone: Backbone, controller: ResidualPaving) -> list[Variant]:
    plain = backbone.model.generate
    closed, opened = controller.with_policy(Closed()), controller.with_policy(AlwaysOpen())
    layers = controller.config.edit_layers
    late = reading_late(backbone, layers)
    late_closed, late_open = late.with_policy(Closed()), late.with_policy(AlwaysOpen())
    steered, wrapped, with_lora = steering(backbone, layers), repeng(backbone, layers), lora(backbone, layers)
    return [
        Variant("plain", backbone, plain, lambda batch: nullcontext()),
        Variant("closed", backbone, plain, lambda batch: closed.apply(backbone, batch)),
        Variant("open", backbone, plain, lambda batch: opened.apply(backbone, batch)),
        Variant("late closed", backbone, plain, lambda batch: late_closed.apply(backbone, batch)),
        Variant("late open", backbone, plain, lambda batch: late_open.apply(backbone, batch)),
        Variant("steering", backbone, plain, lambda batch: steered()),
        Variant("repeng", wrapped, wrapped.model.generate, lambda batch: nullcontext()),
        Variant("lora", with_lora, with_lora.model.generate, lambda batch: nullcontext()),
    ]


def reading_late(backbone: Backbone, layers: Sequence[int]) -> ResidualPaving:
    """The same edit behind a router that reads three blocks around the middle."""
    middle = backbone.n_layers // 2
    config = ControllerConfig(route_layers=(middle - 1, middle, middle + 1), edit_layers=tuple(layers))
    controller = lively_controller(backbone, config).with_scale(1.0)
    controller.weights.eval().requires_grad_(False)
    return controller


def directions_of(backbone: Backbone, layers: Sequence[int]) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {la: torch.randn(backbone.d_model, generator=generator) * 0.02 for la in layers}


def repeng(backbone: Backbone, layers: Sequence[int]) -> Backbone:
    """A second copy of the model with its control set: repeng wraps a model's own blocks."""
    if not hasattr(np, "float_"):  # repeng 0.4 names it, and NumPy 2 no longer has it
        np.float_ = np.float64
    from repeng import ControlModel

    model = copy.deepcopy(backbone.model)
    vectors = {layer: v.to(backbone.device, backbone.dtype) for layer, v in directions_of(backbone, layers).items()}
    ControlModel(model, list(layers)).set_raw_control(vectors)
    return Backbone(model=model, tokenizer=backbone.tokenizer, name=backbone.name + " under repeng")


def steering(backbone: Backbone, layers: Sequence[int]) -> Callable[[], AbstractContextManager]:
    from steering_vectors import SteeringVector

    vector = SteeringVector(directions_of(backbone, layers)).to(device=backbone.device, dtype=backbone.dtype)
    return lambda: vector.apply(backbone.model)


def lora(backbone: Backbone, layers: Sequence[int]) -> Backbone:
    """A second copy of the model under an unmerged adapter. B is random too: PEFT's own start, B = 0, edits nothing."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK,
        lora_alpha=LORA_RANK,
        target_modules=[LORA_TARGET],
        layers_to_transform=list(layers),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(copy.deepcopy(backbone.model), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data = weight.to(backbone.dtype) * 0.02
    return as_backbone(adapted, backbone.tokenizer, backbone.name + " under LoRA")


def edit_weights(every_variant: Sequence[Variant], controller: ResidualPaving) -> dict[str, int]:
    """Numbers that each variant adds to a step's weights."""
    d, experts = controller.weights.experts.w_in.shape[-2], controller.weights.experts
    active = int((experts.window > 0).sum())
    with_lora = next(v for v in every_variant if v.name == "lora").backbone.model
    return {
        "plain": 0,
        "closed": 0,
        "open": active * experts.w_in.shape[-1] * (2 * d + 1),
        "late closed": 0,
        "late open": active * experts.w_in.shape[-1] * (2 * d + 1),
        "steering": len(controller.config.edit_layers) * d,
        "repeng": len(controller.config.edit_layers) * d,
        "lora": sum(p.numel() for name, p in with_lora.named_parameters() if "lora_" in name),
    }


# --- the floors ---


@dataclass(frozen=True)
class Floor:
    """The least a decode step of a variant can cost, as a ratio to the plain model's least."""

    operations: float
    bytes: float


def floors(size: ModelSize, added: Mapping[str, int], n_rows: int, context: float, tokens: int = 1) -> dict[str, Floor]:
    """added: weights that a variant adds; context: columns that a token sees, on average over the call of `tokens`."""
    operations = n_rows * (2 * size.linear + size.attention_operations(context))
    read = size.linear * size.item_bytes + n_rows * context * size.kv_bytes
    found = {
        name: Floor(1 + n_rows * 2 * weights / operations, 1 + weights * size.item_bytes / read)
        for name, weights in added.items()
    }
    if "late open" in found and tokens > 1:  # one step more a call, charged to the steps between its tokens
        once = found["late open"]
        found["late open"] = Floor(*(ratio * tokens / (tokens - 1) for ratio in (once.operations, once.bytes)))
    return found


# --- the measurement ---


def measure(every_variant: Sequence[Variant], backbone: Backbone, n: int, args: argparse.Namespace) -> dict[str, list[Call]]:
    """The calls of each variant, round by round, after one of each that is not counted."""
    batch = random_prompts(backbone, n, args.prompt)
    by_name = {v.name: v for v in every_variant}
    for variant in every_variant:
        timed_call(variant, batch, 2)
    times: dict[str, list[Call]] = {v.name: [] for v in every_variant}
    for i, order in enumerate(rotated_rounds(list(by_name), args.rounds), 1):
        for name in order:
            times[name].append(timed_call(by_name[name], batch, args.tokens))
        print(f"batch {n}: round {i}/{args.rounds}", file=sys.stderr)
    return times


def random_prompts(backbone: Backbone, n: int, length: int) -> PromptBatch:
    """Prompts of exactly this many tokens, none of them special: what they say does not matter to the time."""
    special = set(backbone.tokenizer.all_special_ids)
    ordinary = torch.tensor([i for i in range(len(backbone.tokenizer)) if i not in special])
    generator = torch.Generator().manual_seed(n)
    ids = ordinary[torch.randint(len(ordinary), (n, length), generator=generator)].to(backbone.device)
    return PromptBatch(ids, torch.ones_like(ids), tuple(str(i) for i in range(n)), (None,) * n)


def timed_call(variant: Variant, batch: PromptBatch, tokens: int) -> Call:
    backbone = variant.backbone
    clock = _Clock(backbone.device)
    decoding = GenerationConfig(
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=backbone.pad_id,
        eos_token_id=list(backbone.eos_ids),
    )
    synchronise(backbone.device)
    start = time.perf_counter()
    with torch.no_grad(), contiguous_head_input(backbone), variant.context(batch):
        sequences = variant.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            generation_config=decoding,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    synchronise(backbone.device)
    whole = time.perf_counter() - start
    if sequences.shape[1] != batch.width + tokens:
        raise RuntimeError(f"{variant.name} made {sequences.shape[1] - batch.width} tokens instead of {tokens}.")
    return Call(whole, clock.last - clock.first)


class _Clock(StoppingCriteria):
    """Never stops; notes when the first and the latest token were there."""

    def __init__(self, device: torch.device):
        self.device, self.first, self.last = device, 0.0, 0.0

    def __call__(self, input_ids, scores, **kwargs):
        synchronise(self.device)
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def summary(times: Mapping[str, Sequence[Call]], costs: Mapping[str, Floor], tokens: int) -> dict[str, dict]:
    plain = times["plain"]
    decoding = [p.steps for p in plain]
    return {
        name: {
            "ratio": asdict(charged(calls, plain)),
            "steps": asdict(ratio_over_rounds([c.steps for c in calls], decoding)),
            "call": asdict(ratio_over_rounds([c.whole for c in calls], [p.whole for p in plain])),
            "ms_per_token": 1000 * statistics.median(c.steps for c in calls) / (tokens - 1),
            "floor": asdict(costs[name]),
            "bar": BARS.get(name),
        }
        for name, calls in times.items()
    }


def charged(calls: Sequence[Call], plain: Sequence[Call]) -> Ratio:
    """1 + (call - plain call) / plain decoding, per round: see the top of this file."""
    charged_to_decoding = [p.steps + c.whole - p.whole for c, p in zip(calls, plain, strict=True)]
    return ratio_over_rounds(charged_to_decoding, [p.steps for p in plain])


# --- the table ---


def as_text(report: Mapping) -> str:
    lines = [
        machine_line(report["machine"]),
        f"{report['prompt_tokens']} prompt tokens, {report['new_tokens']} new tokens, {report['rounds']} rounds, "
        f"edit layers {report['edit_layers'][0]}..{report['edit_layers'][-1]}; floors: operations / bytes",
        "",
        f"{'batch':>5}  {'variant':<11} {'ratio [min, max]':<21} {'bar':<12} {'steps':>6} {'call':>6} "
        f"{'ms/token':>9}  {'floors':<13}",
    ]
    for result in report["results"]:
        for name, row in result["variants"].items():
            ratio, bar, floor = row["ratio"], row["bar"], row["floor"]
            verdict = "" if bar is None else f"{bar:.2f} {'met' if ratio['median'] <= bar else 'missed'}"
            spread = f"{ratio['median']:.3f} [{ratio['least']:.3f}, {ratio['greatest']:.3f}]"
            lines.append(
                f"{result['batch']:>5}  {name:<11} {spread:<21} {verdict:<12} {row['steps']['median']:>6.3f} "
                f"{row['call']['median']:>6.3f} {row['ms_per_token']:>9.2f}  "
                f"{floor['operations']:.3f} / {floor['bytes']:.3f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
