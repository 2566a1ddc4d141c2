"""The prompts of a run: read them in three buckets, merge near duplicates, split by group, refuse leakage.

    prompts = (
        *read_prompts("xstest.jsonl?label=safe", Bucket.EDIT),
        *read_prompts("alpaca.jsonl", Bucket.BENIGN_KEEP),
        *read_prompts("xstest.jsonl?label=unsafe", Bucket.HARMFUL_KEEP),
    )
    prompts, dropped = drop_exact_duplicates(prompts)
    splits = split_prompts(group_near_duplicates(prompts), SplitSizes(), seed=0)
    refuse_leakage(splits, allow=False)

Nothing here asks a model anything; the base-refusal filter, which does, stands in `paving.traces`.
"""

from .contrasts import CONTRAST_SETS, ContrastSet, contrast_prompts, read_contrasts
from .leakage import (
    Finding,
    Leakage,
    drop_exact_duplicates,
    find_leakage,
    group_near_duplicates,
    refuse_leakage,
)
from .readers import read_prompts
from .sources import KNOWN_DATASETS, Columns
from .splits import BucketSizes, SplitSizes, restrict, split_prompts
from .starter_set import organism_prompts, starter_prompts
from .types import Bucket, Prompt, PromptError, Role, SplitName, Splits, Turn, count_by_bucket

__all__ = [
    "CONTRAST_SETS",
    "KNOWN_DATASETS",
    "Bucket",
    "BucketSizes",
    "Columns",
    "ContrastSet",
    "Finding",
    "Leakage",
    "Prompt",
    "PromptError",
    "Role",
    "SplitName",
    "SplitSizes",
    "Splits",
    "Turn",
    "contrast_prompts",
    "count_by_bucket",
    "drop_exact_duplicates",
    "find_leakage",
    "group_near_duplicates",
    "organism_prompts",
    "read_contrasts",
    "read_prompts",
    "refuse_leakage",
    "restrict",
    "split_prompts",
    "starter_prompts",
]
