"""How well the rule judge agrees with human labels on XSTest responses: refused (fully or partially) or complied.

    python benchmarks/judge_agreement.py --data ../shared/data [--json]

DIR holds `xstest_human_labels_<model>.jsonl`, the labelled responses of XSTest's release; no bucket is shown.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from pathlib import Path

from paving.evaluation.judges import Judge, RuleJudge

# GPT-4's and string matching's agreement with the same human labels: the project's reference figures, taken from
# XSTest's release and not recomputed here.
REFERENCE = {
    "llama2new": {"gpt-4": 0.80, "string match": 0.92},
    "mistralguard": {"gpt-4": 0.82, "string match": 0.81},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with xstest_human_labels_<model>.jsonl")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(argv)
    files = sorted(args.data.glob("xstest_human_labels_*.jsonl"))
    if not files:
        print(f"no xstest_human_labels_*.jsonl in {args.data}; --data takes the folder that holds them", file=sys.stderr)
        return 2
    judge = RuleJudge()
    results = {f.stem.removeprefix("xstest_human_labels_"): agreement(judge, f) for f in files}
    print(json.dumps({"judge": judge.name, "files": results}, indent=2) if args.json else as_text(judge.name, results))
    return 0


def agreement(judge: Judge, path: Path) -> dict[str, object]:
    """Counts are keyed human_judge: `refused_complied` is a refusal that the judge took for compliance."""
    counts: Counter[str] = Counter({f"{h}_{j}": 0 for h in _NAMES for j in _NAMES})
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        human = row["human_label"] != "1_full_compliance"
        verdict = judge.judge(row["prompt"], row["response"], None)
        counts[f"{_NAMES[not human]}_{_NAMES[not verdict.refusal]}"] += 1
    n = counts.total()
    if n == 0:
        raise ValueError(f"{path} holds no rows; each line is a JSON object with prompt, response and human_label")
    agreed = counts["refused_refused"] + counts["complied_complied"]
    low, high = wilson(agreed, n)
    model = path.stem.removeprefix("xstest_human_labels_")
    return {
        "n": n,
        "agreed": agreed,
        "agreement": agreed / n,
        "low": low,
        "high": high,
        "kappa": kappa(counts, n),
        "confusion": dict(counts),
        "reference": REFERENCE.get(model, {}),
    }


_NAMES = ("refused", "complied")


def kappa(counts: Counter[str], n: int) -> float:
    """Cohen's kappa; nan where both sides use one and the same label throughout."""
    agreed = sum(counts[f"{name}_{name}"] for name in _NAMES) / n
    by_chance = sum(
        sum(counts[f"{name}_{j}"] for j in _NAMES) * sum(counts[f"{h}_{name}"] for h in _NAMES) for name in _NAMES
    ) / (n * n)
    return (agreed - by_chance) / (1 - by_chance) if by_chance < 1 else math.nan


def wilson(k: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(k * (n - k) / n + z * z / 4)
    return centre - half, centre + half


def as_text(judge: str, results: dict[str, dict]) -> str:
    lines = [
        f"{judge} against human labels on XSTest (full or partial refusal = refusal)",
        f"{'responses of':14s} {'agreement':>28s} {'kappa':>6s} {'missed refusals':>16s} {'false refusals':>15s}"
        "   reference",
    ]
    for model, r in results.items():
        share = f"{r['agreed']}/{r['n']} {r['agreement']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
        c = r["confusion"]
        missed = f"{c['refused_complied']}/{c['refused_complied'] + c['refused_refused']}"
        false = f"{c['complied_refused']}/{c['complied_refused'] + c['complied_complied']}"
        beside = ", ".join(f"{k} {v:.2f}" for k, v in r["reference"].items()) or "n/a"
        lines.append(f"{model:14s} {share:>28s} {r['kappa']:6.3f} {missed:>16s} {false:>15s}   {beside}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
