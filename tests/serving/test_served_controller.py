"""A controller in vLLM answers as it does in transformers: per request, in any batch, in chunks and after preemption."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these in an environment of its own")

from asked_engine import served, tokens
from served_answers import EARLY, LATE, SHIPPED, TEXTS, controller_of, expected, gates_of

from paving.backbone import EMBEDDED, Backbone, load_backbone, render_ids
from paving.controller import save_controller


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone(EMBEDDED, dtype="float32")


@pytest.fixture(scope="module")
def prompts(backbone) -> list[list[int]]:
    return [render_ids(backbone, text) for text in TEXTS]


def test_open_rows_are_as_in_transformers_and_closed_rows_have_plain_vllms_bits(backbone, prompts, tmp_path):
    controller = controller_of(backbone, EARLY)
    folder = save_controller(controller, tmp_path / "c")
    n = len(TEXTS)
    mixed = [("closed", None, "soft")[i % 3] for i in range(n)]
    by = {policy: expected(backbone, controller, policy) for policy in ("closed", None, "soft")}
    # What edited answers leave in the prefix cache must not be met by a later prompt that repeats them.
    longer = [p + answer for p, answer in zip(prompts, by[None], strict=True)]
    found, _ = served(
        tmp_path, folder, [(prompts, ["closed"] * n), (prompts, [None] * n), (prompts, mixed), (longer, ["closed"] * n)]
    )
    rounds = [(prompts, [None] * n), (prompts, [None] * n), (longer, [None] * n)]
    (plain, plain_again, plain_longer), _ = served(tmp_path, None, rounds)
    assert found[0] == plain and tokens(found[3]) == tokens(plain_longer)
    shut = [i for i, row in enumerate(gates_of(backbone, controller)) if row.gate == 0]
    assert 0 < len(shut) < n and all(found[1][i] == plain_again[i] for i in shut)  # by the learned gate, beside open rows
    for a, b in zip(found[3], plain_longer, strict=True):
        assert a["log_probs"] == pytest.approx(b["log_probs"], abs=1e-3)  # edited states would be off by whole nats
    assert tokens(found[1]) == by[None]
    assert sum(a != b for a, b in zip(by[None], by["closed"], strict=True)) == n // 2
    assert sum(a != b for a, b in zip(by["soft"], by["closed"], strict=True)) > n // 2
    assert tokens(found[2]) == [by[policy][i] for i, policy in enumerate(mixed)]


@pytest.mark.parametrize("config", [EARLY, SHIPPED], ids=["early", "as shipped"])
def test_in_bfloat16_too_a_closed_row_has_plain_vllms_bits_beside_open_ones(backbone, prompts, tmp_path, config):
    controller = controller_of(backbone, config)
    folder = save_controller(controller, tmp_path / "c")
    n = len(TEXTS)
    policies = ["closed" if i % 2 else "soft" for i in range(n)]
    (found,), _ = served(tmp_path, folder, [(prompts, policies)], dtype="bfloat16", enable_prefix_caching=False)
    (plain,), _ = served(tmp_path, None, [(prompts, [None] * n)], dtype="bfloat16", enable_prefix_caching=False)
    assert [found[i] == plain[i] for i in range(n)] == [policy == "closed" for policy in policies]


@pytest.mark.parametrize("config", [EARLY, LATE, SHIPPED], ids=["early", "late", "as shipped"])
def test_chunked_prompts_and_preempted_answers_are_as_whole_ones(backbone, prompts, tmp_path, config):
    controller = controller_of(backbone, config)
    folder = save_controller(controller, tmp_path / "c")
    # Chunks of 16 tokens, and so few blocks that requests push each other out and begin again.
    policies = ["closed" if i in (3, 4) else None for i in range(len(TEXTS))]  # closed rows beside open ones
    # All that runs is pushed out and begins again, once with prompts half read and once in the middle of answers.
    options = {"max_num_batched_tokens": 16} | ({"enable_prefix_caching": False} if config is SHIPPED else {})
    (found,), said = served(tmp_path, folder, [(prompts, policies)], preempt_at=(4, 30), **options)
    assert set(said["preempted"]) == {4, 30}
    by = {policy: expected(backbone, controller, policy) for policy in ("closed", None)}
    assert tokens(found) == [by[policy][i] for i, policy in enumerate(policies)]
    assert sum(by[None][i] != by["closed"][i] for i, policy in enumerate(policies) if policy is None) >= 2


def test_requests_that_are_given_up_leave_nothing_behind_and_change_no_other(backbone, prompts, tmp_path):
    controller = controller_of(backbone, EARLY)
    folder = save_controller(controller, tmp_path / "c")
    n = len(TEXTS)
    # In the first step, while prompts are read, and again in the middle of answers.
    rounds = [(prompts, [None] * n), (prompts[:1], ["closed"])]
    (found, _), said = served(tmp_path, folder, rounds, abort_at={1: [0, 3], 12: [1]}, max_num_batched_tokens=32)
    by = expected(backbone, controller, None)
    assert tokens(found) == [by[i] for i in range(n) if i not in (0, 2, 3)]  # the second time, place 1 was request 2
    assert len(said["held"]) <= 1


@pytest.mark.parametrize("what", ["another base", "damaged"])
def test_what_cannot_be_served_refuses_to_start(backbone, prompts, tmp_path, what):
    controller = controller_of(backbone, EARLY)
    folder = save_controller(controller, tmp_path / "c")
    path = folder / "controller.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    if what == "damaged":
        del said["scale"]
    else:
        said["base"]["fingerprint"] = "0" * 16
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(AssertionError, match="lacks scale" if what == "damaged" else "Serve that base"):
        served(tmp_path, folder, [(prompts[:1], [None])])
