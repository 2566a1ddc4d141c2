"""The prompts that come with the package, so that a run needs no download. Written for it, Apache-2.0."""

from __future__ import annotations

from importlib.resources import as_file, files

from .readers import read_prompts
from .types import Bucket, Prompt


def starter_prompts() -> tuple[Prompt, ...]:
    """All three buckets, 156 prompts each. An edit prompt and its unsafe contrasts share a group (a focus)."""
    return (
        *_read("edit", Bucket.EDIT),
        *_read("benign_keep", Bucket.BENIGN_KEEP),
        *_read("harmful_keep", Bucket.HARMFUL_KEEP),
    )


def organism_prompts() -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(refuse, answer): what a model organism of over-refusal is taught to refuse, and what it is to go on answering.

    None of them stands in the starter set, so an organism made with them has not seen the prompts of a run.
    """
    return _read("organism_refuse", Bucket.HARMFUL_KEEP), _read("organism_answer", Bucket.BENIGN_KEEP)


def _read(name: str, bucket: Bucket) -> tuple[Prompt, ...]:
    with as_file(files(__package__) / "starter" / f"{name}.jsonl") as path:
        return read_prompts(path, bucket)
