"""Whether an edited answer is of use: broken, repetitive, near the edit target, and plausible to the untouched base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

INSTALL = "pip install 'paving[metrics]'"
NO_LIMIT = 10**9  # transformers' "no limit" is 1e30


class MetricError(RuntimeError):
    """A measure whose package is not installed; the message says which and how to have it."""


@dataclass(frozen=True)
class Repetition:
    """Over the answers that are long enough to tell; fractions in [0, 1], None where there is none such.

    distinct_2  mean share of an answer's bigrams that are different ones
    repeated_4  mean share of an answer's 4-grams that stood in it before
    """

    distinct_2: float | None
    repeated_4: float | None
    n: int


def repetition(answers: Sequence[Sequence[int]]) -> Repetition:
    """answers: token ids of each. Answers of fewer than four tokens cannot repeat a 4-gram and are left out."""
    long = [a for a in answers if len(a) >= 4]
    if not long:
        return Repetition(None, None, 0)
    return Repetition(
        distinct_2=float(np.mean([_distinct(a, 2) for a in long])),
        repeated_4=float(np.mean([1 - _distinct(a, 4) for a in long])),
        n=len(long),
    )


def _distinct(tokens: Sequence[int], n: int) -> float:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams)


@dataclass(frozen=True)
class Overlap:
    """Mean over (answer, target) pairs: ROUGE-L F1 in [0, 1] and sentence chrF in [0, 100]; None for no pairs."""

    rouge_l: float | None
    chrf: float | None


def overlap_available() -> bool:
    return find_spec("rouge_score") is not None and find_spec("sacrebleu") is not None


def overlap(answers: Sequence[str], targets: Sequence[str]) -> Overlap:
    """Overlap of each answer with its target text.

    raises MetricError naming what to install where rouge-score or sacrebleu is missing.
    """
    if not overlap_available():
        raise MetricError(f"ROUGE-L and chrF need rouge-score and sacrebleu: {INSTALL}")
    if not answers:
        return Overlap(None, None)
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    scorer, chrf = RougeScorer(["rougeL"], use_stemmer=False), CHRF()
    pairs = list(zip(answers, targets, strict=True))
    return Overlap(
        rouge_l=float(np.mean([scorer.score(target, answer)["rougeL"].fmeasure for answer, target in pairs])),
        chrf=float(np.mean([chrf.sentence_score(answer, [target]).score for answer, target in pairs])),
    )


def check_bert_score() -> None:
    """raises MetricError naming what to install where bert-score is missing."""
    if find_spec("bert_score") is None:
        raise MetricError("BERTScore needs bert-score: pip install 'paving[bertscore]', or leave out --bert-score.")


def bert_score(answers: Sequence[str], targets: Sequence[str], *, model: str) -> float | None:
    """Mean BERTScore F1 of each answer against its target, without baseline rescaling; None for no pairs.

    model: the encoder that embeds both, a name or a folder; its second-last layer is compared

    raises MetricError naming what to install where bert-score is missing, or what the encoder lacks.
    """
    check_bert_score()
    if not answers:
        return None
    from bert_score import BERTScorer
    from transformers import AutoConfig, AutoTokenizer

    if AutoTokenizer.from_pretrained(model).model_max_length > NO_LIMIT:
        # bert-score hands the limit to the tokenizer as a machine integer, which overflows without one.
        raise MetricError(
            f"the tokenizer of {model} states no model_max_length, which BERTScore needs; name another encoder."
        )
    n_layers = max(1, AutoConfig.from_pretrained(model).num_hidden_layers - 1)
    scorer = BERTScorer(model_type=model, num_layers=n_layers)
    _, _, f1 = scorer.score(list(answers), list(targets))
    return float(f1.mean())


def perplexity(log_probs: Sequence[float], lengths: Sequence[int]) -> float | None:
    """exp of the mean negative log-probability per token over all answers together; None where there is no token.

    log_probs: mean per token of each answer (nats); lengths: its tokens
    """
    total = sum(lengths)
    if not total:
        return None
    return math.exp(-sum(p * n for p, n in zip(log_probs, lengths, strict=True)) / total)
