"""The log-probabilities of fixed answers: the model's own, whatever is shared, batched or split into tokens."""

from __future__ import annotations

import pytest
import torch

from paving.evaluation.judges.scoring import Answers, Scorer, judge_name, spelled
from paving.evaluation.judges.untrusted import JudgeError, Untrusted
from tiny_judges import judge_backbone
from tiny_models import tiny_backbone

PREFIX = (4, 30, 31, 32, 33, 34, 35, 36)
ROWS = [[*PREFIX, *range(40, 40 + n), 5] for n in (3, 9, 1, 6)]
LETTERS = Answers(("a", "b", "c"), (((50,),), ((51,),), ((52,), (53,))))
WORDS = Answers(("long", "short", "both"), (((60, 61, 62),), ((63,),), ((64, 60), (65, 61, 62, 63))))


@pytest.fixture(scope="module")
def judge():
    return judge_backbone()


@torch.no_grad()
def by_hand(backbone, row: list[int], answers: Answers) -> torch.Tensor:
    """One plain pass a spelling, no cache, no padding."""
    scores = []
    for spellings in answers.spellings:
        each = []
        for ids in spellings:
            logs = backbone.model(input_ids=torch.tensor([[*row, *ids]])).logits[0].log_softmax(-1)
            each.append(sum(logs[len(row) - 1 + i, token] for i, token in enumerate(ids)))
        scores.append(torch.stack(each).logsumexp(0))
    return torch.stack(scores)


@pytest.mark.parametrize("answers", [LETTERS, WORDS], ids=["one token", "several tokens"])
@pytest.mark.parametrize("shared", [PREFIX, (), (4, 30, 99), tuple(ROWS[2])], ids=["shared", "nothing", "parts", "whole"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_are_the_sums_of_the_models_own_log_probabilities(judge, answers, shared, batch_size):
    scores = Scorer(judge, shared, batch_size).log_probs(ROWS, answers)
    expected = torch.stack([by_hand(judge, row, answers) for row in ROWS])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2", "gemma3"])
def test_so_they_are_on_other_architectures_beyond_their_sliding_window(architecture):
    backbone = tiny_backbone(architecture)
    prefix = tuple(range(10, 40))
    rows = [[*prefix, *range(50, 50 + n)] for n in (12, 3)]
    scores = Scorer(backbone, prefix, 2).log_probs(rows, WORDS)
    expected = torch.stack([by_hand(backbone, row, WORDS) for row in rows])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_answers_exclude_each_other_so_their_probabilities_sum_to_less_than_one(judge):
    every = Answers(tuple(map(str, range(600))), tuple(((i,),) for i in range(600)))
    mass = Scorer(judge, PREFIX).log_probs(ROWS, every).exp().sum(1)
    assert (mass < 1 + 1e-5).all() and (mass > 0.9).all()


def test_a_row_scores_alone_what_it_scores_in_company_to_the_last_bit(judge):
    scorer = Scorer(judge, PREFIX)
    together = scorer.log_probs(ROWS, WORDS)
    assert torch.equal(together.flip(0), scorer.log_probs(ROWS[::-1], WORDS))
    for row, scores in zip(ROWS, together, strict=True):
        assert torch.equal(scorer.log_probs([row], WORDS)[0], scores)


def test_no_rows_have_no_scores(judge):
    assert Scorer(judge, PREFIX).log_probs([], LETTERS).shape == (0, 3)


def test_an_answer_that_begins_another_is_refused():
    with pytest.raises(JudgeError, match="'a' is the beginning of 'b'"):
        Answers(("a", "b"), (((50,),), ((50, 51),)))
    with pytest.raises(JudgeError, match="has no tokens"):
        Answers(("a", "b"), ((), ((),)))
    with pytest.raises(JudgeError, match="at least one row"):
        Scorer(judge_backbone(), PREFIX, 0)


def test_an_answer_is_spelled_as_it_follows_the_prompt_and_as_it_stands_alone(judge):
    encode = Untrusted(judge.tokenizer).encode
    found = spelled(encode, "Reply with exactly one<|im_end|>", [["A"], ["safe", "\n\nsafe"]])
    assert [len(s) for s in found.spellings] == [1, 2]
    assert judge.tokenizer.decode(found.spellings[1][0]) == "safe"

    def with_spaces(text: str) -> list[int]:  # as SentencePiece: a text's first word has a space before it
        return encode(" " + text)

    found = spelled(with_spaces, "Reply:\n", [["safe"]])
    assert {judge.tokenizer.decode(ids) for ids in found.spellings[0]} == {" safe", "safe"}


def test_a_judges_name_changes_with_its_settings_and_does_not_tell_where_a_checkpoint_lies(tmp_path):
    name = judge_name("rubric-1", str(tmp_path), "f" * 16, torch.bfloat16, "settings", 1)
    assert name.startswith(f"rubric-1[{tmp_path.name}@{'f' * 16}/bfloat16]#") and str(tmp_path.parent) not in name
    others = {
        judge_name("rubric-1", str(tmp_path), "f" * 16, torch.bfloat16, "settings", 2),
        judge_name("rubric-1", str(tmp_path), "f" * 16, torch.float32, "settings", 1),
        judge_name("rubric-1", str(tmp_path), "e" * 16, torch.bfloat16, "settings", 1),
    }
    assert len({name, *others}) == 4
