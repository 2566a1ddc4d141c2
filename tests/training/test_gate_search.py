"""The search for a gate: nothing scores a prompt whose group it has seen, and thresholds keep to what may leak."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import SVC

from paving.prompts.contrasts import groups_near
from paving.prompts.types import Bucket, Prompt
from paving.traces.prompt_states import PromptStates
from paving.training import gate_search
from paving.training.gate_search import GateSearch, default_layers, folds_of, search_gate, threshold_at

D, N_LAYERS = 5, 4
FAST = GateSearch(poolings=("last",), kernels=("linear", "rbf"), folds=3, shuffles=1)


def prompts_of(n: int, *, offset: int = 0, buckets=tuple(Bucket)) -> list[Prompt]:
    return [
        Prompt(f"{offset}-{b.value}-{i}", f"{b} {offset} {i}", b, group=f"{offset}-g{i // 2}")
        for i in range(n)
        for b in buckets
    ]


def states_of(prompts, *, told_by: int, seed: int = 0, apart: float = 3.0) -> dict[str, PromptStates]:
    """States in which only layer `told_by` knows the bucket."""
    rng = torch.Generator().manual_seed(seed)
    centre = {b: apart * torch.randn(D, generator=rng) for b in Bucket}
    found = {}
    for p in prompts:
        last = torch.randn(N_LAYERS, D, generator=rng)
        last[told_by] += centre[p.bucket]
        found[p.id] = PromptStates(last=last, mean=torch.randn(N_LAYERS, D, generator=rng))
    return found


def test_the_layer_that_knows_is_found_and_keeps_stay_closed():
    prompts = prompts_of(30)
    found = search_gate(states_of(prompts, told_by=2), prompts, {}, FAST, [(0,), (2,), (3,)])
    assert found.layers == (2,) and found.tried[0].auc > 0.95 > found.tried[-1].auc
    assert [s.closes_on for s in found.shapes] == ["harmful_keep", "benign_keep", "unlike"]
    assert found.opened["edit"] > 0.8 and found.opened["harmful_keep"] <= 0.02 and found.opened["benign_keep"] <= 0.03
    assert found.why().startswith(f"{found.tried[0].kernel} machine on last, blocks 2, contrast pairs: none;")
    assert len(found.tried) == 6


def test_the_gate_closes_on_what_is_like_nothing_it_has_seen():
    prompts = prompts_of(30)
    states = states_of(prompts, told_by=2)
    strange = Prompt("strange", "far away", Bucket.EDIT, group="far")
    states["strange"] = PromptStates(last=100 * torch.randn(N_LAYERS, D), mean=torch.zeros(N_LAYERS, D))
    judged, unjudged = (
        search_gate(states, prompts, {}, FAST.model_copy(update={"unlike": share, "kernels": ("linear",)}), [(2,)])
        for share in (0.1, None)
    )
    assert (len(judged.machines), len(unjudged.machines)) == (3, 2)
    machine = judged.machines[-1]
    x = torch.from_numpy(gate_search.features(states, [*prompts, strange], (2,), "last"))
    assert machine(x)[-1] < 0
    logits = gate_search.likeness(states, prompts, (2,), "last", 0.1)[2]
    assert (logits[[p.bucket is Bucket.EDIT for p in prompts]] <= 0).sum() == 3  # a tenth of 30
    known = [i for i, p in enumerate(prompts) if p.bucket is not Bucket.BENIGN_KEEP]
    assert (machine(x)[known] > 0).all()  # what it was fitted on is at no distance from itself


def test_copies_in_other_clothes_are_looked_through_once_they_were_seen():
    prompts, new = prompts_of(40), prompts_of(10, offset=1)
    copies, strangers = ([replace(p, id=f"{p.id} (worn)") for p in some] for some in (prompts, new))
    # Clothes move a state farther than any two prompts are apart, and their direction says nothing of the bucket.
    states = states_of([*prompts, *copies, *new, *strangers], told_by=2)
    away = torch.zeros(N_LAYERS, D)
    away[2] = 30.0
    for p in (*copies, *strangers):
        states[p.id] = PromptStates(last=states[p.id].last + away, mean=states[p.id].mean)
    settings = FAST.model_copy(update={"kernels": ("rbf",)})
    bare = search_gate(states, prompts, {}, settings, [(2,)])
    worn = search_gate(states, prompts, {}, settings, [(2,)], dressed=copies)

    def opens(found, some, bucket):
        x = torch.from_numpy(gate_search.features(states, [p for p in some if p.bucket is bucket], (2,), "last"))
        return float((torch.stack([m(x) for m in found.machines]).amin(0) > 0).float().mean())

    assert opens(bare, new, Bucket.EDIT) > 0.8 and opens(bare, strangers, Bucket.EDIT) == 0
    assert opens(worn, new, Bucket.EDIT) > 0.8 and opens(worn, strangers, Bucket.EDIT) > 0.8
    for keep in (Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP):
        assert opens(worn, new, keep) <= 0.1 and opens(worn, strangers, keep) <= 0.1
    assert bare.dressed is None and worn.tried == bare.tried
    assert worn.dressed["edit"] > 0.8 and worn.dressed["harmful_keep"] <= 0.04 and worn.opened["harmful_keep"] <= 0.04
    both = worn.logits[:, [p.bucket is Bucket.HARMFUL_KEEP for p in (*prompts, *copies)]]
    assert worn.logits.shape == (1, 240) and (both > 0).mean() <= settings.harmful


def test_in_clothes_no_mean_over_the_prompt_is_read_unless_asked_for():
    assert GateSearch().poolings == ("last", "last+mean") and GateSearch(clothes=2).poolings == ("last",)
    asked = GateSearch(clothes=2, poolings=("mean",))
    assert asked.poolings == ("mean",) and GateSearch.model_validate_json(asked.model_dump_json()) == asked


def test_contrast_pairs_are_used_where_they_help():
    prompts = prompts_of(24)
    pairs = prompts_of(300, offset=1, buckets=(Bucket.EDIT, Bucket.HARMFUL_KEEP))
    states = states_of([*prompts, *pairs], told_by=1, seed=1, apart=0.6)
    settings = FAST.model_copy(update={"kernels": ("linear",)})
    found = search_gate(states, prompts, {"pairs": pairs}, settings, [(0, 1, 2, 3)])
    auc = {t.contrast: t.partial_auc for t in found.tried}
    assert auc["pairs"] > auc["none"] + 0.05
    assert found.tried[0].contrast == "pairs" and "contrast pairs: pairs" in found.why()


def test_no_prompt_is_scored_by_what_has_seen_its_group(monkeypatch):
    prompts = prompts_of(12)
    # Groups as the prompts', but for case; and pairs of another focus, drafted from a prompt's own words.
    pairs = [Prompt(f"c{i}", f"pair {i}", Bucket.EDIT, group=f"0-G{i}") for i in range(6)]
    drafted = [Prompt(f"d{i}-safe", prompts[i].text.upper(), Bucket.EDIT, group=f"word {i}") for i in range(6)]
    states = states_of([*prompts, *pairs, *drafted], told_by=0)
    group_of = {states[p.id].last[0].numpy().tobytes(): p.group.casefold() for p in [*prompts, *pairs]}
    group_of |= {states[d.id].last[0].numpy().tobytes(): p.group.casefold() for d, p in zip(drafted, prompts, strict=False)}

    class Spy:
        def fit(self, x, y):
            self.seen = {group_of[row.tobytes()] for row in x}
            return self

        def decision_function(self, x):
            assert not self.seen & {group_of[row.tobytes()] for row in x}
            return np.zeros(len(x))

    class Unscaled:
        def fit(self, x):
            return self

        def transform(self, x):
            return x

    monkeypatch.setattr(gate_search, "machine_of", lambda *_: Spy())
    monkeypatch.setattr(gate_search, "StandardScaler", Unscaled)
    read = ((0,), "last", "linear")
    near = groups_near([*pairs, *drafted], prompts)
    gate_search.out_of_fold(states, prompts, near, Bucket.HARMFUL_KEEP, read, FAST)


def test_the_rbf_machine_is_sklearns():
    rng = np.random.default_rng(0)
    x, asked = rng.standard_normal((60, 7)).astype(np.float32), rng.standard_normal((9, 7)).astype(np.float32)
    labels = x[:, 0] + 0.3 * rng.standard_normal(60) > 0
    ours = gate_search.machine_of("rbf", 7).fit(x, labels)
    theirs = SVC(C=gate_search.C_RBF, gamma=1 / 7, class_weight="balanced").fit(x, labels)
    assert np.allclose(ours.decision_function(asked), theirs.decision_function(asked), atol=1e-10)
    order = [np.lexsort(m.support_vectors_.T) for m in (ours, theirs)]
    assert np.array_equal(ours.support_vectors_[order[0]], theirs.support_vectors_[order[1]])
    assert np.allclose(ours.dual_coef_[0, order[0]], theirs.dual_coef_[0, order[1]]) and ours.intercept_ == pytest.approx(
        theirs.intercept_
    )


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=60), st.floats(0.001, 0.999))
def test_no_more_than_the_allowed_share_opens(scores, share):
    values = np.array(scores)
    threshold = threshold_at(values, share)
    assert (values > threshold).mean() <= share
    lower = values[values < threshold]
    if len(lower):  # one step lower, and more would open
        assert (values > lower.max()).mean() > share


@given(st.lists(st.integers(0, 9), min_size=1, max_size=50), st.integers(2, 5), st.integers(0, 99))
def test_folds_keep_groups_whole(numbers, folds, seed):
    groups = [f"g{n}" for n in numbers]
    found = folds_of(groups, folds, seed)
    assert all(len({f for f, g in zip(found, groups, strict=True) if g == name}) == 1 for name in groups)
    assert set(found) <= set(range(folds))


def test_too_few_groups_are_refused():
    prompts = prompts_of(4)
    with pytest.raises(ValueError, match="2 groups of edit prompts are too few for 3 folds"):
        search_gate(states_of(prompts, told_by=0), prompts, {}, FAST, [(0,)])


def test_default_layers_stand_in_the_middle_at_any_depth():
    assert default_layers(30) == ((8, 12, 16), (12, 16, 20), (16, 20, 24), (14, 16, 18), (16,))
    for n in (2, 3, 12, 80):
        assert all(0 <= layer < n for layers in default_layers(n) for layer in layers)
        assert all(len(set(layers)) == len(layers) for layers in default_layers(n))
