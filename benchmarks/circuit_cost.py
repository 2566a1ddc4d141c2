"""What finding and training a circuit costs: attribution over pairs, and a step on slices against a masked full step.

    python benchmarks/circuit_cost.py [--pairs 25 50 200] [--rounds 5] [--json] [--out FILE] [--quick]

Attribution (component level, EAP-IG, m steps): seconds a pair and peak memory, each in a process of its own, over the
number of pairs (flat is wanted), and over depth and width on random models. Floors, from the model's shape:

    operations   a pair needs 2 passes forward and m forward and back: (2 + 3·m) x 2 x weights x tokens (back costs about 2
                 forward, of which the frozen weights' own gradients are not needed: 1)
    bytes        the weights once a pass and batch

Training step (batch 8, κ = 15 % of the neurons): slices alone, against a step that has the FFN output weights as
parameters (`masked`), and one that has all weights (`whole`, full fine-tuning), both with the gradients outside the circuit
set to zero, which is how the method reads when it is written down first. All learn the same openings, padded or packed
alike; the order alternates. `beyond` is the peak of resident memory beyond the loaded model over two steps and what they
keep (parameters, gradients, Adam's two moments, activations), each way in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from paired import machine, machine_line, model_size, ratio_over_rounds, rotated_rounds
from paving.backbone import EMBEDDED, Backbone, as_backbone, load_backbone, render_ids
from paving.backbone.projections import ffn_outputs
from paving.circuit.arithmetic import changed
from paving.circuit.attribution import AttributionConfig, attribute
from paving.circuit.mask import Mask, choose
from paving.circuit.objective import objective, references
from paving.circuit.pairs import Pair
from paving.prompts import Bucket, starter_prompts
from paving.training.opening_examples import Example, opening_examples
from paving.training.openings import openings
from paving.training.packing import answer_cross_entropy

MIB = 1024**2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--pairs", type=int, nargs="+", default=[25, 50, 200])
    parser.add_argument("--shapes", nargs="+", default=["6x256", "12x256", "24x256", "6x512", "6x1024"], help="LAYERSxWIDTH")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 pairs, one shape, one round")
    parser.add_argument("--worker", nargs=2, metavar=("MODEL", "PAIRS"), help=argparse.SUPPRESS)
    parser.add_argument("--step-worker", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.pairs, args.shapes, args.rounds = [2], ["2x64"], 1
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.worker is not None:
        print(json.dumps(attribution(args.worker[0], int(args.worker[1]))))
        return 0
    if args.step_worker is not None:
        print(json.dumps(step_memory(args.model, args.step_worker)))
        return 0
    backbone = load_backbone(args.model)
    report = {
        "machine": machine(backbone),
        "over_pairs": [in_own_process(args, "--worker", args.model, str(n)) for n in args.pairs],
        "over_shapes": [in_own_process(args, "--worker", shape, str(args.pairs[0])) for shape in args.shapes],
        "step": steps(backbone, args.rounds),
        "step_memory": {w: in_own_process(args, "--model", args.model, "--step-worker", w) for w in WAYS},
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


# --- attribution ---


def in_own_process(args: argparse.Namespace, *asked: str) -> dict:
    """Peak memory is a property of a process; this one has others' peaks behind it."""
    print(" ".join(asked), file=sys.stderr)
    threads = ["--threads", str(args.threads)] if args.threads is not None else []
    command = [sys.executable, __file__, *threads, *asked]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def attribution(model: str, n_pairs: int) -> dict:
    backbone = shaped(model) if model[0].isdigit() else load_backbone(model)
    weights = out_of_the_file(backbone)
    pairs, config = starter_pairs(n_pairs), AttributionConfig()
    j = objective(references(backbone, pairs[:8], openings()))
    start = time.perf_counter()
    with watched_memory() as beyond:
        attribute(backbone, pairs, j, config)
    seconds = time.perf_counter() - start
    tokens = sum(max(len(render_ids(backbone, p.harmful)), len(render_ids(backbone, p.benign))) for p in pairs)
    return {
        "model": model,
        "pairs": n_pairs,
        "seconds": seconds,
        "model_mib": weights / MIB,
        "beyond_model_mib": max(beyond) / MIB,
        "peak_over_model": (weights + max(beyond)) / weights,
        "operations": (2 + 3 * config.steps) * 2 * model_size(backbone).linear * tokens,
    }


def out_of_the_file(backbone: Backbone) -> int:
    """Bytes of the weights, which are then in memory: pages of a mapped file would count as they are read."""
    for p in backbone.model.parameters():
        p.data = p.data.clone()
    return sum(p.numel() * p.element_size() for p in backbone.model.parameters())


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Resident bytes beyond those at the start, looked at every few milliseconds. The process's own peak would be that
    of loading the model."""
    start, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(resident() - start)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield seen
    finally:
        done.set()
        watcher.join()


def resident() -> int:
    """Linux only, as is the unit."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def shaped(shape: str) -> Backbone:
    """A random Llama of LAYERSxWIDTH with the embedded model's tokenizer, in bfloat16."""
    layers, width = map(int, shape.split("x"))
    tokenizer = load_backbone(EMBEDDED).tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, tie_word_embeddings=True,
    )  # fmt: skip
    return as_backbone(AutoModelForCausalLM.from_config(config).to(torch.bfloat16), tokenizer, shape)


def starter_pairs(n: int) -> list[Pair]:
    """The same 20 pairs, among them the longest, repeated as often as needed: memory follows the longest of them, and
    more pairs must not mean longer ones."""
    harmful = [p.text for p in starter_prompts() if p.bucket == Bucket.HARMFUL_KEEP]
    benign = [p.text for p in starter_prompts() if p.bucket == Bucket.BENIGN_KEEP]
    pool = sorted(zip(harmful, benign, strict=False), key=lambda pair: -max(map(len, pair)))
    pool = [*pool[:4], *pool[4 :: max(1, len(pool) // 16)]][:20]
    return [Pair(str(i), *pool[i % len(pool)]) for i in range(n)]


# --- the training step ---


def steps(backbone: Backbone, rounds: int) -> dict:
    mask, rows = some_circuit(backbone), some_rows(backbone)
    result = {}
    for packing in (False, True):
        ways = {name: make(backbone, mask, rows, packing) for name, make in WAYS.items()}
        for step in ways.values():
            step()
        times: dict[str, list[float]] = {name: [] for name in ways}
        for order in rotated_rounds(list(ways), rounds):
            for name in order:
                start = time.perf_counter()
                ways[name]()
                times[name].append(time.perf_counter() - start)
        result["packed" if packing else "padded"] = {
            **{
                f"slices_over_{name}": asdict(ratio_over_rounds(times["slices"], times[name]))
                for name in ("masked", "whole")
            },
            "seconds": times,
        }
        backbone.model.requires_grad_(False)
    result["packed_over_padded"] = asdict(
        ratio_over_rounds(result["packed"]["seconds"]["slices"], result["padded"]["seconds"]["slices"])
    )
    return result


def step_memory(model: str, way: str) -> dict:
    backbone = load_backbone(model)
    weights = out_of_the_file(backbone)
    mask, rows = some_circuit(backbone), some_rows(backbone)
    with watched_memory() as beyond:
        step = WAYS[way](backbone, mask, rows, False)
        step()
        step()  # with Adam's moments there
    return {"model_mib": weights / MIB, "beyond_model_mib": max(beyond) / MIB}


def some_circuit(backbone: Backbone) -> Mask:
    scores = {layer: torch.rand(p.weight.shape[1]) for layer, p in ffn_outputs(backbone).items() if layer}
    return choose(scores, "neurons", 0.15)


def some_rows(backbone: Backbone) -> list[Example]:
    return opening_examples(backbone, [p.harmful for p in starter_pairs(8)], openings().refusal, seed=0)


def slice_step(backbone: Backbone, mask: Mask, rows: list[Example], packing: bool) -> Callable[[], None]:
    projections = ffn_outputs(backbone)
    changes = {
        layer: nn.Parameter(torch.zeros(projections[layer].weight.shape[0], len(chosen)))
        for layer, chosen in mask.channels.items()
    }
    optimiser = torch.optim.Adam(changes.values(), lr=0.0, fused=True)

    def step() -> None:
        with changed(projections, mask, changes):
            answer_cross_entropy(backbone, rows, packing=packing).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


def masked_step(backbone: Backbone, mask: Mask, rows: list[Example], packing: bool) -> Callable[[], None]:
    """The FFN output weights are parameters, kept in float32 beside the model's own for Adam, gradients masked."""
    weights = {layer: p.module.weight for layer, p in ffn_outputs(backbone).items() if layer in mask.channels}
    masters = {layer: nn.Parameter(w.detach().float()) for layer, w in weights.items()}
    keep = {layer: torch.zeros_like(m).index_fill_(1, mask.index(layer), 1.0) for layer, m in masters.items()}
    optimiser = torch.optim.Adam(masters.values(), lr=0.0, fused=True)

    def step() -> None:
        for w in weights.values():
            w.requires_grad_(True)
        answer_cross_entropy(backbone, rows, packing=packing).backward()
        for layer, w in weights.items():
            masters[layer].grad = w.grad.float() * keep[layer]
            w.grad = None
            w.requires_grad_(False)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        for layer, w in weights.items():
            w.data.copy_(masters[layer].data)

    return step


def whole_step(backbone: Backbone, mask: Mask, rows: list[Example], packing: bool) -> Callable[[], None]:
    """All weights are parameters, in float32 under bfloat16 autocast as full fine-tuning has them, gradients masked."""
    model = copy.deepcopy(backbone.model).float().requires_grad_(True)
    student = replace(backbone, model=model)
    circuit = {id(p.module.weight): mask.index(layer) for layer, p in ffn_outputs(student).items() if layer in mask.channels}
    optimiser = torch.optim.Adam(model.parameters(), lr=0.0, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            answer_cross_entropy(student, rows, packing=packing).backward()
        for p in model.parameters():
            if id(p) in circuit:
                p.grad.mul_(torch.zeros_like(p).index_fill_(1, circuit[id(p)], 1.0))
            else:
                p.grad.zero_()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    return step


WAYS = {"slices": slice_step, "masked": masked_step, "whole": whole_step}


def as_text(report: dict) -> str:
    lines = [machine_line(report["machine"]), "", "attribution (component level, m = 3)"]
    for r in (*report["over_pairs"], *report["over_shapes"]):
        lines.append(
            f"  {r['model']}, {r['pairs']} pairs: {r['seconds'] / r['pairs']:.3f} s a pair, "
            f"{r['operations'] / r['seconds'] / 1e9:.0f} Gop/s; model {r['model_mib']:.0f} MiB, "
            f"{r['beyond_model_mib']:.0f} MiB beyond it (peak {r['peak_over_model']:.2f}x the model)"
        )
    lines += ["", "training step, batch 8"]
    for name in ("padded", "packed"):
        found = report["step"][name]
        for other in ("masked", "whole"):
            ratio = found[f"slices_over_{other}"]
            lines.append(
                f"  {name}: slices / {other} time {ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['greatest']:.2f}]"
            )
    ratio = report["step"]["packed_over_padded"]
    memory = {way: found["beyond_model_mib"] for way, found in report["step_memory"].items()}
    for way, found in memory.items():
        lines.append(f"  {way}, padded: {found:.0f} MiB beyond the model (slices {memory['slices'] / found:.2f}x of it)")
    lines.append(f"  packed / padded time {ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['greatest']:.2f}]")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
