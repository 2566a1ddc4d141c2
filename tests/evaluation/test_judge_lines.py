"""A judge from a line of text, and the models behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RobertaModel

from paving.backbone import BackboneError
from paving.evaluation.judges import Exchange, JudgeLine, RuleJudge, judge_from, judge_line, model_judge
from paving.evaluation.judges.classifiers import ClassifierJudge
from paving.evaluation.judges.guards import LlamaGuardJudge, WildGuardJudge
from paving.evaluation.judges.kinds import KINDS
from paving.evaluation.judges.rubric import RubricJudge
from paving.evaluation.judges.tiered import TieredJudge
from paving.evaluation.judges.untrusted import JudgeError
from tiny_judges import CHATML, LLAMA_GUARD, judge_backbone, tiny_classifier

_NAME = st.text(st.characters(exclude_characters=",", exclude_categories=["Cs"]), min_size=1, max_size=30).filter(
    lambda s: s == s.strip()
)
_PROVIDER = _NAME.filter(lambda s: "/" not in s)  # the text up to the first slash
_SIDES = st.one_of(st.just({}), st.fixed_dictionaries({"refusal": _NAME, "other": _NAME}))
_UNDECIDED = st.one_of(st.just({}), st.just({"undecided": "rules"}))
_API = st.fixed_dictionaries({}, optional={"base_url": _NAME, "rpm": st.integers(0).map(str), "temperature": st.just("0.7")})
_LINES = st.one_of(
    st.just(JudgeLine("rules")),
    st.just(JudgeLine("rules", options={"edit": "harmful"})),
    st.builds(JudgeLine, st.just("rubric"), _NAME),
    st.builds(JudgeLine, st.just("classifier"), _NAME, _SIDES),
    st.builds(JudgeLine, st.sampled_from(["wildguard", "llama-guard"]), _NAME, _UNDECIDED),
    st.builds(lambda m, then, sides: JudgeLine("tiered", m, {"then": then, **sides}), _NAME, _NAME, _SIDES),
    st.builds(lambda p, m, options: JudgeLine("api", f"{p}/{m}", options), _PROVIDER, _NAME, _API),
)


@given(_LINES)
def test_a_line_that_is_written_is_read_as_it_was(line):
    assert judge_line(str(line)) == line


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_with_what_is_allowed(text):
    try:
        assert str(judge_line(text)) == text
    except ValueError as error:
        assert str(error)


def test_lines_read_as_they_look():
    assert judge_line("hf:rubric=Qwen/Qwen3-4B") == JudgeLine("rubric", "Qwen/Qwen3-4B")
    assert judge_line("hf:rubric=embedded:SmolLM2-135M-Instruct").model == "embedded:SmolLM2-135M-Instruct"
    line = judge_line("api:openai-api/vllm/Qwen/Qwen3-4B,base_url=http://127.0.0.1:8000/v1?x=y,tpm=220000")
    assert line.model == "openai-api/vllm/Qwen/Qwen3-4B"
    assert line.options == {"base_url": "http://127.0.0.1:8000/v1?x=y", "tpm": "220000"}
    line = judge_line("hf:tiered=protectai/distilroberta-base-rejection-v1,then=meta-llama/Llama-3.1-8B-Instruct")
    assert line.options == {"then": "meta-llama/Llama-3.1-8B-Instruct"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpt", "'gpt' is not known; allowed: rules, rules:edit=harmful, hf:rubric=MODEL"),
        ("", "allowed: rules"),
        ("hf:rubric", "allowed: rules"),
        ("hf:jury=m", "allowed: rules"),
        ("hf:rules=m", "allowed: rules"),
        ("hf:rubric=", "Give a name"),
        ("hf:rubric=a,b", "'b' in 'hf:rubric=a,b' is no option"),
        ("hf:rubric=a,then=b", "no option then; allowed: none"),
        ("hf:classifier=a,refusal=R", "both refusal= and other="),
        ("hf:tiered=a", "then=MODEL"),
        ("hf:tiered=a,then=b,then=c", "given twice"),
        ("hf:wildguard=a,undecided=me", "allowed: rules"),
        ("api:", "Give a name"),
        ("api", "allowed: rules"),
        ("api:gpt-4o", "names no provider. Write api:PROVIDER/MODEL"),
        ("api:openai/", "names no provider"),
        ("api:openai/m,rpm=-1", "a whole number"),
        ("api:openai/m,then=x", "api has no option then; allowed: base_url, key"),
    ],
)
def test_a_line_that_cannot_be_read_says_what_is_allowed(text, message):
    with pytest.raises(ValueError, match=message):
        judge_from(text)


def test_reading_a_line_and_judging_by_rules_import_no_torch():
    code = (
        "import sys; from paving.evaluation.judges import judge_from, judge_line;"
        "judge_line('hf:rubric=m'); judge_from('rules'); import paving.evaluation.judges.api;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints as a hub would hold them, by kind."""
    folder = tmp_path_factory.mktemp("judges")
    backbones = {"chat": judge_backbone(CHATML), "guard": judge_backbone(LLAMA_GUARD), "wild": judge_backbone(CHATML)}
    backbones["wild"].tokenizer.chat_template = None
    for name, backbone in backbones.items():
        backbone.model.save_pretrained(folder / name)
        backbone.tokenizer.save_pretrained(folder / name)
    classifier = tiny_classifier()
    classifier.model.save_pretrained(folder / "classifier")
    classifier.tokenizer.save_pretrained(folder / "classifier")
    RobertaModel(classifier.model.config).save_pretrained(folder / "encoder")
    classifier.tokenizer.save_pretrained(folder / "encoder")
    return folder


def test_every_kind_is_built_from_its_line(saved):
    sides = "refusal=REJECTION,other=NORMAL"
    lines = {
        "rules": RuleJudge,
        f"hf:rubric={saved}/chat": RubricJudge,
        f"hf:classifier={saved}/classifier,{sides}": ClassifierJudge,
        f"hf:wildguard={saved}/wild,undecided=rules": WildGuardJudge,
        f"hf:wildguard={saved}/chat": WildGuardJudge,
        f"hf:llama-guard={saved}/guard,undecided=rules": LlamaGuardJudge,
        f"hf:tiered={saved}/classifier,then={saved}/chat,{sides}": TieredJudge,
    }
    for text, kind in lines.items():
        judge = judge_from(text, device="cpu")
        assert isinstance(judge, kind)
        assert str(saved) not in judge.name, "where a checkpoint lies is no part of what it judges"
        if "undecided" in text:
            assert judge.undecided == RuleJudge()
        if text != f"hf:wildguard={saved}/chat":  # a random guard has no answer in its form, and here nobody stands in
            assert judge.judge("Name a colour.", "Blue is one.", None).label


def test_a_loaded_judge_judges_as_the_model_that_was_saved(saved):
    rows = [Exchange("Name a colour.", "Blue is one.")]
    loaded, fresh = judge_from(f"hf:rubric={saved}/chat", device="cpu"), RubricJudge(judge_backbone(CHATML))
    torch.testing.assert_close(loaded.probabilities(rows), fresh.probabilities(rows))
    assert loaded.backbone.fingerprint == fresh.backbone.fingerprint


def test_a_classifier_whose_labels_are_unknown_is_never_guessed(saved):
    with pytest.raises(JudgeError, match=r"not known here.*refusal=REJECTION,other=NORMAL"):
        judge_from(f"hf:classifier={saved}/classifier", device="cpu")
    with pytest.raises(JudgeError, match="0 NORMAL, 1 REJECTION"):
        judge_from(f"hf:classifier={saved}/classifier,refusal=NO,other=YES", device="cpu")


def test_a_base_model_without_a_trained_head_is_no_classifier(saved):
    with pytest.raises(BackboneError, match="no trained classifier"):
        judge_from(f"hf:classifier={saved}/encoder,refusal=REJECTION,other=NORMAL", device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_there_is_an_error_and_not_another_model(kind, tmp_path):
    options = {"then": "x", "refusal": ("A",), "other": ("B",)} if kind == "tiered" else {}
    if kind == "classifier":
        options = {"refusal": ("A",), "other": ("B",)}
    with pytest.raises(BackboneError, match=r"cannot load|no model folder"):
        model_judge(kind, str(tmp_path / "nothing"), device="cpu", **options)


def test_a_kind_that_is_not_known_says_what_is_allowed():
    with pytest.raises(ValueError, match="'jury' is not known; allowed: rubric, classifier, wildguard, llama-guard, tiered"):
        model_judge("jury", "m")
    with pytest.raises(ValueError, match="then=MODEL"):
        model_judge("tiered", "m")


def test_a_judges_name_is_the_same_in_every_process():
    """Verdicts are known by it: a name that held an address would have every answer judged, and paid for, again."""
    code = "from paving.evaluation.judges.api import ApiJudge; print(ApiJudge('openai/gpt-4o-mini').name)"
    names = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in "ab"}
    assert len(names) == 1 and "#" in names.pop()
