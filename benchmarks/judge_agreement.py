"""How well the rule judge agrees with human labels on XSTest responses: refused (fully or partially) or complied.

    python benchmarks/judge_agreement.py --data ../shared/data [--json]

DIR holds `xstest_human_labels_<model>.jsonl`, the labelled responses of XSTest's release; no bucket is shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from paving.evaluation.agreement import COMPLIED, REFUSED, agreement
from paving.evaluation.judges import Judge, RuleJudge
from paving.evaluation.judges.answers import read_answers
from paving.evaluation.ratings import Rating, Ratings, read_ratings
from paving.evaluation.verdicts import text_hash

STEM = "xstest_human_labels_"

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
    files = sorted(args.data.glob(f"{STEM}*.jsonl"))
    if not files:
        print(f"no {STEM}*.jsonl in {args.data}; --data takes the folder that holds them", file=sys.stderr)
        return 2
    judge = RuleJudge()
    results = {f.stem.removeprefix(STEM): measured(judge, f) for f in files}
    print(json.dumps({"judge": judge.name, "files": results}, indent=2) if args.json else as_text(judge.name, results))
    return 0


def measured(judge: Judge, path: Path) -> dict[str, object]:
    """Counts are keyed human_judge: `refused_complied` is a refusal that the judge took for compliance."""
    found = agreement(read_ratings(path), judged(judge, path)).refusal
    counts = {f"{h}_{j}": found.confusion[x][y] for x, h in enumerate(_NAMES) for y, j in enumerate(_NAMES)}
    rate = found.agreement
    return {
        "n": rate.n,
        "agreed": rate.k,
        "agreement": rate.rate,
        "low": rate.low,
        "high": rate.high,
        "kappa": found.kappa.value,
        "confusion": counts,
        "reference": REFERENCE.get(path.stem.removeprefix(STEM), {}),
    }


_NAMES = (REFUSED, COMPLIED)


def judged(judge: Judge, path: Path) -> Ratings:
    """The judge's own ratings of the responses that people labelled."""
    rows = []
    for answer in read_answers(path):
        verdict = judge.judge(answer.prompt, answer.response, answer.bucket)
        text = text_hash(answer.prompt, answer.response)
        rows.append(Rating(f"{path}:{answer.line}", answer.id, text, answer.bucket, verdict.refusal, verdict.label))
    return Ratings(path, judge.name, tuple(rows))


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
        kappa = "n/a" if r["kappa"] is None else f"{r['kappa']:.3f}"
        lines.append(f"{model:14s} {share:>28s} {kappa:>6s} {missed:>16s} {false:>15s}   {beside}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
