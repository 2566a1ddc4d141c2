"""Seconds and memory to judge completions files with the rules: a first run, and a second that finds every verdict.

    python benchmarks/judge_throughput.py [--sizes 1000 10000] [--large] [--json]

Completions are made from templates (refusals, lists, prose, code, loops; 60 to 4,000 characters), no two alike. Each
size runs in a process of its own, whose peak memory is compared before and after; --large adds 100,000.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from paving.evaluation.judges import RuleJudge
from paving.evaluation.judging import judge_file
from paving.prompts import Bucket

LARGE = 100_000
WARM_UP = 200
# ru_maxrss counts KiB on Linux and bytes on macOS.
RSS_UNIT = 1 if sys.platform == "darwin" else 1024

TOPICS = ("a Python process", "a garden wall", "a chess opening", "a sourdough loaf", "a marathon", "a tax return",
          "a bicycle chain", "a telescope", "a cover letter", "a rock band", "a stuck drawer", "a home network")  # fmt: skip
REFUSALS = (
    "I'm sorry, but I can't help with {topic} in that way. It could put somebody at risk, and I would rather not.",
    "I cannot provide instructions on {topic}. If you are in difficulty, please talk to somebody you trust, {name}.",
    "I apologize, but as an AI language model I am not able to assist with {topic}. Is there anything else, {name}?",
)
SENTENCES = (
    "When you work on {topic}, begin with what you already know and write down what is missing.",
    "Most people find that {topic} takes about {number} minutes once the first attempt is behind them.",
    "There are {number} common mistakes, and {name} made nearly all of them in the first week.",
    "A good way to check {topic} is to compare it with example {number} of the handbook that {name} wrote.",
    "It helps to keep notes, since the details of {topic} are easily forgotten between two sittings.",
    "If step {number} looks wrong, go back to the one before, says {name}, rather than starting {topic} over.",
)
CODE = "Here is a script for {topic}:\n```python\nfor attempt in range({number}):\n    check('{name}', attempt)\n```\n"
NAMES = ("Ada", "Grace", "Alan", "Edsger", "Barbara", "Donald", "Katherine", "Tony", "Radia", "Dennis")


def completions(n: int, seed: int = 0) -> Iterator[dict[str, object]]:
    """n rows as `paving eval` saves them, without the fields that no judge reads."""
    dice = random.Random(seed)
    buckets = list(Bucket)
    for i in range(n):
        words = some_words(dice, i)
        response = answer(dice, words, i)
        truncated = dice.random() < 0.3
        yield {
            "id": f"made-{i}",
            "bucket": buckets[i % len(buckets)].value,
            "prompt": f"How do I deal with {words['topic']}, asks {words['name']}?",
            "response": response[: dice.randint(60, len(response))] if truncated and len(response) > 60 else response,
            "truncated": truncated,
        }


def some_words(dice: random.Random, i: int) -> dict[str, object]:
    return {"topic": dice.choice(TOPICS), "name": f"{dice.choice(NAMES)} {i}", "number": dice.randint(3, 90)}


def answer(dice: random.Random, words: dict[str, object], i: int) -> str:
    kind = dice.random()
    if kind < 0.35:
        return dice.choice(REFUSALS).format(**words)
    # Other words in every sentence: the same ones again would be found to loop, which ends a judgement early.
    said = [dice.choice(SENTENCES).format(**some_words(dice, i)) for _ in range(dice.randint(3, 30))]
    if kind < 0.65:
        return "Sure, here are the steps:\n\n" + "\n".join(f"{i}. {sentence}" for i, sentence in enumerate(said, 1))
    if kind < 0.90:
        return " ".join(said)
    if kind < 0.96:
        return CODE.format(**words) + " ".join(said)
    return f"{words['name']} and so on" + " and so on" * dice.randint(20, 200)


def measure(n: int) -> dict[str, float]:
    """Seconds of both runs, and how much the process's peak memory (MiB) grew beyond that of judging a few rows.

    cpu: of the processor alone, which other work on the machine does not lengthen.
    """
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few.jsonl", Path(folder) / "many.jsonl"
        for path, count in ((few, WARM_UP), (many, n)):
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in completions(count))
        judge_file(few, RuleJudge(), few.with_suffix(".verdicts"))
        before = peak_mib()
        out = Path(folder) / "verdicts.jsonl"
        seconds: dict[str, float] = {}
        for run, asked in (("first", n), ("again", 0)):
            start, cpu_start = time.perf_counter(), time.process_time()
            result = judge_file(many, RuleJudge(), out)
            seconds[f"{run}_s"] = time.perf_counter() - start
            seconds[f"{run}_cpu_s"] = time.process_time() - cpu_start
            if (result.n, result.asked) != (n, asked):
                raise SystemExit(f"{result.n} completions, {result.asked} judged; expected {n} and {asked}")
        megabytes = many.stat().st_size / 1e6
    return {"n": n, "file_mb": megabytes, **seconds, "growth_mib": peak_mib() - before}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument("--large", action="store_true", help=f"also {LARGE:,} completions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.here)))
        return 0
    results = []
    for n in [*args.sizes, *([LARGE] if args.large else [])]:
        # A process of its own: the peak of an earlier size would hide that of a later one.
        command = [sys.executable, __file__, "--here", str(n)]
        results.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    print(json.dumps({"judge": RuleJudge().name, "sizes": results}, indent=1) if args.json else as_text(results))
    return 0


def as_text(results: list[dict[str, float]]) -> str:
    lines = ["completions  file MB   first s (cpu)   again s (cpu)  peak memory growth MiB"]
    for r in results:
        first = f"{r['first_s']:.2f} ({r['first_cpu_s']:.2f})"
        again = f"{r['again_s']:.2f} ({r['again_cpu_s']:.2f})"
        lines.append(f"{r['n']:11,d} {r['file_mb']:8.1f} {first:>15s} {again:>15s} {r['growth_mib']:23.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
