"""Time and memory of edge attribution, and how its memory grows with pairs, layers and width.

    python benchmarks/circuit_edges.py [--pairs 20] [--method eap-ig-inputs] [--steps 5] [--json] [--out FILE] [--quick]

The pairs are random tokens of unequal length; only their number and length matter. Two memories are given:

    peak     the process's (on an accelerator, the allocator's) highest use in the run, above what it held before: the model
    tensors  the most bytes of tensors that were alive at once, counted by a dispatch mode in a second, untimed run; it has
             no allocator in it, so that growth can be read off it. Scratch space inside a kernel is not seen.

Beside the run stand two floors of it (`floors`) and what one (pairs, tokens, sources, d_model) tensor of the whole graph
would take at this batch, which is what an implementation without streaming holds before it begins.

Growth is measured on random Llamas in float32, one quantity doubled at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from paired import ModelSize, machine, machine_line, model_size, synchronise
from paving.backbone import EMBEDDED, Backbone, as_backbone, load_backbone
from paving.circuit.edges import EdgeGraph, TokenPair, edge_scores, faithfulness, greedy_edges, logit_difference
from paving.circuit.edges.graph import taken_apart
from paving.circuit.edges.scores import METHODS

VOCABULARY = 512  # of the random models: small, so that the head is not what is measured
SHAPE = {"layers": 8, "width": 256, "pairs": 2}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48, help="longest prompt; the shortest has three quarters of it")
    parser.add_argument("--method", default="eap-ig-inputs", choices=METHODS)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: what torch has)")
    parser.add_argument("--no-growth", action="store_true", help="leave the random models out")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--out", type=Path, default=None, help="also write the JSON object to FILE")
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 pairs of 8 tokens, 2 steps, two sizes of growth")
    args = parser.parse_args(argv)
    if args.quick:
        args.pairs, args.tokens, args.steps = 2, 8, 2
    if args.pairs < 1 or args.tokens < 4 or args.steps < 1 or args.batch_size < 1:
        parser.error("--pairs, --steps and --batch-size must be at least 1, --tokens at least 4")
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    backbone = load_backbone(args.model, dtype=args.dtype)
    report = {
        "machine": machine(backbone) | {"dtype": args.dtype},
        "settings": {k: getattr(args, k) for k in ("pairs", "tokens", "method", "steps", "batch_size")},
        "run": measured_run(backbone, args),
        "growth": {} if args.no_growth else growth(backbone, args),
    }
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def measured_run(backbone: Backbone, args: argparse.Namespace) -> dict[str, object]:
    graph, _ = taken_apart(backbone)
    pairs, metric = random_pairs(args.pairs, args.tokens), logit_difference([10], [11])

    def attribute(some: Sequence[TokenPair]):
        return edge_scores(
            backbone, some, metric, method=args.method, steps=args.steps, batch_size=args.batch_size,
            progress=lambda n: print(f"{n}/{len(some)} pairs", file=sys.stderr),
        )  # fmt: skip

    with torch.no_grad():  # weights that are mapped from a file are in memory from here on
        backbone.model(torch.tensor([pairs[0].clean], device=backbone.device), use_cache=False)
    with highest_use(backbone.device) as peak:
        attribute(pairs[:1])  # not timed: kernels are chosen and threads started
        start, start_cpu = time.perf_counter(), time.process_time()
        scores = attribute(pairs)
        synchronise(backbone.device)
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    with live_tensors() as tensors:
        attribute(pairs[: args.batch_size])
    circuit = greedy_edges(scores, max(1, graph.n_edges // 50))
    start = time.perf_counter()
    faithful = faithfulness(backbone, pairs, circuit, metric, batch_size=args.batch_size)
    synchronise(backbone.device)
    item = next(backbone.model.parameters()).element_size()
    return {
        "edges": graph.n_edges,
        "seconds": seconds,
        "seconds_a_pair": seconds / args.pairs,
        "cpu_seconds": cpu_seconds,
        "floors": floors(model_size(backbone), args),
        "model_bytes": sum(p.numel() * p.element_size() for p in backbone.model.parameters()),
        "peak_bytes": peak[0],
        "tensor_bytes": tensors[0],
        "graph_tensor_bytes": min(args.batch_size, args.pairs) * args.tokens * graph.n_sources * backbone.d_model * item,
        "faithfulness_seconds_a_pair": (time.perf_counter() - start) / args.pairs,
        "faithfulness_of_2_percent": faithful.normalised,
    }


def random_pairs(n: int, tokens: int) -> tuple[TokenPair, ...]:
    """Pairs whose longest prompt has `tokens` tokens, whichever side it is on."""
    generator = torch.Generator().manual_seed(0)

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(20, VOCABULARY, (length,), generator=generator).tolist())

    short = tokens * 3 // 4
    return tuple(TokenPair(str(i), *map(drawn, (tokens, short) if i % 2 else (short, tokens))) for i in range(n))


# --- the floors ---


def floors(size: ModelSize, args: argparse.Namespace) -> dict[str, float]:
    """What the whole run must compute and read at least. The padding of the shorter prompt is counted as tokens."""
    steps = 1 if args.method == "eap" else args.steps
    blocks = size.linear - size.head
    once = 2 * blocks * args.tokens + size.attention_operations(args.tokens / 2) * args.tokens + 2 * size.head
    graph = EdgeGraph(size.n_layers, size.n_heads, size.n_kv_heads)
    # Clean and corrupt, then per step forward, forward again block by block, and back. Interpolating activations, each
    # group of sources has runs of its own, which need no pass below it: on the average half a pass.
    with_gradient = 3 * (2 * size.n_layers + 1) / 2 if args.method == "eap-ig-activations" else 3
    passes = 2 + steps * with_gradient
    products = 2 * args.tokens * size.d_model * graph.n_edges
    n_batches = -(-args.pairs // args.batch_size)
    return {
        "passes": passes,
        "operations": args.pairs * (passes * once + products),
        "bytes": n_batches * (2 + with_gradient) * size.linear * size.item_bytes,  # all steps are one batch
    }


# --- memory ---


@contextmanager
def highest_use(device: torch.device) -> Iterator[list[float]]:
    """Yields a list that holds, once left, the highest use in the block less the use at its beginning, in bytes.

    nan where the machine cannot say: on CPUs that takes Linux, which lets a process reset its high-water mark.
    """
    found = [float("nan")]
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield found
        found[0] = float(torch.accelerator.max_memory_allocated(device) - before)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except OSError:
        yield found
        return
    yield found
    found[0] = float(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextmanager
def live_tensors() -> Iterator[list[int]]:
    """Yields a list that holds, once left, the most bytes of tensors made in the block that were alive at one time."""

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.known: set[int] = set()
            self.now = self.most = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            held = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.count(x.untyped_storage(), held)
            return out

        def count(self, storage: torch.UntypedStorage, held: set[int]) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.known or key in held:  # a view, or an operation in place
                return
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.freed, key, size)

        def freed(self, key: int, size: int) -> None:
            self.known.discard(key)
            self.now -= size

    found = [0]
    with Counter() as counter:
        yield found
    found[0] = counter.most


def growth(backbone: Backbone, args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Most bytes of live tensors while one of pairs, layers and width is doubled and the others stay."""
    factors = (1, 2) if args.quick else (1, 2, 4)
    found: dict[str, list[dict[str, float]]] = {}
    for name in ("pairs", "layers", "width"):
        found[name] = []
        for factor in factors:
            shape = SHAPE | {name: SHAPE[name] * factor}
            model = random_llama(backbone, shape["layers"], shape["width"])
            with live_tensors() as most:
                edge_scores(
                    model, random_pairs(shape["pairs"], args.tokens), logit_difference([10], [11]), method=args.method,
                    steps=args.steps, batch_size=1,
                )  # fmt: skip
            graph, _ = taken_apart(model)
            whole = args.tokens * graph.n_sources * model.d_model * 4
            scores = 4 * graph.n_sources * graph.n_destinations * 8  # two sums in float64, one pair's, and their product
            found[name].append({name: shape[name], "tensor_bytes": most[0], "graph_tensor_bytes": whole, "scores": scores})
            print(f"growth with {name}: {shape[name]}", file=sys.stderr)
    return found


def random_llama(backbone: Backbone, layers: int, width: int) -> Backbone:
    """Heads of 32, four of them to a key-value group; its tokenizer is the other model's, and never asked."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 32, num_key_value_heads=width // 128, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    return as_backbone(AutoModelForCausalLM.from_config(config), backbone.tokenizer, f"llama-{layers}x{width}")


# --- the table ---


def as_text(report: dict) -> str:
    run, settings, mib = report["run"], report["settings"], 2**20
    floor, seconds = run["floors"], run["seconds"]
    lines = [
        machine_line(report["machine"]),
        ", ".join(f"{k} {v}" for k, v in settings.items()) + f"; {run['edges']} edges",
        "",
        f"time           {seconds:.1f} s, {run['seconds_a_pair']:.2f} s a pair; {run['cpu_seconds']:.1f} s of CPU",
        f"floors         {floor['passes']:.0f} forward passes a pair, {floor['operations'] / 1e12:.2f} Tflop: "
        f"{floor['operations'] / seconds / 1e9:.0f} Gflop/s reached; {floor['bytes'] / 1e9:.1f} GB read: "
        f"{floor['bytes'] / seconds / 1e9:.1f} GB/s",
        f"peak           {run['peak_bytes'] / mib:.0f} MiB above the model's {run['model_bytes'] / mib:.0f} MiB "
        f"({1 + run['peak_bytes'] / run['model_bytes']:.2f} models in all)",
        f"tensors        {run['tensor_bytes'] / mib:.0f} MiB alive at most; the whole graph's would be "
        f"{run['graph_tensor_bytes'] / mib:.0f} MiB, before any gradient",
        f"faithfulness   {run['faithfulness_seconds_a_pair']:.2f} s a pair, greedy circuit of 2 % of the edges: "
        f"{run['faithfulness_of_2_percent']:.2f}",
    ]
    for name, rows in report["growth"].items():
        lines += [
            "",
            f"{name:>8}  {'tensors MiB':>12} {'ratio':>6}   {'graph tensor MiB':>16} {'ratio':>6}   score matrices MiB",
        ]
        for row, before in zip(rows, [None, *rows[:-1]], strict=True):
            cells = []
            for key, width in (("tensor_bytes", 12), ("graph_tensor_bytes", 16)):
                ratio = "" if before is None else f"{row[key] / before[key]:.2f}x"
                cells.append(f"{row[key] / mib:>{width}.2f} {ratio:>6}")
            lines.append(f"{row[name]:>8}  {'   '.join(cells)}   {row['scores'] / mib:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
