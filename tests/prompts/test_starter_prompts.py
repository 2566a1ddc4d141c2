"""The prompts that come with the package: complete, paired, and free of leakage as shipped."""

import pytest

from paving.prompts import (
    Bucket,
    SplitSizes,
    contrast_prompts,
    count_by_bucket,
    find_leakage,
    organism_prompts,
    split_prompts,
    starter_prompts,
)
from paving.prompts.leakage import near_pairs, normalised


@pytest.fixture(scope="module")
def prompts():
    return starter_prompts()


def test_each_bucket_has_156_prompts_with_ids_of_their_own(prompts):
    assert count_by_bucket(prompts) == {bucket.value: 156 for bucket in Bucket}
    everything = [*prompts, *organism_prompts()[0], *organism_prompts()[1]]
    assert len({p.id for p in everything}) == len(everything)


def test_every_harmful_prompt_shares_its_focus_with_an_edit_prompt(prompts):
    focus = {bucket: {p.group for p in prompts if p.bucket == bucket} for bucket in Bucket}
    assert focus[Bucket.HARMFUL_KEEP] <= focus[Bucket.EDIT]
    assert not focus[Bucket.BENIGN_KEEP] & focus[Bucket.EDIT]
    assert all(p.group != p.id for p in prompts)  # a focus was given for every row


def test_prompts_are_short(prompts):
    refuse, answer = organism_prompts()
    assert [p.id for p in (*prompts, *refuse, *answer) if len(p.text) >= 300] == []


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_starter_set_splits_without_leakage(prompts, seed):
    assert find_leakage(split_prompts(prompts, SplitSizes(), seed)).findings == ()


def test_the_organism_has_not_seen_the_starter_set(prompts):
    refuse, answer = organism_prompts()
    assert {p.bucket for p in refuse} == {Bucket.HARMFUL_KEEP} and {p.bucket for p in answer} == {Bucket.BENIGN_KEEP}
    starter, organism = list(prompts), [*refuse, *answer]
    everything = starter + organism
    pairs = near_pairs([normalised(p.text) for p in everything])
    assert [(everything[i].id, everything[j].id) for i, j in pairs if i < len(starter) <= j] == []


def test_contrasts_are_pairs_on_focus_words_of_their_own(prompts):
    contrasts = contrast_prompts()
    safe, unsafe = ({p.group: p for p in contrasts if p.bucket == b} for b in (Bucket.EDIT, Bucket.HARMFUL_KEEP))
    assert safe.keys() == unsafe.keys() and len(safe) == 799 and len(contrasts) == 1598
    assert not safe.keys() & {p.group for p in prompts}
    assert len(safe) + len({p.group for p in prompts if p.bucket == Bucket.EDIT}) >= 300
    assert len({p.id for p in (*prompts, *contrasts)}) == len(prompts) + 1598


def test_contrasts_are_not_told_apart_by_their_form():
    contrasts = contrast_prompts()
    pairs = list(zip(contrasts[:799], contrasts[799:], strict=True))
    assert [s.group for s, u in pairs if s.text.split()[0] != u.text.split()[0] or s.text[-1] != u.text[-1]] == []
    longer = sum((s > u) + 0.5 * (s == u) for s, _ in lengths(pairs) for _, u in lengths(pairs))
    assert 0.45 < longer / 799**2 < 0.55  # the AUC of length alone


def lengths(pairs):
    return [(len(s.text), len(u.text)) for s, u in pairs]


def test_no_contrast_is_nearly_a_starter_prompt_or_another_contrast(prompts):
    everything = [*prompts, *contrast_prompts(), *organism_prompts()[0], *organism_prompts()[1]]
    pairs = near_pairs([normalised(p.text) for p in everything])
    assert [
        (everything[i].id, everything[j].id) for i, j in pairs if "contrast" in everything[i].id + everything[j].id
    ] == []
