"""The prompts of a run, and the split that it keeps for good: recorded when it is trained, read back by everything after."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

from paving.prompts.leakage import drop_exact_duplicates, group_near_duplicates, refuse_leakage
from paving.prompts.readers import read_prompts
from paving.prompts.splits import split_prompts
from paving.prompts.starter_set import starter_prompts
from paving.prompts.types import Bucket, Prompt, PromptError, SplitName, Splits, count_by_bucket
from paving.run_folder import STARTER, RunConfig, RunError, write_json

SPLITS = "splits.json"


@dataclass(frozen=True)
class Split:
    """record: what was read, dropped and allowed, for prompts.json."""

    splits: Splits
    record: dict[str, object]


def split_of(config: RunConfig) -> Split:
    """Read, drop exact duplicates, split by group, refuse leakage."""
    prompts = bucket_prompts(config)
    unique, dropped = drop_exact_duplicates(prompts)
    splits = split_prompts(group_near_duplicates(unique), config.sizes, config.split_seed)
    leakage = refuse_leakage(splits, allow=config.allow_leakage)
    record = {
        "read": count_by_bucket(prompts),
        "exact_duplicates_dropped": list(dropped),
        "leakage_allowed": config.allow_leakage,
        "leakage": str(leakage) if config.allow_leakage else None,
    }
    return Split(splits, record)


def bucket_prompts(config: RunConfig) -> tuple[Prompt, ...]:
    """The prompts of all three buckets. raises PromptError for an empty bucket."""
    starter: dict[Bucket, list[Prompt]] = {b: [] for b in Bucket}
    for p in starter_prompts():
        starter[p.bucket].append(p)
    result: list[Prompt] = []
    sources = ((Bucket.EDIT, config.edit), (Bucket.BENIGN_KEEP, config.benign), (Bucket.HARMFUL_KEEP, config.harmful))
    for bucket, source in sources:
        found = starter[bucket] if source == STARTER else read_prompts(source, bucket)
        if not found:
            raise PromptError(f"the {bucket.value} bucket is empty: {source} has no prompts. Every bucket needs some.")
        result += found
    if config.system is None:
        return tuple(result)
    return tuple(replace(p, system=p.system if p.system is not None else config.system) for p in result)


def bucket_counts(splits: Splits) -> dict[str, dict[str, int]]:
    return {s.value: count_by_bucket(splits.of(s)) for s in SplitName}


def record_splits(splits: Splits, folder: Path) -> None:
    """splits.json: the prompt ids of every split, what each prompt was, and the counts before and after every filter."""
    known = {
        b.value: {p.id: {"group": p.group, "digest": _digest(p)} for s in SplitName for p in splits.of(s, b)} for b in Bucket
    }
    filters = [dict(c) for c in splits.counts]
    content = {"filters": filters, "counts": bucket_counts(splits), "ids": splits.ids(), "prompts": known}
    write_json(folder / SPLITS, content)


def recorded_split(config: RunConfig, folder: Path) -> Splits:
    """As training filtered it, prompt by prompt: the judge is not asked again, who may ask a fee or give another answer,
    and a file that has grown since is not split anew, which would hold out what was trained on.

    raises RunError where prompts are gone or say something else now
    """
    recorded = json.loads((folder / SPLITS).read_text(encoding="utf-8"))
    every = bucket_prompts(config)
    known = recorded.get("prompts")
    if known is None:  # runs of before recorded ids alone
        every, known = group_near_duplicates(drop_exact_duplicates(every)[0]), {b.value: {} for b in Bucket}
    prompts = {(p.bucket, p.id): p for p in every}
    changed: list[str] = []

    def read(bucket: Bucket, name: str) -> Prompt | None:
        found, was = prompts.get((bucket, name)), known[bucket.value].get(name)
        if found is None or (was is not None and was["digest"] != _digest(found)):
            changed.append(name)
            return None
        return found if was is None else replace(found, group=was["group"])

    parts = {s: tuple(read(b, name) for b in Bucket for name in recorded["ids"][s.value][b.value]) for s in SplitName}
    if changed:
        raise RunError(
            f"{len(changed)} prompts that {folder} was made with are gone from its files, or say something else now "
            f"(first: {', '.join(changed[:5])}). Put the files back as they were, or train another run."
        )
    counts = tuple(recorded["filters"])
    return Splits(parts[SplitName.TRAIN], parts[SplitName.CALIBRATION], parts[SplitName.HELD_OUT], counts)


def _digest(prompt: Prompt) -> str:
    earlier = [[turn.role, turn.content] for turn in prompt.history]
    said = [prompt.text, prompt.target, prompt.system, *([earlier] if earlier else [])]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
