"""Benchmarks through lm-evaluation-harness on tiny models: where a prompt ends, what is edited, what a run keeps."""

from __future__ import annotations

import json
import sys

import datasets
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Regex
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from typer.testing import CliRunner

from paving import cli
from paving.backbone import as_backbone, render_batch, render_ids
from paving.controller import PavedModel, save_controller
from paving.controller.gates import AlwaysOpen, Closed, Soft
from paving.controller.store import load_controller
from paving.evaluation import utility_harness as harness
from paving.evaluation.utility import Settings, Utility, compare, compare_task, read_utility
from paving.evaluation.utility_harness import HarnessModel, ask, load_tasks
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.run_folder import RunError, open_run
from paving.utility import FILE, FOLDER, utility
from tiny_models import CHAT_TEMPLATE, LATE, lively, prompt, tiny_model, tiny_tokenizer
from tiny_runs import tiny_run
from tiny_tasks import CHOICE, question, write_tasks

BREAK = "w190"  # the word that becomes a line break, as the last token of a chat template


@pytest.fixture(scope="module")
def backbone():
    """A tiny model whose chat template ends in a line break, as most do, and whose tokenizer knows line breaks."""
    tokenizer = tiny_tokenizer()
    inner = tokenizer.backend_tokenizer
    words = {("\n" if word == BREAK else word): i for word, i in inner.get_vocab().items()}
    inner.model = WordLevel(words, unk_token="<unk>")
    inner.pre_tokenizer = Split(Regex(r"\n|\S+"), behavior="removed", invert=True)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<assistant>{%", "<assistant>\n{%")
    assert tokenizer.chat_template != CHAT_TEMPLATE
    return as_backbone(tiny_model("llama"), tokenizer, "tiny-llama")


def asked(backbone, intervention, *, batch_size: int = 4) -> HarnessModel:
    return HarnessModel(backbone, intervention, chat=True, batch_size=batch_size)


def chat(model: HarnessModel, text: str) -> str:
    return model.apply_chat_template([{"role": "user", "content": text}])


def given(model: HarnessModel, pairs) -> list[Instance]:
    return [Instance("loglikelihood", {}, (chat(model, text), answer), i) for i, (text, answer) in enumerate(pairs)]


def open_ended(model: HarnessModel, texts, n: int = 6) -> list[Instance]:
    options = {"until": [], "max_gen_toks": n, "do_sample": False}
    return [Instance("generate_until", {}, (chat(model, text), options), i) for i, text in enumerate(texts)]


PAIRS = [(question(i), answer) for i in range(6) for answer in ("w20", "w21", "w22 w23 w24", "w22 w23 w25 w26")]
QUESTIONS = [question(i) for i in range(6)]


def test_a_closed_gate_scores_and_generates_what_the_base_does_bit_for_bit(backbone):
    base, closed = (asked(backbone, i) for i in (Identity(), lively(backbone, policy=Closed())))
    assert closed.loglikelihood(given(closed, PAIRS)) == base.loglikelihood(given(base, PAIRS))
    assert closed.generate_until(open_ended(closed, QUESTIONS)) == base.generate_until(open_ended(base, QUESTIONS))
    assert set(closed.gates.values()) == {0.0}


def test_an_open_gate_changes_scores_and_answers(backbone):
    base, opened = (asked(backbone, i) for i in (Identity(), lively(backbone, policy=AlwaysOpen())))
    one, other = (model.loglikelihood(given(model, PAIRS)) for model in (base, opened))
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(one, other, strict=True))
    assert base.generate_until(open_ended(base, QUESTIONS)) != opened.generate_until(open_ended(opened, QUESTIONS))
    assert set(opened.gates.values()) == {1.0} and len(opened.gates) == 6


@pytest.mark.parametrize("layers", [None, LATE], ids=["early", "late routing"])
def test_what_the_paved_model_writes_is_what_it_scores_as_its_own(backbone, layers):
    """A given answer is edited where a generated one is: from the prompt's last token on, by the prompt's gate."""
    controller = lively(backbone, *([layers] if layers else []), policy=Soft())
    model, paved = asked(backbone, controller), PavedModel(backbone, controller)
    for text in QUESTIONS:
        batch = render_batch(backbone, [prompt_of(text)])
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": 199}
        written = paved.generate(
            batch.input_ids, attention_mask=batch.attention_mask, output_logits=True, return_dict_in_generate=True, **options
        )
        tokens = written.sequences[0, batch.width :]
        steps = torch.stack(written.logits, dim=1)[0].log_softmax(-1)
        expected = float(steps.gather(1, tokens[:, None]).sum())
        request = ((text, ""), batch.input_ids[0].tolist(), tokens.tolist())
        ((score, is_greedy),) = model._loglikelihood_tokens([request])
        assert is_greedy and score == pytest.approx(expected, abs=1e-4)


def prompt_of(text: str):
    return prompt("p", [int(word[1:]) for word in text.split()], Bucket.BENIGN_KEEP)


def test_the_gate_reads_the_prompt_it_was_trained_to_read(backbone):
    """To the template's last line break, which the stock model would move into the answer; alike for both kinds."""
    controller = lively(backbone, policy=Soft())
    paved = PavedModel(backbone, controller)
    for run in ("loglikelihood", "generate_until"):
        model = asked(backbone, controller)
        getattr(model, run)(given(model, PAIRS) if run == "loglikelihood" else open_ended(model, QUESTIONS))
        assert len(model.gates) == 6
        for text in QUESTIONS:
            ids = render_ids(backbone, text)
            assert ids[-1] == backbone.tokenizer.convert_tokens_to_ids("\n")
            (state,) = paved.gates(torch.tensor([ids]))
            assert model.gates[chat(model, text)] == pytest.approx(state.gate, abs=1e-5)


def test_scores_do_not_depend_on_what_else_is_asked(backbone):
    controller = lively(backbone, policy=Soft())
    together = asked(backbone, controller, batch_size=16)
    alone = asked(backbone, controller, batch_size=1)
    whole = together.loglikelihood(given(together, PAIRS))
    for (score, greedy), request in zip(whole, given(alone, PAIRS), strict=True):
        ((expected, expected_greedy),) = alone.loglikelihood([request])
        assert score == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy


def test_the_same_tokens_with_another_prompt_end_are_another_question(backbone):
    model = asked(backbone, lively(backbone, policy=Soft()))
    start = render_ids(backbone, question(1))
    requests = [(("a", ""), start, [27, 28]), (("b", ""), [*start, 27], [28]), (("a", ""), start, [27, 29])]
    together = model._loglikelihood_tokens(requests)
    for found, request in zip(together, requests, strict=True):
        assert found[0] == pytest.approx(model._loglikelihood_tokens([request])[0][0], abs=1e-4)
    assert model.gates["a"] != model.gates["b"]


def test_answers_that_differ_in_their_last_token_cost_one_pass(backbone, monkeypatch):
    rows = []
    forced = harness.teacher_forced_logits
    monkeypatch.setattr(harness, "teacher_forced_logits", lambda b, batch, c: rows.append(len(batch)) or forced(b, batch, c))
    model = asked(backbone, Identity())
    model.loglikelihood(given(model, [(text, f"w{i}") for text in QUESTIONS for i in range(20, 24)]))
    assert sum(rows) == len(QUESTIONS)


def test_the_stock_model_of_the_harness_takes_a_paved_model_and_generates_the_same(backbone):
    controller = lively(backbone, policy=AlwaysOpen())
    stock = HFLM(
        pretrained=PavedModel(backbone, controller), tokenizer=backbone.tokenizer, add_bos_token=False,
        max_length=256, batch_size=4,
    )  # fmt: skip
    model = asked(backbone, controller)
    assert stock.generate_until(open_ended(model, QUESTIONS)) == model.generate_until(open_ended(model, QUESTIONS))


def test_prompts_that_do_not_fit_are_counted(backbone):
    long = " ".join(f"w{i % 180}" for i in range(300))
    for run, made in (("loglikelihood", given), ("generate_until", open_ended)):
        model = asked(backbone, lively(backbone))
        texts = [long, *QUESTIONS]
        getattr(model, run)(made(model, [(t, "w20 w21") for t in texts] if made is given else texts))
        assert model.cut == {chat(model, long)}
    alike = given(model, [("w9 " + long, "w20"), ("w8 " + long, "w20")])
    one, other = model.loglikelihood(alike)  # cut to the same tokens: one pass, and each text has its gate
    assert one == other and all(request.args[0] in model.gates for request in alike)


def test_an_answer_longer_than_the_context_is_an_error(backbone):
    model = asked(backbone, Identity())
    with pytest.raises(ValueError, match="answer of 300 tokens"):
        model._loglikelihood_tokens([(("q", ""), [1, 5], [9] * 300)])


# --- tasks from files, and a run --------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Folder of two local tasks on one file of eight questions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def run(tmp_path):
    """(folder, means) of a run whose controller was never trained but edits."""
    config, means = tiny_run(tmp_path)
    folder = tmp_path / "run"
    open_run(config, folder)
    backbone = means.load(config.model, config.dtype)
    save_controller(lively(backbone, policy=Soft()), folder / "controller")
    return folder, means


def names(tasks) -> list[str]:
    return [str(tasks / "choice.yaml"), str(tasks / "open.yaml")]


def test_a_run_is_asked_and_the_closed_gate_changes_nothing(run, tasks):
    folder, means = run
    found = utility(folder, names(tasks), means)
    assert read_utility(folder / FILE) == found
    assert [(t.task, t.policy, t.questions) for t in found.tasks] == [("tiny_choice", "soft", 8), ("tiny_open", "soft", 8)]
    assert all(t.gate_open.k == t.gate_open.n == 8 for t in found.tasks)  # a soft gate is never quite closed
    assert found.tasks[0].measures[0].metric == "acc" and found.tasks[0].measures[0].yes_no
    with_closed = utility(folder, names(tasks), means, policy="closed")
    assert with_closed.tasks[:2] == found.tasks
    for task in with_closed.tasks[2:]:
        assert task.policy == "closed" and task.gate_open.k == 0
        assert all(m.difference == 0 and m.low < 0 < m.high for m in task.measures)


def test_what_was_asked_is_not_asked_again_nor_overwritten(run, tasks, monkeypatch):
    folder, means = run
    put = harness.ask
    calls = []

    def counted(name, *args, row, **kwargs):
        calls.append((name, row))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return put(name, *args, row=row, **kwargs)

    monkeypatch.setattr(harness, "ask", counted)
    with pytest.raises(KeyboardInterrupt):
        utility(folder, names(tasks), means)
    assert [t.task for t in read_utility(folder / FILE).tasks] == ["tiny_choice"]
    found = utility(folder, names(tasks), means)
    assert calls[3:] == [("tiny_open", "base"), ("tiny_open", "soft")]  # goes on, and keeps what was finished
    assert utility(folder, names(tasks), means) == found and len(calls) == 5
    before = {p.name: p.read_bytes() for p in (folder / FOLDER).iterdir()}
    with pytest.raises(RunError, match=r"limit: None there, 4 asked.*--force"):
        utility(folder, names(tasks), means, limit=4)
    assert len(calls) == 5 and before == {p.name: p.read_bytes() for p in (folder / FOLDER).iterdir()}
    forced = utility(folder, names(tasks), means, limit=4, force=True)
    assert [t.questions for t in forced.tasks] == [4, 4]


def test_other_questions_or_another_controller_are_not_taken_for_these(run, tasks):
    folder, means = run
    utility(folder, names(tasks)[:1], means)
    rows = tasks / "rows.jsonl"
    rows.write_text(rows.read_text().replace('"answer": 0', '"answer": 1'))
    with pytest.raises(RunError, match="source: "):
        utility(folder, names(tasks)[:1], means)
    found = utility(folder, names(tasks)[:1], means, force=True)
    config = json.loads((folder / "config.json").read_text())
    other = lively(means.load(config["model"], config["dtype"]), seed=1, policy=Soft())
    save_controller(other, folder / "controller")
    with pytest.raises(RunError, match="asked: "):
        utility(folder, names(tasks)[:1], means)
    assert utility(folder, names(tasks)[:1], means, force=True).tasks[0].settings == found.tasks[0].settings


def test_tasks_are_found_by_name_in_a_folder_and_bad_ones_are_named(tasks, monkeypatch):
    name, loaded = load_tasks("tiny_choice", [tasks])
    assert name == "tiny_choice" and len(loaded[name].eval_docs) == 8
    manager = harness.TaskManager  # without the harness's own thousands of tasks, which take half a minute to list
    monkeypatch.setattr(harness, "TaskManager", lambda include_path, include_defaults: manager(None, include_path, False))
    with pytest.raises(ValueError, match="knows no task 'absent'"):
        load_tasks("absent", [tasks])
    (tasks / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice, tiny_open]\n")
    name, loaded = load_tasks("tiny_group", [tasks])
    assert name == "tiny_group" and sorted(loaded) == ["tiny_choice", "tiny_open"]
    with pytest.raises(ValueError, match="group of tasks: give its name"):
        load_tasks(str(tasks / "group.yaml"))
    with pytest.raises(ValueError, match="no task file"):
        load_tasks(str(tasks / "absent.yaml"))
    (tasks / "whole.yaml").write_text(
        CHOICE.replace("tiny_choice", "tiny_whole").replace("multiple_choice", "loglikelihood_rolling")
        .replace("doc_to_target: answer", "doc_to_target: '{{question}}'")
        .replace("metric: acc, aggregation: mean", "metric: word_perplexity, aggregation: weighted_perplexity")
    )  # fmt: skip
    with pytest.raises(ValueError, match="without a prompt no gate"):
        load_tasks(str(tasks / "whole.yaml"))
    (tasks / "zero.yaml").write_text(CHOICE.replace("tiny_choice", "tiny_zero") + "num_fewshot: 0\n")
    with pytest.raises(ValueError, match="tiny_zero is made to be asked without examples"):
        load_tasks(str(tasks / "zero.yaml"), fewshot=2)
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match="cannot load the task"):
        load_tasks(str(tasks / "choice.yaml"))


def test_errors_before_anything_is_loaded(run, tasks, tmp_path, monkeypatch):
    folder, means = run
    with pytest.raises(RunError, match="no bucket for the oracle"):
        utility(folder, names(tasks), means, policy="oracle")
    with pytest.raises(RunError, match="is no run folder"):
        utility(tmp_path / "nothing", names(tasks), means)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "paving.evaluation.utility_harness")
    monkeypatch.delattr("paving.evaluation.utility_harness")
    with pytest.raises(RunError, match=r"pip install 'paving\[lm-eval\]'"):
        utility(folder, names(tasks), means)


def test_the_command_prints_the_difference_and_json(run, tasks):
    folder, _ = run
    arguments = ["utility", str(folder), "--tasks", str(tasks / "choice.yaml"), "--device", "cpu"]
    shown = CliRunner().invoke(cli.app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "tiny_choice: gate soft, open on 8/8 100.0" in shown.output and "acc %, n=8: base " in shown.output
    as_json = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert Utility.model_validate_json(as_json.stdout).tasks[0].task == "tiny_choice"
    assert CliRunner().invoke(cli.app, ["utility", str(folder), "--tasks", ","]).exit_code == 1


def test_examples_stand_before_the_question(run, tasks):
    folder, means = run
    (tasks / "choice.yaml").write_text(CHOICE + "fewshot_split: test\n")
    none = utility(folder, names(tasks)[:1], means)
    two = utility(folder, names(tasks)[:1], means, fewshot=2, force=True)
    assert two.tasks[0].settings.fewshot == 2 and none.tasks[0].settings.fewshot is None
    answers = [json.loads(p.read_text()) for p in sorted((folder / FOLDER).iterdir())]
    assert answers[0]["questions"][0]["prompt"] == answers[1]["questions"][0]["prompt"]  # the same examples for both rows


def test_prompts_drawn_by_chance_are_no_pairs(backbone, tasks):
    name, loaded = load_tasks(str(tasks / "choice.yaml"))
    settings = Settings(limit=4, fewshot=None, chat=True, seed=0, batch_size=4, harness=harness.HARNESS)
    answers = ask(name, loaded[name], asked(backbone, Identity()), settings, row="base", asked="")
    assert [q.gates for q in answers.questions] == [[0.0]] * 4 and answers.higher_is_better == {"acc": True}
    assert compare_task(name, [answers], [answers]).measures[0].n == 4
    reworded = answers.questions[0].model_copy(update={"prompt": "another"})
    other = answers.model_copy(update={"questions": [reworded, *answers.questions[1:]], "row": "soft"})
    with pytest.raises(ValueError, match="in other words"):
        compare_task(name, [answers], [other])


def test_a_metric_that_is_no_yes_or_no_has_a_bootstrap_interval():
    base = {str(i): i / 10 for i in range(30)}
    better = {i: v + 0.5 + 0.01 * int(i) for i, v in base.items()}
    found = compare("f1", base, better, higher_is_better=True)
    assert not found.yes_no and found.p is None and found.low < found.difference < found.high
    assert found.difference == pytest.approx(0.645)
    assert compare("f1", {}, {}, higher_is_better=None).difference is None


def test_a_group_is_pooled_question_by_question(run, tasks):
    folder, means = run
    (tasks / "open.yaml").write_text(CHOICE.replace("tiny_choice", "tiny_other"))
    (tasks / "group.yaml").write_text("group: tiny_group\ntask: [tiny_choice, tiny_other]\n")
    _, loaded = load_tasks("tiny_choice", [tasks])
    whole = utility(folder, [str(tasks / "choice.yaml"), str(tasks / "open.yaml")], means).tasks
    settings = whole[0].settings
    parts = [
        [ask(t.task, loaded["tiny_choice"], asked_of_tiny(folder, means, row), settings, row=row, asked="") for t in whole]
        for row in ("base", "soft")
    ]
    pooled = compare_task("tiny_group", *parts)
    assert pooled.questions == 16 and pooled.gate_open.n == 16
    assert pooled.measures[0].base == sum(t.measures[0].base for t in whole) / 2


def asked_of_tiny(folder, means, row):
    config = json.loads((folder / "config.json").read_text())
    backbone = means.load(config["model"], config["dtype"])
    return asked(backbone, Identity() if row == "base" else load_controller(folder / "controller", backbone))
