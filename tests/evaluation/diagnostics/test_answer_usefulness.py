"""Repetition, overlap and perplexity: values known by hand, and missing packages named."""

from __future__ import annotations

import math

import pytest
from transformers import BertConfig, BertModel, BertTokenizerFast

from paving.evaluation.diagnostics import usefulness
from paving.evaluation.diagnostics.usefulness import bert_score, overlap, perplexity, repetition


def test_a_loop_repeats_and_a_sentence_does_not():
    loop, plain = [1, 2] * 6, list(range(12))
    looped, fresh = repetition([loop]), repetition([plain])
    assert looped.distinct_2 == pytest.approx(2 / 11) and looped.repeated_4 == pytest.approx(1 - 2 / 9)
    assert (fresh.distinct_2, fresh.repeated_4) == (1.0, 0.0)
    both = repetition([loop, plain])
    assert both.repeated_4 == pytest.approx(looped.repeated_4 / 2) and both.n == 2


def test_answers_too_short_to_repeat_are_left_out_and_not_counted_as_fresh():
    assert repetition([[1, 1, 1], [1] * 5]).n == 1
    assert repetition([[1, 2]]) == usefulness.Repetition(None, None, 0)


def test_overlap_with_the_target():
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    same = overlap(["Kill the process with a signal."], ["Kill the process with a signal."])
    assert same.rouge_l == pytest.approx(1.0) and same.chrf == pytest.approx(100.0)
    # "the cat sat" against "the dog sat down": the longest common subsequence has 2 words of 3 and of 4.
    part = overlap(["the cat sat"], ["the dog sat down"])
    assert part.rouge_l == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert overlap(["xyz"], ["the dog"]).rouge_l == 0.0
    assert overlap([], []) == usefulness.Overlap(None, None)


def test_missing_packages_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(usefulness, "find_spec", lambda _name: None)
    assert not usefulness.overlap_available()
    with pytest.raises(usefulness.MetricError, match=r"pip install 'paving\[metrics\]'"):
        overlap(["a"], ["a"])
    with pytest.raises(usefulness.MetricError, match=r"pip install 'paving\[bertscore\]'"):
        bert_score(["a"], ["a"], model="x")


def tiny_encoder(folder, **tokenizer):
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog", "sat"]))
    BertTokenizerFast(str(folder / "vocab.txt"), **tokenizer).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)
    return str(folder)


def test_bert_score_of_the_same_text_is_one(tmp_path):
    pytest.importorskip("bert_score")
    model = tiny_encoder(tmp_path, model_max_length=64)
    assert bert_score(["the cat sat"], ["the cat sat"], model=model) == pytest.approx(1.0, abs=1e-4)
    assert bert_score(["the cat sat"], ["dog"], model=model) < 0.99
    assert bert_score([], [], model=model) is None


def test_an_encoder_that_bert_score_cannot_use_is_named(tmp_path):
    pytest.importorskip("bert_score")
    with pytest.raises(usefulness.MetricError, match="states no model_max_length"):
        bert_score(["a"], ["a"], model=tiny_encoder(tmp_path))


def test_perplexity_weighs_every_token_alike():
    assert perplexity([-1.0, -3.0], [3, 1]) == pytest.approx(math.exp(1.5))
    assert perplexity([-2.0], [0]) is None and perplexity([], []) is None
