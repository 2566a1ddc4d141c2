"""The controller of an engine, on made-up layer outputs: what it reads, decides, edits and forgets."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from paving.controller import Hard, Reference, Soft
from paving.controller.config import ControllerConfig
from paving.serving.served import CLOSED, Asked, Served, asked_for
from paving.serving.steps import Span
from paving.serving.told import Told, as_told
from tiny_models import LATE, ROUTED, lively, tiny_backbone

WIDTH, LAYERS = 32, 6
MEAN = ControllerConfig(route_layers=(0, 1), edit_layers=(3, 4), pooling="last+mean", bottleneck_ratio=4, router_hidden=8)


@pytest.fixture(params=[ROUTED, LATE, MEAN], ids=["early", "late", "mean"])
def controller(request):
    backbone = tiny_backbone()
    assert (backbone.d_model, backbone.n_layers) == (WIDTH, LAYERS)
    return lively(backbone, request.param.resolved(backbone), policy=Soft())


class Engine:
    """Keeps every request's states and runs steps of spans over them; two tensors add up to the residual stream."""

    def __init__(self, controller, prompts: dict[str, int], seed: int = 0, *, diagnostics: bool = False):
        self.served = Served(controller, device=torch.device("cpu"), dtype=torch.float32, diagnostics=diagnostics)
        generator = torch.Generator().manual_seed(seed)
        self.resid = {name: torch.randn(LAYERS, prompt + 9, WIDTH, generator=generator) for name, prompt in prompts.items()}
        self.prompts = prompts

    def step(self, *parts: tuple[str, int, int], policies=None):
        """parts: (request, position, length). Returns (request, position) -> (LAYERS, width) behind every layer."""
        spans, start = [], 0
        for name, position, length in parts:
            spans.append(Span(name, start, length, position, self.prompts[name]))
            start += length
        self.served.begin(spans, {k: v if isinstance(v, Asked) else Asked(v) for k, v in (policies or {}).items()})
        found = self._pass(parts)
        if self.served.again:
            self.served.second_pass()
            found = self._pass(parts)
        return {
            (name, position + i): found[:, start + i]
            for (name, position, length), start in zip(parts, (s.start for s in spans), strict=True)
            for i in range(length)
        }

    def _pass(self, parts):
        out = []
        for layer in range(LAYERS):
            resid = torch.cat([self.resid[name][layer, p : p + n] for name, p, n in parts])
            residual = resid / 4
            hidden = resid - residual
            if layer in self.served.layers:
                self.served.after_layer(layer, hidden, residual)
            out.append(hidden + residual)
        return torch.stack(out)


def by_itself(controller, resid: torch.Tensor, prompt: int) -> tuple[torch.Tensor, object]:
    """(LAYERS, tokens, width) edited by algorithm 1, and the decision: the controller's own modules, no engine."""
    config = controller.config
    parts = []
    for layer in config.route_layers:
        parts += [resid[layer, prompt - 1]] if "last" in config.pooling else []
        parts += [resid[layer, :prompt].mean(0)] if "mean" in config.pooling else []
    decision = controller.decide(torch.cat(parts)[None], None)
    edits = controller.weights.experts.edits(controller.scale * decision.gate[:, None] * decision.mixture, torch.float32)
    edited = resid.clone()
    for layer, edit in edits.items():
        if decision.gate > 0:
            edited[layer, prompt - 1 :] = edit(resid[layer, None, prompt - 1 :])[0]
    return edited, decision.rows()[0]


def by_itself_before(controller, decide, resid, prompt):
    """`by_itself` with the controller's own `decide`, where another was put in its place."""
    with pytest.MonkeyPatch.context() as undo:
        undo.setattr(type(controller), "decide", decide)
        return by_itself(controller, resid, prompt)


def collected(found, name, tokens):
    return torch.stack([found[name, t] for t in range(tokens)], dim=1)


@pytest.mark.parametrize("seed", range(3))
def test_requests_in_one_batch_are_each_edited_as_by_themselves(controller, seed):
    prompts = {"a": 5, "b": 1, "c": 8}
    engine = Engine(controller, prompts, seed)
    found = engine.step(("a", 0, 5), ("b", 0, 1), ("c", 0, 8))
    found |= engine.step(("c", 8, 1), ("a", 5, 1), ("b", 1, 1))  # another order, as engines do
    for name, prompt in prompts.items():
        edited, row = by_itself(controller, engine.resid[name][:, : prompt + 1], prompt)
        torch.testing.assert_close(collected(found, name, prompt + 1), edited, rtol=1e-4, atol=1e-4)
        assert engine.served.requests[name].state.gate == pytest.approx(row.gate, abs=1e-5)


def test_experts_are_weighed_anew_only_where_other_rows_are_open(controller, monkeypatch):
    prompts = {"a": 3, "b": 2, "c": 2}
    engine = Engine(controller, prompts)
    made = []
    experts = type(controller.weights.experts)
    weigh = experts.edits
    monkeypatch.setattr(experts, "edits", lambda self, *a: made.append(1) or weigh(self, *a))
    engine.step(("a", 0, 3), ("b", 0, 2))
    made.clear()
    found = engine.step(("a", 3, 1), ("b", 2, 1)) | engine.step(("a", 4, 1), ("b", 3, 1))
    assert len(made) == 1
    found |= engine.step(("b", 4, 1), ("a", 5, 1))  # the same requests, other rows
    assert len(made) == 2
    engine.served.finish(["b"])
    found |= engine.step(("a", 6, 1), ("c", 0, 2)) | engine.step(("a", 7, 1), ("c", 2, 1))
    for name, first, end in (("a", 3, 8), ("b", 2, 5), ("c", 0, 3)):
        edited, _ = by_itself(controller, engine.resid[name][:, :end], prompts[name])
        mine = torch.stack([found[name, t] for t in range(first, end)], dim=1)
        torch.testing.assert_close(mine, edited[:, first:end], rtol=1e-4, atol=1e-4)


def test_a_prompt_in_chunks_is_read_as_a_whole_one(controller):
    whole, chunked = (Engine(controller, {"a": 7, "b": 3}) for _ in range(2))
    first = whole.step(("a", 0, 7), ("b", 0, 3))
    second = chunked.step(("a", 0, 2), ("b", 0, 3)) | chunked.step(("a", 2, 4), ("b", 3, 1)) | chunked.step(("a", 6, 1))
    torch.testing.assert_close(collected(first, "a", 7), collected(second, "a", 7), rtol=1e-4, atol=1e-4)
    assert chunked.served.requests["a"].state.gate == pytest.approx(whole.served.requests["a"].state.gate, abs=1e-6)


def test_a_preempted_request_keeps_its_gate_and_one_preempted_in_its_prompt_reads_again(controller):
    engine = Engine(controller, {"a": 5, "b": 6})
    engine.step(("a", 0, 5), ("b", 0, 3))
    engine.step(("a", 5, 1))
    state = engine.served.requests["a"].state
    again = engine.step(("a", 0, 7), ("b", 0, 6))  # both from the start: the answer so far comes with the prompt
    assert engine.served.requests["a"].state is state
    for name, tokens in (("a", 7), ("b", 6)):
        edited, _ = by_itself(controller, engine.resid[name][:, :tokens], engine.prompts[name])
        torch.testing.assert_close(collected(again, name, tokens), edited, rtol=1e-4, atol=1e-4)


def test_a_closed_request_keeps_its_bits_beside_open_ones(controller):
    engine = Engine(controller, {"a": 5, "b": 4})
    found = engine.step(("a", 0, 5), ("b", 0, 4), policies={"a": "closed"})
    for token in range(5):
        resid = engine.resid["a"][:, token]
        assert torch.equal(found["a", token], (resid - resid / 4) + resid / 4)
    assert engine.served.requests["a"].state == CLOSED
    assert not torch.equal(found["b", 3], engine.resid["b"][:, 3])
    engine.served.finish(["a", "b", "never seen"])
    assert engine.served.requests == {}


def test_each_request_has_its_own_policy(controller):
    controller = replace(controller.with_policy(Hard(-1e9)), reference=Reference((0.0,), (1e9,), (1e9,)))
    engine = Engine(controller, {name: 4 for name in "abcd"})
    asked = {"a": "soft", "b": None, "c": "default", "d": "conformal:0.5"}
    engine.step(*((name, 0, 4) for name in asked), policies=asked)
    gates = {name: engine.served.requests[name].state.gate for name in asked}
    assert 0 < gates["a"] < 1 and (gates["b"], gates["c"], gates["d"]) == (1.0, 1.0, 0.0)


def test_no_request_asks_around_a_promise(controller):
    reference = Reference((0.0,) * 9, (-1e9,) * 9, (-1e9,) * 9)
    made = replace(controller.with_policy(Hard(1e8)), reference=reference)
    with pytest.raises(ValueError, match="makes a promise, and a soft gate"):
        asked_for(made, Asked("soft"), promised=True)
    assert asked_for(made, Asked("soft")).policy == Soft()
    assert asked_for(made, Asked("soft"), promised=True, diagnostics=True).policy == Soft()
    around, kept = (asked_for(made, Asked("conformal:0.5"), promised=p).policy for p in (False, True))
    assert around.threshold < kept.threshold == 1e8 and kept.name == around.name
    batch = torch.zeros(1)
    assert around.gate(batch, None).item() == 1.0 and kept.gate(batch, None).item() == 0.0
    above = replace(controller.with_policy(Hard(-2e9)), reference=reference)  # alpha asks for more than was promised
    assert asked_for(above, Asked("conformal:0.5"), promised=True).policy.threshold > -2e9


@pytest.mark.parametrize("name", ["oracle", "open", "often", "conformal:0.001", "", 3])
def test_what_no_request_may_ask_for_is_refused_and_stays_closed_if_it_comes_through(controller, name, caplog):
    controller = replace(controller, reference=Reference((0.0,), (0.0,), (0.0,)))
    with pytest.raises(ValueError, match=r"a request may ask for|needs 999 groups"):
        asked_for(controller, Asked(name))
    engine = Engine(controller, {"a": 4})
    engine.step(("a", 0, 4), policies={"a": name})
    assert engine.served.requests["a"].state == CLOSED and "paving: a:" in caplog.text


def test_a_gate_that_cannot_be_decided_stays_closed(controller, monkeypatch, caplog):
    engine = Engine(controller, {"a": 4, "b": 3})
    decide, wrong = type(controller).decide, iter([True, False])
    monkeypatch.setattr(type(controller), "decide", lambda self, z, batch: 1 / 0 if next(wrong) else decide(self, z, batch))
    found = engine.step(("a", 0, 4), ("b", 0, 3))
    resid = engine.resid["a"][:, 3]
    assert torch.equal(found["a", 3], (resid - resid / 4) + resid / 4)
    assert engine.served.requests["a"].state == CLOSED and "no gate could be decided for a" in caplog.text
    edited, _ = by_itself_before(controller, decide, engine.resid["b"][:, :3], 3)  # its neighbour is none the worse
    torch.testing.assert_close(collected(found, "b", 3), edited, rtol=1e-4, atol=1e-4)


def test_what_breaks_at_a_layer_ends_the_open_and_leaves_the_closed_their_bits(controller):
    asked = {"open": "soft", "closed": "closed", "new": None}
    engine = Engine(controller, {"open": 4, "closed": 4, "new": 3})
    engine.step(("open", 0, 4), ("closed", 0, 4), policies=asked)
    served = engine.served
    assert served.take_broken() == []
    edited = controller.config.edit_layers[0]
    after, broken_at = served.after_layer, edited

    def breaking(layer, hidden, residual):
        if layer != broken_at:
            return after(layer, hidden, residual)
        try:
            raise RuntimeError("out of memory")
        except RuntimeError:
            served.break_step()  # as the engine's hook does

    served.after_layer = breaking
    found = engine.step(("open", 4, 1), ("closed", 4, 1), ("new", 0, 3), policies=asked)
    assert served.take_broken()[-1] == "open" and served.take_broken() == []
    assert served.requests["open"].strength is None and served.tell("open").failed
    resid = engine.resid["closed"][:, 4]
    assert torch.equal(found["closed", 4], (resid - resid / 4) + resid / 4)
    served.after_layer = after
    engine.step(("closed", 5, 1), policies=asked)  # and the next step is as ever
    assert served.take_broken() == []


def test_a_prompt_that_was_being_read_when_a_step_broke_goes_on_as_the_bases(controller):
    engine = Engine(controller, {"a": 4, "half": 6})
    spans = [Span("a", 0, 4, 0, 4), Span("half", 4, 3, 0, 6)]
    engine.served.begin(spans, {})
    engine.served.break_step()
    assert engine.served.take_broken() == [] and engine.served.tell("a").failed
    mean = "mean" in controller.config.pooling  # only then was the first half of a prompt to be read
    assert (engine.served.requests["half"].state == CLOSED) == mean


def test_a_request_that_was_not_even_admitted_when_a_step_broke_is_ended(controller, monkeypatch):
    engine = Engine(controller, {"a": 4})
    monkeypatch.setattr(Served, "_admitted", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.served.begin([Span("a", 0, 4, 0, 4)], {})
    engine.served.break_step()
    assert engine.served.take_broken() == ["a"]
    engine.served.break_step()
    engine.served.finish(["a"])
    assert engine.served.take_broken() == []


def test_a_prompt_whose_beginning_was_not_seen_is_not_averaged(controller, caplog):
    engine = Engine(controller, {"a": 6})
    engine.step(("a", 2, 4))  # a prefix cache held the first two tokens
    closed = "mean" in controller.config.pooling
    assert (engine.served.requests["a"].state == CLOSED) == closed
    assert ("begins inside its prompt" in caplog.text) == closed


def test_a_decision_is_told_once_and_says_how_it_came_about(controller):
    engine = Engine(controller, {"a": 3, "b": 4, "c": 2})
    engine.step(("a", 0, 3), ("b", 0, 2), ("c", 0, 2), policies={"c": "closed"})
    told = engine.served.tell("a")
    assert told.policy == "soft" and 0 < told.gate < 1 and len(told.mixture) == controller.config.n_experts
    assert told.gate == pytest.approx(torch.sigmoid(torch.tensor(told.logit)).item())
    assert told.boundary > 0 and not told.failed and as_told(json.loads(json.dumps(told.as_dict()))) == told
    assert engine.served.tell("a") is None  # said already
    assert engine.served.tell("b") is None and engine.served.tell("unknown") is None  # its prompt is not read yet
    assert engine.served.tell("c") == Told("closed", gate=0.0)
    engine.step(("a", 3, 1), ("b", 2, 2))
    assert engine.served.tell("b").logit is not None
    engine.served.finish(["a"])
    assert engine.served.tell("a") is None


def test_a_gate_that_could_not_be_decided_is_told_as_failed(controller, monkeypatch):
    monkeypatch.setattr(type(controller), "decide", lambda self, z, batch: 1 / 0)
    engine = Engine(controller, {"a": 3})
    engine.step(("a", 0, 3))
    assert engine.served.tell("a") == Told("soft", gate=0.0, failed=True)


def test_the_oracle_reads_a_bucket_where_measuring_is_allowed_and_nowhere_else(controller):
    asked = {
        "a": Asked("oracle", "edit"), "b": Asked("oracle", "harmful_keep"), "c": Asked("open"), "d": Asked("hard"),
    }  # fmt: skip
    for diagnostics in (True, False):
        engine = Engine(controller, dict.fromkeys(asked, 3), diagnostics=diagnostics)
        engine.step(*((name, 0, 3) for name in asked), policies=asked)
        told = {name: engine.served.tell(name) for name in asked}
        assert [told[name].gate for name in "abc"] == ([1.0, 0.0, 1.0] if diagnostics else [0.0] * 3)
        assert [told[name].failed for name in "abc"] == [not diagnostics] * 3
        assert not told["d"].failed


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked("oracle"), "needs the prompt's bucket, one of edit, benign_keep, harmful_keep"),
        (Asked("oracle", "safe"), "bucket is 'safe'"),
        (Asked("hard", "safe"), "bucket is 'safe'"),
        (Asked("soft", ["edit"]), r"bucket is \['edit'\]"),
        (Asked("hard", veto="no"), "veto is 'no', neither 1 nor 0"),
        (Asked(["hard"]), "is none that a request may ask for"),
    ],
)
def test_what_a_request_asks_wrongly_is_one_clear_error(controller, asked, said):
    with pytest.raises(ValueError, match=said):
        asked_for(controller, asked, diagnostics=True)
    engine = Engine(controller, {"a": 3, "b": 3}, diagnostics=True)  # what comes through all the same harms no other
    engine.step(("a", 0, 3), ("b", 0, 3), policies={"a": asked})
    assert engine.served.tell("a").failed and not engine.served.tell("b").failed


def test_a_request_may_leave_a_fitted_veto_out_for_measuring(controller):
    weights = copy.deepcopy(controller.weights)
    weights.veto.fitted.fill_(1.0)
    weights.veto.threshold.fill_(-1e9)  # closes every gate
    vetoing = replace(controller, weights=weights, use_veto=True)
    asked = {"a": Asked("hard"), "b": Asked("hard", veto=False), "c": Asked()}
    engine = Engine(vetoing.with_policy(Hard(-1e9)), dict.fromkeys(asked, 3), diagnostics=True)
    engine.step(*((name, 0, 3) for name in asked), policies=asked)
    told = [engine.served.tell(name) for name in asked]
    assert [(t.gate, t.veto) for t in told] == [(0.0, True), (1.0, None), (0.0, True)]
    with pytest.raises(ValueError, match="not started with --allow-oracle"):
        asked_for(vetoing, Asked("hard", veto=False))
    weights.veto.fitted.fill_(0.0)
    with pytest.raises(ValueError, match="no fitted veto"):
        asked_for(replace(vetoing, use_veto=False), Asked("hard", veto=1), diagnostics=True)
