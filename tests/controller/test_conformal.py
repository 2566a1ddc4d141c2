"""Conformal p-values: valid on exchangeable prompts, one with the gate that follows from them, kept with the controller."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from paving.chat import describe
from paving.controller import ControllerError, PavedModel, Reference, load_controller, save_controller
from paving.controller.conformal import reference_of
from paving.controller.gates import Conformal, Hard
from paving.prompts.types import Bucket, Prompt
from paving.router_search import search_router
from paving.run import evaluate, train
from paving.training.gate_search import GateSearch
from tiny_models import batch_of, lively, some_prompts
from tiny_runs import WordJudge, tiny_run

LOGITS = st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=40)
ALPHA = st.floats(0.01, 0.99)


def alike(*logits):
    """Both kinds of keeps score so, and the one edit prompt below whatever is asked about."""
    keeps = tuple(sorted(logits))
    return Reference((-1e6,), keeps, keeps)


def harmful(*logits):
    return Reference((), (), tuple(sorted(logits)))


@given(LOGITS, ALPHA)
def test_of_exchangeable_prompts_no_more_than_alpha_get_a_p_value_that_low(logits, alpha):
    """The conformal guarantee, exactly: each of n + 1 prompts is as likely the new one."""
    low = 0
    for i, logit in enumerate(logits):
        rest = logits[:i] + logits[i + 1 :]
        p = harmful(*rest).p_values(logit).harmful_keep if rest else 1.0
        low += p <= alpha
    assert low <= alpha * len(logits)


@given(LOGITS, LOGITS, LOGITS, ALPHA, st.floats(-9, 9, width=32))
@example([5.0], [0.0] * 20, [0.0] * 20, 0.5, 4.0)  # above every keep, and below every edit prompt
def test_the_gate_opens_on_the_verdict_edit_and_on_nothing_else(edit, benign, keeps, alpha, logit):
    reference = Reference(*(tuple(sorted(x)) for x in (edit, benign, keeps)))
    try:
        policy = reference.policy(alpha)
    except ValueError as error:
        assert "needs" in str(error) and min(len(benign), len(keeps)) + 1 < 1 / alpha + 1e-9
        assert not any(reference.verdict(at, alpha) == "edit" for at in (logit, *edit, *benign, *keeps))
        return
    for at in (logit, *edit, *benign, *keeps):
        opens = bool(policy.gate(torch.tensor([at], dtype=torch.float32), None)[0])
        assert opens == (reference.verdict(at, alpha) == "edit")


def test_p_values_and_verdicts_by_hand():
    reference = Reference(edit=(1.0, 2.0, 3.0), benign_keep=(-5.0,), harmful_keep=(-2.0, -1.0, 0.0, 1.0))
    assert reference.p_values(1.0) == (0.5, 0.5, 0.4)  # ties count against either side
    assert reference.p_values(5.0) == (1.0, 0.5, 0.2)
    assert reference.p_values(-9.0) == (0.25, 1.0, 1.0)
    assert [reference.verdict(x, 0.5) for x in (5.0, 0.5, -9.0)] == ["edit", "abstain", "keep"]  # 0.5: like neither
    assert [reference.verdict(x, 0.3) for x in (5.0, 0.5, -9.0)] == ["abstain", "keep", "keep"]  # benign: n = 1, p ≥ 0.5
    assert harmful(0.0).p_values(1.0) == (None, None, 0.5)
    assert Reference((0.0,), (), ()).verdict(9.0, 0.5) == "abstain"  # of keeps nothing is known
    with pytest.raises(ValueError, match="needs 1 groups of harmful_keep prompts in calibration; there are 0"):
        Reference((0.0,), (0.0,), ()).policy(0.5)
    with pytest.raises(ValueError, match="needs edit prompts in calibration"):
        Reference((), (0.0,), (0.0,)).policy(0.5)


def test_a_gate_that_learned_from_its_calibration_prompts_shows_p_values_and_makes_no_gate_of_them():
    reference = Reference((0.0,), (0.0,), (0.0,), apart=False)
    assert reference.p_values(1.0).harmful_keep == 0.5
    with pytest.raises(ValueError, match="searched for with its calibration prompts"):
        reference.policy(0.5)


def test_too_few_prompts_and_alphas_that_are_none_are_one_clear_error(backbone):
    with pytest.raises(ValueError, match=r"0.05 needs 19 groups of harmful_keep prompts in calibration; there are 2,"):
        alike(0.0, 1.0).policy(0.05)
    assert alike(*range(19)).policy(0.05) == Conformal(0.05, 18)
    for n in (1, 2, 28, 29):  # the lowest alpha that the message names is one that can be had
        with pytest.raises(ValueError, match="at the lowest") as told:
            alike(*range(n)).policy(0.9 / (n + 1))
        assert alike(*range(n)).policy(float(str(told.value).split("can show ")[1].split()[0]))
    with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
        alike(0.0).policy(1.0)
    controller = replace(lively(backbone), reference=alike(0.0))
    with pytest.raises(ValueError, match=r"'often' is no number; write for example conformal:0.05"):
        controller.policy_named("conformal:often")
    with pytest.raises(ValueError, match="before calibration logits were kept"):
        lively(backbone).policy_named("conformal:0.5")
    with pytest.raises(ValueError, match="conformal:ALPHA"):
        controller.policy_named("conformal")


def test_a_group_counts_once_by_its_worst_logit():
    rows = [
        ("a", Bucket.EDIT, 3.0), ("a", Bucket.EDIT, 1.0), ("b", Bucket.EDIT, 2.0),
        ("a", Bucket.HARMFUL_KEEP, -1.0), ("a", Bucket.HARMFUL_KEEP, 0.5),
    ]  # fmt: skip
    prompts = [Prompt(f"p{i}", "x", bucket, group=group) for i, (group, bucket, _) in enumerate(rows)]
    assert reference_of([logit for *_, logit in rows], prompts) == Reference((1.0, 2.0), (), (0.5,))
    boundary = [0.1, 0.5, 0.2, 0.9, 0.3]
    assert reference_of([logit for *_, logit in rows], prompts, boundary=boundary).boundary == (0.2, 0.9)
    with pytest.raises(ValueError, match="zip"):
        reference_of([logit for *_, logit in rows], prompts, boundary=[0.1])


def test_it_is_saved_with_the_controller_and_names_its_policy(backbone, tmp_path):
    reference = Reference((0.1, 2.5), (-3.0, -2.0), (-1.5, -0.1), boundary=(0.5, 1.25))
    controller = replace(lively(backbone, policy=Hard(0.7)), reference=reference)
    controller = controller.with_policy(controller.policy_named(f"conformal:{1 / 3!r}"))
    loaded = load_controller(save_controller(controller, tmp_path), backbone)
    assert (loaded.reference, loaded.policy) == (reference, controller.policy)
    assert loaded.policy.threshold == pytest.approx(0.1) and loaded.policy_named("hard") == Hard(0.7)
    assert load_controller(save_controller(lively(backbone), tmp_path / "old"), backbone).reference is None
    path = tmp_path / "controller.json"
    for damage in (
        {"edit": [2.0, 1.0]},
        {"edit": "x"},
        {"edit": None},
        {"boundary": [2, 1]},
        {"apart": None},
        {"apart": "false"},
    ):
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["reference"] |= damage
        path.with_name("x").mkdir(exist_ok=True)
        (tmp_path / "x" / "controller.json").write_text(json.dumps(saved), encoding="utf-8")
        (tmp_path / "x" / "controller.safetensors").write_bytes((tmp_path / "controller.safetensors").read_bytes())
        with pytest.raises(ControllerError, match="calibration logits are damaged"):
            load_controller(tmp_path / "x", backbone)


def test_another_policy_and_back_keeps_the_calibrated_threshold(backbone):
    controller = replace(lively(backbone, policy=Hard(0.7)), reference=alike(-1.0, 3.0))
    model = PavedModel(backbone, controller).set_policy("conformal:0.5")
    assert model.controller.policy == Conformal(0.5, 3.0, calibrated=0.7)
    assert model.set_policy("soft").set_policy("conformal:0.5").controller.policy.calibrated == 0.7
    with pytest.raises(ValueError, match="leave `threshold` out"):
        model.set_policy("conformal:0.5", threshold=1.0)
    assert model.set_policy("hard").controller.policy == Hard(0.7)


def test_a_turn_shows_its_p_values(backbone):
    controller = replace(lively(backbone), reference=Reference((0.0,), (), (-1e9,)))
    row = PavedModel(backbone, controller).gates(batch_of(backbone, some_prompts()[:1]).input_ids)[0]
    assert "p(benign keep) n/a, p(harmful keep) 0.500" in describe(row, controller.reference)
    assert "p(" not in describe(row)


def test_a_run_and_its_searched_gate_have_one_of_their_own(tmp_path):
    config, means = tiny_run(tmp_path)
    trained = train(config, tmp_path / "run", means, WordJudge())
    assert trained.reference.apart
    assert trained.reference.edit and trained.reference.harmful_keep and trained.reference.benign_keep
    metrics = evaluate(tmp_path / "run", means, judge=WordJudge(), policies=["conformal:0.5"])
    assert "conformal:0.5" in {row.name for row in metrics.rows}
    assert evaluate(tmp_path / "run", means, judge=WordJudge()) == metrics  # the row stays, as what it is
    settings = GateSearch(layers=((1,),), poolings=("last",), kernels=("linear",), contrast="none", folds=2, shuffles=1)
    search_router(tmp_path / "run", tmp_path / "new", settings, means)
    backbone = means.load(config.model, config.dtype)
    searched = load_controller(tmp_path / "new" / "controller", backbone)
    assert not searched.reference.apart
    assert len(searched.reference.edit) > len(trained.reference.edit)  # training prompts count, out of fold
