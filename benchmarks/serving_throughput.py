"""Tokens a second of vLLM with a controller against plain vLLM, at one, a few and many requests at once.

    python benchmarks/serving_throughput.py [--requests 1 8 64] [--rounds 5] [--shared 0] [--json] [--quick]

In an environment with vLLM (see `make test-vllm`), PEFT, steering-vectors and repeng. Engines live in processes of their own
and wait while another one works; all settings take turns within a round, each round beginning with the next one. A ratio is
paired by round: time of plain vLLM divided by the setting's, so 1 is as fast and less is slower. The settings:

    off, closed, half, open   one engine with a controller: not asked; asked, and no gate opens; every second; every one
    late, ...                 another, whose router reads blocks 8, 12 and 16, last token and mean (LATE of protocols.py): a
                              step in which its gate opens is run twice, and it has no prefix cache
    LoRA                      plain vLLM with a PEFT adapter of rank 16 on the FFN output of the same blocks
    transformers, ...         the same requests as one batch: plain, with the controller open, with steering-vectors, repeng

Prompts are random tokens, never the same twice, so that no prefix cache helps anyone, but for the first `--shared` of them,
which are the same in all. Bars: off and closed 0.97, half 0.95, open 0.92.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from decode_overhead import lora, missing_comparators, random_prompts, timed_call, variants
from paired import lively_controller, machine, machine_line, ratio_over_rounds, rotated_rounds
from paving.backbone import EMBEDDED, Backbone, load_backbone
from paving.backbone.embedded import embedded_checkpoint
from paving.controller import ResidualPaving, save_controller
from protocols import LATE as LATE_CONFIG

BARS = {"off": 0.97, "closed": 0.97, "half": 0.95, "open": 0.92}
# Setting -> what the requests of one call ask for, in turn. The oracle decides by label, and reads and routes as any gate.
ASKED: dict[str, list[dict]] = {
    "off": [{"paving_policy": "closed"}],
    "closed": [{"paving_policy": "oracle", "paving_bucket": "benign_keep"}],
    "half": [
        {"paving_policy": "oracle", "paving_bucket": "edit"},
        {"paving_policy": "oracle", "paving_bucket": "benign_keep"},
    ],
    "open": [{"paving_policy": "oracle", "paving_bucket": "edit"}],
}
PLAIN, LORA = "plain", "LoRA"
LATE = ("off", "closed", "open")
HERE = {
    "transformers": "plain",
    "transformers, controller open": "open",
    "transformers, steering-vectors": "steering",
    "transformers, repeng": "repeng",
}
Timed = Callable[[Sequence[Sequence[int]], int], float]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8, 64], help="at once (default: 1 8 64)")
    parser.add_argument("--prompt", type=int, default=48, help="prompt tokens (default: 48)")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens (default: 32)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--shared", type=int, default=0, help="leading tokens that all prompts share (default: 0)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="smoke test: 2 rounds of 4 tokens, 1 and 2 requests")
    parser.add_argument("--engine", nargs=2, metavar=("MODEL", "OPTIONS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return serve(args.engine[0], json.loads(args.engine[1]))
    if args.quick:
        args.requests, args.tokens, args.rounds = [1, 2], 4, 2
    if not 0 <= args.shared < args.prompt:
        parser.error("--shared must leave every prompt a token of its own")
    if missing := missing_comparators():
        sys.exit(f"not installed: {', '.join(missing)}; no comparator is left out silently (see the README's benchmarks).")
    torch.set_num_threads(args.threads)
    backbone = load_backbone(EMBEDDED, dtype=args.dtype)
    with ExitStack() as stack:
        settings = settings_of(backbone, args, stack)
        found = {n: measure(settings, backbone, n, args) for n in args.requests}
    report = {
        "machine": machine(backbone) | {"dtype": args.dtype},
        "prompt_tokens": args.prompt,
        "shared_tokens": args.shared,
        "new_tokens": args.tokens,
        "rounds": args.rounds,
        "bars": BARS,
        "results": {n: summary(times, n * args.tokens) for n, times in found.items()},
    }
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0


def settings_of(backbone: Backbone, args: argparse.Namespace, stack: ExitStack) -> dict[str, Timed]:
    """Name -> (prompts, new tokens) -> seconds. Engines are up when this returns, and go with the stack."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    controller = lively_controller(backbone).with_scale(1.0)
    controller.weights.eval().requires_grad_(False)
    save_controller(controller, folder / "controller")
    adapter = lora(backbone, controller.config.edit_layers)
    adapter.model.save_pretrained(folder / "lora")
    options = {
        "dtype": args.dtype, "enforce_eager": True, "max_model_len": args.prompt + args.tokens + 8,
        "max_num_seqs": max(args.requests),
    }  # fmt: skip
    save_controller(late_controller(backbone), folder / "late")
    served, late = ({"PAVING_CONTROLLER": str(folder / name), "PAVING_ALLOW_ORACLE": "1"} for name in ("controller", "late"))
    no_cache = options | {"enable_prefix_caching": False}
    with_lora = options | {"enable_lora": True, "max_lora_rank": 16, "paving_adapter": str(folder / "lora")}
    plain, paved, paved_late, adapted = (
        stack.enter_context(engine(given, more, args.threads))
        for given, more in ((options, {}), (options, served), (no_cache, late), (with_lora, {}))
    )
    found: dict[str, Timed] = {PLAIN: lambda prompts, n: plain(prompts, n, [None])}
    found |= {name: (lambda prompts, n, asked=asked: paved(prompts, n, asked)) for name, asked in ASKED.items()}
    found |= {f"late, {k}": (lambda prompts, n, asked=ASKED[k]: paved_late(prompts, n, asked)) for k in LATE}
    found[LORA] = lambda prompts, n: adapted(prompts, n, [None])
    by_name = {v.name: v for v in variants(backbone, controller)}

    def here(name: str) -> Timed:
        def timed(prompts: Sequence[Sequence[int]], n: int) -> float:
            batch = random_prompts(backbone, len(prompts), len(prompts[0]))
            return timed_call(by_name[name], batch, n).whole

        return timed

    return found | {name: here(variant) for name, variant in HERE.items()}


def late_controller(backbone: Backbone) -> ResidualPaving:
    controller = lively_controller(backbone, LATE_CONFIG).with_scale(1.0)
    controller.weights.eval().requires_grad_(False)
    return controller


@contextmanager
def engine(options: Mapping, environment: Mapping[str, str], threads: int) -> Iterator[Callable]:
    """A vLLM engine in a process of its own: (prompts, new tokens, extra arguments in turn) -> seconds."""
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_STREAM": "ext://sys.stderr", "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads), "VLLM_USE_V2_MODEL_RUNNER": "0",
    } | environment  # fmt: skip
    line = [sys.executable, __file__, "--engine", str(embedded_checkpoint()), json.dumps(dict(options))]
    process = subprocess.Popen(line, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def told() -> dict:
        for answer in process.stdout:
            if answer.startswith("{"):
                return json.loads(answer)
        raise RuntimeError("an engine ended; its log above says why.")

    def timed(prompts: Sequence[Sequence[int]], tokens: int, asked: Sequence[dict | None]) -> float:
        process.stdin.write(json.dumps({"prompts": prompts, "tokens": tokens, "asked": list(asked)}) + "\n")
        process.stdin.flush()
        return told()["seconds"]

    try:
        told()  # it is up
        yield timed
    finally:
        process.stdin.close()
        process.wait(60)


def serve(model: str, options: dict) -> int:
    """The other process: a line of JSON in, a line of JSON out."""
    import vllm
    from vllm.lora.request import LoRARequest

    adapter = options.pop("paving_adapter", None)
    lora_request = LoRARequest("adapter", 1, adapter) if adapter else None
    engine = vllm.LLM(model=model, **options)
    print(json.dumps({"up": True}), flush=True)
    for line in sys.stdin:
        one = json.loads(line)
        params = [
            vllm.SamplingParams(
                temperature=0.0, max_tokens=one["tokens"], ignore_eos=True,
                extra_args=one["asked"][i % len(one["asked"])],
            )
            for i in range(len(one["prompts"]))
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in one["prompts"]]
        start = time.perf_counter()
        outputs = engine.generate(prompts, params, use_tqdm=False, lora_request=lora_request)
        seconds = time.perf_counter() - start
        made = {len(o.outputs[0].token_ids) for o in outputs}
        if made != {one["tokens"]}:
            raise RuntimeError(f"answers of {made} tokens instead of {one['tokens']}.")
        print(json.dumps({"seconds": seconds}), flush=True)
    return 0


def measure(settings: Mapping[str, Timed], backbone: Backbone, n: int, args: argparse.Namespace) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(n)
    ordinary = torch.tensor([i for i in range(len(backbone.tokenizer)) if i not in set(backbone.tokenizer.all_special_ids)])

    shared = ordinary[torch.randint(len(ordinary), (args.shared,), generator=generator)].tolist()

    def prompts() -> list[list[int]]:
        own = ordinary[torch.randint(len(ordinary), (n, args.prompt - args.shared), generator=generator)].tolist()
        return [shared + ids for ids in own]

    for timed in settings.values():
        timed(prompts(), 2)
    times: dict[str, list[float]] = {name: [] for name in settings}
    for i, order in enumerate(rotated_rounds(list(settings), args.rounds), 1):
        for name in order:
            times[name].append(settings[name](prompts(), args.tokens))
        print(f"{n} requests: round {i}/{args.rounds}", file=sys.stderr, flush=True)
    return times


def summary(times: Mapping[str, Sequence[float]], tokens: int) -> dict[str, dict]:
    """ratio: of throughput to plain vLLM's; tokens_per_second: in the median round."""
    return {
        name: {
            "ratio": asdict(ratio_over_rounds(times[PLAIN], seconds)),
            "tokens_per_second": tokens / sorted(seconds)[len(seconds) // 2],
            "bar": BARS.get(name),
        }
        for name, seconds in times.items()
    }


def as_text(report: Mapping) -> str:
    names = list(next(iter(report["results"].values())))
    lines = [
        machine_line(report["machine"]),
        f"{report['prompt_tokens']} prompt tokens, {report['shared_tokens']} of them shared, "
        f"{report['new_tokens']} new tokens, {report['rounds']} rounds",
        "",
        "| throughput, plain vLLM = 1 | " + " | ".join(f"{n} at once" for n in report["results"]) + " | bar |",
        "| --- |" + " --- |" * (len(report["results"]) + 1),
    ]
    for name in names:
        cells = []
        for rows in report["results"].values():
            ratio, speed = rows[name]["ratio"], rows[name]["tokens_per_second"]
            cells.append(f"{ratio['median']:.2f} [{ratio['least']:.2f}, {ratio['greatest']:.2f}] ({speed:.0f}/s)")
        lines.append(f"| {name} | {' | '.join(cells)} | {report['bars'].get(name, '')} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
