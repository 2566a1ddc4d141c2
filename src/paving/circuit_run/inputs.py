"""What a circuit run reads: pairs, opening phrases, prompts for generation, and the base's own benign answers."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from paving.backbone import Backbone, prompt_ids
from paving.circuit.pairs import Pair, categories_in, read_pairs, split_pairs
from paving.circuit_run.config import CircuitConfig
from paving.evaluation.refusal_policy import BENIGN, CATEGORY, OOD_BENIGN, PromptSet
from paving.generation import Decoding, generate, load_completions, save_completions
from paving.intervention import Identity
from paving.prompts.leakage import drop_exact_duplicates, group_near_duplicates, near_or_equal, normalised
from paving.prompts.readers import read_prompts
from paving.prompts.starter_set import starter_prompts
from paving.prompts.types import Bucket, Prompt
from paving.run import Means
from paving.run_folder import STARTER, RunError, write_json
from paving.training.opening_examples import Example
from paving.training.openings import Openings, openings, read_openings


def pairs_of(config: CircuitConfig) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(train, calibration). raises CircuitError for a category without pairs, or too few."""
    pairs = read_pairs(config.pairs, config.category, benign=config.benign, limit=config.limit)
    return split_pairs(pairs, config.calibration, config.seed)


def also_benign(config: CircuitConfig) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """(train, calibration) of the benign prompts that are no side of a pair.

    A group stands in one of the two, near duplicates are one group, and what is worded as a side of a pair is left out.
    """
    if config.also_benign is None:
        return (), ()
    if config.also_benign == STARTER:
        found = tuple(p for p in starter_prompts() if p.bucket is Bucket.EDIT)
    else:
        found = read_prompts(config.also_benign, Bucket.BENIGN_KEEP)
    prompts, _ = drop_exact_duplicates(replace(p, id=f"also/{p.id}", bucket=Bucket.BENIGN_KEEP) for p in found)
    sides = [text for split in pairs_of(config) for p in split for text in (p.harmful, p.benign)]
    known = near_or_equal([p.text for p in prompts], sides)
    prompts = group_near_duplicates(p for p in prompts if p.text not in known)
    groups = sorted({p.group for p in prompts})
    if len(groups) < 2:
        raise RunError(
            f"{config.also_benign} holds {len(groups)} groups of prompts; some train and some choose α, so that at least "
            "two are needed. Give more prompts, or leave it out."
        )
    chosen = set(random.Random(config.seed).sample(groups, max(1, len(groups) // 5)))
    train, calibration = ([p for p in prompts if (p.group in chosen) == side] for side in (False, True))
    return tuple(train), tuple(calibration)


def run_pairs(config: CircuitConfig, folder: Path) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """(train, calibration) of a run that `find` began. raises RunError where they are no longer the pairs it began with:
    what was trained on would choose α."""
    splits = pairs_of(config)
    path = folder / "split.json"
    if not path.exists():
        raise RunError(f"{folder} does not say which pairs it began with. Ask for its circuit again: paving circuit find")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged. Remove it if {config.pairs} is what the run began with.") from error
    if recorded != split_record(splits, also_benign(config)):
        changed = config.pairs if config.also_benign is None else f"{config.pairs} or {config.also_benign}"
        raise RunError(
            f"{changed} has changed since the circuit in {folder} was found, and with it which pairs train and which "
            "choose α. Put the file back as it was, or begin anew in another folder; nothing was changed."
        )
    return splits


def record_split(config: CircuitConfig, folder: Path, means: Means) -> None:
    """Which pairs train and which choose α, by id and digest of the text, in `folder`/split.json. raises as `run_pairs`"""
    if (folder / "split.json").exists():
        run_pairs(config, folder)
    else:
        if (folder / "circuit.json").exists():
            means.say(f"{folder} was begun before pairs were recorded: {config.pairs} is taken for what it began with")
        write_json(folder / "split.json", split_record(pairs_of(config), also_benign(config)))


def split_record(
    splits: tuple[Sequence[Pair], Sequence[Pair]], also: tuple[Sequence[Prompt], Sequence[Prompt]] = ((), ())
) -> dict[str, list[list[str]]]:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    names = ("train", "calibration")
    pairs = {n: [[p.id, digest(f"{p.harmful}\0{p.benign}")] for p in of] for n, of in zip(names, splits, strict=True)}
    further = {
        f"also {n}": [[p.id, digest("\0".join(p.asked))] for p in of] for n, of in zip(names, also, strict=True) if of
    }
    return pairs | further


def openings_of(config: CircuitConfig) -> Openings:
    return openings() if config.openings is None else read_openings(config.openings)


def harmful_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return [Prompt(f"{p.id}/harmful", p.harmful, Bucket.HARMFUL_KEEP, group=p.id) for p in pairs]


def benign_prompts(pairs: Sequence[Pair]) -> list[Prompt]:
    return [Prompt(f"{p.id}/benign", p.benign, Bucket.BENIGN_KEEP, group=p.id) for p in pairs]


def held_out_sets(
    config: CircuitConfig, ood: Mapping[str, str], ood_benign: Mapping[str, str] | None = None
) -> tuple[list[PromptSet], int]:
    """(sets, how many prompts were left out): the category first, then benign prompts, other categories, other sources.

    ood, ood_benign  name of the set -> prompt file or dataset; the benign are judged as such
    What stands among the run's own pairs, in either split and on either side, or is nearly worded as one of them on its
    own side, is left out: the edit was trained or its α chosen on it, and public sets repeat themselves. A benign prompt
    may be worded as a harmful one: telling them apart is what is measured.

    raises RunError without held-out pairs, if nothing of a set is left, or for two sets of one name
    """
    if config.held_out is None:
        raise RunError(
            "this run has no held-out pairs: what the calibration split shows, α was chosen on. "
            "Give some: paving circuit evaluate RUN --held-out FILE (pairs of the same layout)."
        )

    others = config.others_limit or config.held_out_limit

    def pairs(category: str, limit: int | None) -> tuple[Pair, ...]:
        return read_pairs(config.held_out, category, benign=config.benign, limit=limit)

    own = pairs(config.category, config.held_out_limit)
    sets = [PromptSet(config.category, CATEGORY, harmful_prompts(own)), PromptSet(BENIGN, BENIGN, benign_prompts(own))]
    for name in categories_in(config.held_out, benign=config.benign):
        if name != config.category:
            sets.append(PromptSet(name, "other", harmful_prompts(pairs(name, others))))
    for name, source in ood.items():
        sets.append(PromptSet(name, "ood", read_prompts(source, Bucket.HARMFUL_KEEP, limit=others)))
    for name, source in (ood_benign or {}).items():
        sets.append(PromptSet(name, OOD_BENIGN, read_prompts(source, Bucket.BENIGN_KEEP, limit=config.held_out_limit)))
    _check_names(sets)
    run_pairs = [p for split in pairs_of(config) for p in split]
    also = [p.text for split in also_benign(config) for p in split]
    harmful, benign = [p.harmful for p in run_pairs], [*(p.benign for p in run_pairs), *also]
    seen = {normalised(text) for text in (*harmful, *benign)}
    unseen = []
    for s in sets:
        near = near_or_equal([p.text for p in s.prompts], benign if s.side in (BENIGN, OOD_BENIGN) else harmful)
        kept = [p for p in s.prompts if p.text not in near and normalised(p.text) not in seen]
        unseen.append(replace(s, prompts=kept))
    for s in unseen:
        if not s.prompts:
            raise RunError(
                f"every held-out prompt of the set {s.name!r} stands in {config.pairs} too, so nothing of it is held out. "
                "Give prompts that the run has not seen."
            )
    return unseen, sum(len(s.prompts) for s in sets) - sum(len(s.prompts) for s in unseen)


def set_name(source: str) -> str:
    """What the prompts of a file or dataset are called in tables and folders."""
    return Path(source.partition("?")[0]).stem


def _check_names(sets: Sequence[PromptSet]) -> None:
    """A set's answers lie in a folder of its name: two of one name would be taken for each other."""
    for i, s in enumerate(sets):
        if not re.fullmatch(r"[\w][\w. -]*", s.name):
            raise RunError(f"a set of prompts is called {s.name!r}: rename the column or file, without slashes or signs.")
        if s.name.casefold() in {earlier.name.casefold() for earlier in sets[:i]}:
            raise RunError(
                f"two sets of prompts are called {s.name!r}. Categories, benign prompts and every --ood source need "
                "names of their own: rename the column or file."
            )


def own_answers(
    backbone: Backbone, config: CircuitConfig, train: Sequence[Pair], folder: Path, means: Means
) -> tuple[Example, ...]:
    """What the base answers to the benign side, for the retain term; none without one. Kept in own_answers.jsonl."""
    if config.arithmetic.retain == "none":
        return ()
    path = folder / "own_answers.jsonl"
    prompts = list({p.asked: p for p in (*benign_prompts(train), *also_benign(config)[0])}.values())
    if not path.exists():
        tick = means.stage("the base's own benign answers", len(prompts))
        decoding = Decoding(max_new_tokens=config.own_tokens)
        save_completions(generate(backbone, prompts, Identity(), decoding, tick=tick), path)
    answers = load_completions(path)
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = backbone.tokenizer(answer.response, add_special_tokens=False)["input_ids"]
        if tokens:
            rows.append(Example(prompt_ids(backbone, prompt), tokens))
    return tuple(rows)
