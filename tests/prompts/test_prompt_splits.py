"""Splitting: groups stay whole over all buckets, counts are met, and only prompts, sizes and seed matter."""

import os
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from paving.prompts import (
    Bucket,
    BucketSizes,
    Prompt,
    PromptError,
    SplitName,
    SplitSizes,
    count_by_bucket,
    restrict,
    split_prompts,
)


def prompts_of(bucket, n, group=None):
    return [
        Prompt(f"{bucket.value}-{i:03}", f"text {bucket.value} {i}", bucket, group(i) if group else f"{bucket.value}-{i}")
        for i in range(n)
    ]


def three_buckets(n, group=None):
    return [p for bucket in Bucket for p in prompts_of(bucket, n, group)]


def same(train=None, calibration=None, held_out=None):
    sizes = BucketSizes(train=train, calibration=calibration, held_out=held_out)
    return SplitSizes(edit=sizes, benign_keep=sizes, harmful_keep=sizes)


def counts(splits):
    return {name.value: count_by_bucket(splits.of(name)) for name in SplitName}


def each(n):
    return {bucket.value: n for bucket in Bucket}


@st.composite
def grouped_prompts(draw):
    """12 to 20 prompts a bucket, in groups of about one, two or five rows that all buckets draw from."""
    n_groups = draw(st.sampled_from([60, 30, 12]))
    n_rows = {bucket: draw(st.integers(12, 20)) for bucket in Bucket}
    return [
        Prompt(f"{bucket}-{i:02}", f"text {i}", bucket, f"g{draw(st.integers(0, n_groups))}")
        for bucket, n in n_rows.items()
        for i in range(n)
    ]


@st.composite
def any_sizes(draw):
    def one():
        train, calibration, held_out = (draw(st.integers(1, 4)) for _ in range(3))
        kind = draw(st.sampled_from(["fractions", "rest", "all"]))
        if kind == "fractions":
            return BucketSizes()
        return BucketSizes(train=train, held_out=held_out, calibration=calibration if kind == "all" else None)

    return SplitSizes(edit=one(), benign_keep=one(), harmful_keep=one())


@settings(max_examples=150, deadline=None)
@given(prompts=grouped_prompts(), sizes=any_sizes(), seed=st.integers(0, 5), shuffle=st.randoms())
def test_splits_are_disjoint_keep_groups_whole_and_do_not_depend_on_order(prompts, sizes, seed, shuffle):
    try:
        splits = split_prompts(prompts, sizes, seed)
    except PromptError as refused:  # some draws cannot be split, which is to be said in one of these two ways
        assert "no prompts are left" in str(refused) or "cannot be met" in str(refused)
        event("refused")
        return
    event("split")
    placed = [p for name in SplitName for p in splits.of(name)]
    assert len({p.id for p in placed}) == len(placed)
    assert set(placed) <= set(prompts)
    sides = defaultdict(set)
    for name in SplitName:
        for p in splits.of(name):
            sides[p.group].add(name)
    assert all(len(side) == 1 for side in sides.values())
    for bucket in Bucket:
        asked = sizes.of(bucket)
        largest = max(Counter(p.group for p in prompts if p.bucket == bucket).values())
        for name in SplitName:
            n = len(splits.of(name, bucket))
            assert n > 0
            if (count := getattr(asked, name.value)) is not None:
                assert count - largest < n <= count
    if sizes == SplitSizes():
        assert set(placed) == set(prompts)  # fractions leave nobody out
    shuffled = list(prompts)
    shuffle.shuffle(shuffled)
    assert split_prompts(shuffled, sizes, seed) == splits


@settings(max_examples=60, deadline=None)
@given(
    asked=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    spare=st.integers(0, 5),
    rest=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 3),
)
def test_counts_are_met_exactly_when_groups_have_one_row_a_bucket(asked, spare, rest, shared, seed):
    train, calibration, held_out = asked
    prompts = three_buckets(sum(asked) + spare, group=(lambda i: f"focus-{i}") if shared else None)
    splits = split_prompts(prompts, same(train, None if rest else calibration, held_out), seed)
    expected = calibration + spare if rest else calibration
    assert counts(splits) == {"train": each(train), "calibration": each(expected), "held_out": each(held_out)}
    assert len(splits.counts) == (0 if rest or not spare else 1)


def test_fractions_are_60_15_25():
    splits = split_prompts(three_buckets(100), SplitSizes(), 0)
    assert counts(splits) == {"train": each(60), "calibration": each(15), "held_out": each(25)}


def test_the_smallest_possible_set_splits():
    assert counts(split_prompts(three_buckets(3), SplitSizes(), 0)) == {name.value: each(1) for name in SplitName}


def test_buckets_that_share_groups_can_have_different_counts():
    prompts = prompts_of(Bucket.EDIT, 30, lambda i: f"focus-{i}") + prompts_of(
        Bucket.HARMFUL_KEEP, 30, lambda i: f"focus-{i}"
    )
    prompts += prompts_of(Bucket.BENIGN_KEEP, 9)
    sizes = SplitSizes(edit=BucketSizes(train=10, calibration=3, held_out=5), harmful_keep=BucketSizes(train=4, held_out=6))
    splits = split_prompts(prompts, sizes, 1)
    got = counts(splits)
    assert [got[name.value]["edit"] for name in SplitName] == [10, 3, 5]
    assert (got["train"]["harmful_keep"], got["held_out"]["harmful_keep"]) == (4, 6)
    (note,) = splits.counts
    assert note["before"]["edit"] == 30 and note["after"]["edit"] == 18


def test_a_large_group_gives_as_many_rows_as_fit_and_never_straddles():
    prompts = three_buckets(60, group=lambda i: f"g{i // 6}")  # 10 groups of 6, over all buckets
    splits = split_prompts(prompts, same(16, 4, 9), 0)
    assert counts(splits) == {"train": each(16), "calibration": each(4), "held_out": each(9)}


def test_groups_are_not_cut_when_that_would_leave_a_split_with_nothing():
    prompts = three_buckets(80, group=lambda i: f"g{i // 10}")  # 8 groups of 10; train 43 and held_out 24 would cut 2
    splits = split_prompts(prompts, same(train=43, held_out=24), 0)
    assert counts(splits) == {"train": each(40), "calibration": each(20), "held_out": each(20)}
    short = [note for note in splits.counts if note["filter"] == "size asked, size met"]
    assert [(n["split"], n["before"]["edit"], n["after"]["edit"]) for n in short] == [
        ("train", 43, 40),
        ("held_out", 24, 20),
    ]


def test_fractions_come_as_close_as_groups_allow():
    splits = split_prompts(three_buckets(100, group=lambda i: f"g{i // 5}"), SplitSizes(), 0)
    assert counts(splits) == {"train": each(60), "calibration": each(15), "held_out": each(25)}
    splits = split_prompts(three_buckets(100, group=lambda i: f"g{i // 7}"), SplitSizes(), 0)
    for name, target in zip(SplitName, (60, 15, 25), strict=True):
        assert all(abs(len(splits.of(name, bucket)) - target) < 7 for bucket in Bucket)


@pytest.mark.parametrize("seed", range(4))
def test_small_groups_fill_what_large_ones_leave(seed):
    prompts = three_buckets(100, group=lambda i: "large" if i < 22 else "middle" if i < 34 else f"g{i}")
    splits = split_prompts(prompts, SplitSizes(), seed)
    assert counts(splits) == {"train": each(60), "calibration": each(15), "held_out": each(25)}


def test_seeds_differ_and_a_seed_repeats():
    prompts = three_buckets(40)
    assert split_prompts(prompts, SplitSizes(), 0) == split_prompts(prompts, SplitSizes(), 0)
    assert split_prompts(prompts, SplitSizes(), 0).ids() != split_prompts(prompts, SplitSizes(), 1).ids()


def test_the_hash_seed_does_not_matter():
    program = (
        "from paving.prompts import *\n"
        "ps = [Prompt(f'{b}-{i}', 't', b, f'g{i // 2}') for b in Bucket for i in range(20)]\n"
        "print(split_prompts(ps, SplitSizes(), 0).ids())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "train" in outputs.pop()


def test_a_prefix_of_a_split_is_no_prefix_of_the_ids():
    ids = split_prompts(three_buckets(40), SplitSizes(), 0).ids()["train"]["edit"]
    assert ids != sorted(ids)


@pytest.mark.parametrize(
    ("prompts", "sizes", "message"),
    [
        (three_buckets(2), SplitSizes(), "edit has 2 prompts, too few for 3 splits"),
        (
            three_buckets(10),
            same(6, 2, 3),
            "edit has 10 prompts, but 11 are asked for: train 6, calibration 2, held_out 3",
        ),
        (three_buckets(10), same(6, None, 4), "but 11 are asked for.*calibration at least 1"),
        (prompts_of(Bucket.EDIT, 9), SplitSizes(), "benign_keep has 0 prompts"),
        (three_buckets(10, lambda i: "all"), SplitSizes(), "no prompts are left in calibration/edit"),
        (three_buckets(5) + prompts_of(Bucket.EDIT, 1), SplitSizes(), "1 ids stand for more than one prompt: edit-000"),
    ],
)
def test_what_cannot_be_split_is_said_with_numbers(prompts, sizes, message):
    with pytest.raises(PromptError, match=message):
        split_prompts(prompts, sizes, 0)


def test_counts_that_shared_groups_rule_out_are_an_error():
    shared = lambda i: f"focus-{i}"  # noqa: E731
    prompts = prompts_of(Bucket.EDIT, 10, shared) + prompts_of(Bucket.HARMFUL_KEEP, 10, shared)
    prompts += prompts_of(Bucket.BENIGN_KEEP, 5)
    sizes = SplitSizes(
        edit=BucketSizes(train=8, calibration=1, held_out=1),
        harmful_keep=BucketSizes(train=1, calibration=1, held_out=8),
    )
    with pytest.raises(PromptError, match=r"cannot be met without parting a group: got .*of 8"):
        split_prompts(prompts, sizes, 0)


@pytest.mark.parametrize("given_", [{"train": 5}, {"held_out": 5}, {"calibration": 5}, {"train": 5, "calibration": 1}])
def test_sizes_that_leave_the_rest_open_are_refused(given_):
    with pytest.raises(ValidationError, match="Give all three, or train and held_out"):
        BucketSizes(**given_)
    with pytest.raises(ValidationError):
        BucketSizes(**{**{"train": 5, "calibration": 5, "held_out": 5}, next(iter(given_)): 0})


def test_restrict_filters_and_records_before_and_after():
    splits = split_prompts(three_buckets(20), SplitSizes(), 0)
    dropped = splits.of(SplitName.TRAIN, Bucket.EDIT)[0]
    filtered = restrict(splits, lambda p: p != dropped, "base refuses")
    assert dropped not in filtered.train and len(filtered.train) == len(splits.train) - 1
    assert filtered.held_out == splits.held_out
    assert filtered.counts == (
        {"filter": "base refuses", "split": "train", "before": each(12), "after": each(12) | {"edit": 11}},
        {"filter": "base refuses", "split": "calibration", "before": each(3), "after": each(3)},
        {"filter": "base refuses", "split": "held_out", "before": each(5), "after": each(5)},
    )
    again = restrict(filtered, lambda p: True, "second")
    assert again.counts[:3] == filtered.counts and len(again.counts) == 6


def test_a_filter_that_empties_a_bucket_records_it():
    splits = split_prompts(three_buckets(20), SplitSizes(), 0)
    emptied = restrict(splits, lambda p: p.bucket != Bucket.EDIT, "base refuses")
    assert count_by_bucket(emptied.train) == each(12) | {"edit": 0}
    assert emptied.counts[0]["after"] == each(12) | {"edit": 0}
