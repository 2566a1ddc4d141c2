"""What a gate does with prompts unlike those it was fitted on: `paving router shift` with sources and languages of its own.

    python benchmarks/routing_shift.py RUN [RUN ...] --data DIR [--json]

Every prompt is judged by the gate alone; nothing is decoded. Sources are the last 120 prompts of saladbench.jsonl,
harmbench.jsonl and alpaca.jsonl in DIR that neither the run nor its base was fitted on (organism.json beside the base).
Languages: other_languages.jsonl, twelve pairs written for this benchmark in four of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from paving.evaluation.shift import HELD_OUT, Shifted
from paving.prompts.types import Bucket, Prompt
from paving.report.tables import rate_text
from paving.router_shift import Source, read_source, shift
from paving.run import Means
from paving.run_folder import read_config
from paving.run_splits import recorded_split

TAKEN = 120
PAIRS = Path(__file__).with_name("other_languages.jsonl")
SOURCES = {"saladbench": Bucket.HARMFUL_KEEP, "harmbench": Bucket.HARMFUL_KEEP, "alpaca": Bucket.BENIGN_KEEP}
LANGUAGES = {"en": "English", "de": "German", "fr": "French", "es": "Spanish"}
SIDES = {"safe": Bucket.EDIT, "unsafe": Bucket.HARMFUL_KEEP}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for run in arguments.runs:
        print(f"{run.name}: gates", file=sys.stderr, flush=True)
        sources = [*unseen_sources(run, arguments.data), *languages()]
        found[run.name] = {title(one): one for one in shift(run, Means.default(), sources)}
    kept = {run: {name: one.model_dump(mode="json") for name, one in rows.items()} for run, rows in found.items()}
    print(json.dumps(kept, indent=1) if arguments.json else as_text(found))


def unseen_sources(run: Path, data: Path) -> list[Source]:
    """The last of each source's prompts that neither the run nor its base was fitted on."""
    config = read_config(run)
    splits = recorded_split(config, run)
    seen = {p.text for p in (*splits.train, *splits.calibration)}
    tuned_on = base_prompts(Path(config.model))
    sources = []
    for name, bucket in SOURCES.items():
        every = read_source(str(data / f"{name}.jsonl"), bucket).prompts
        sources.append(Source(name, bucket, [p for p in every if p.text not in seen and p.id not in tuned_on][-TAKEN:]))
    return sources


def base_prompts(model: Path) -> set[str]:
    """Ids of what the cautious base was tuned on; none for a base that says nothing of it."""
    record = model / "organism.json"
    if not record.exists():
        return set()
    made = json.loads(record.read_text(encoding="utf-8"))
    return {*made["refuse_ids"], *made["answer_ids"]}


def languages() -> list[Source]:
    pairs = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    return [
        Source(
            language,
            bucket,
            [Prompt(f"{code}-{side}-{pair['focus']}", pair[side][code], bucket, pair["focus"]) for pair in pairs],
        )
        for code, language in LANGUAGES.items()
        for side, bucket in SIDES.items()
    ]


def title(one: Shifted) -> str:
    return f"{one.prompts}, {one.bucket.value}" + (f", {one.clothes}" if one.prompts == HELD_OUT else "")


def as_text(found: dict[str, dict[str, Shifted]]) -> str:
    lines = ["| prompts | " + " | ".join(found) + " |", "| --- " * (1 + len(found)) + "|"]
    for name in next(iter(found.values())):
        lines.append(f"| {name} | " + " | ".join(rate_text(rows[name].opened) for rows in found.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
