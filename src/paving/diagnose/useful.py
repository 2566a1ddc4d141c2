"""Whether edited answers are of use: the rows' saved answers beside the base's own and the edit targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paving.diagnose.study import Study
from paving.evaluation.diagnostics.records import AnswerQuality, Usefulness
from paving.evaluation.diagnostics.usefulness import (
    INSTALL,
    bert_score,
    overlap,
    overlap_available,
    perplexity,
    repetition,
)
from paving.evaluation.judges import Label
from paving.evaluation.statistics import wilson
from paving.generation import Completion
from paving.intervention import Identity
from paving.prompts.types import Bucket
from paving.traces.preservation import continuation_log_prob
from paving.traces.store import chunks

BASE = "base"


def usefulness(study: Study, bert_model: str | None) -> Usefulness:
    """Edited answers of every row, beside the base's answers to benign keeps and the edit targets themselves."""
    groups = [
        (BASE, Bucket.BENIGN_KEEP, "all", [study.base[p.id] for p in study.of(Bucket.BENIGN_KEEP)]),
        (BASE, Bucket.EDIT, "all", [study.base[p.id] for p in study.of(Bucket.EDIT)]),
    ]
    ids = {p.id for p in study.prompts}
    for row in study.metrics.rows:
        if row.name != BASE:
            edited = [c for c in study.row_completions(row.name) if c.bucket == Bucket.EDIT and c.gate > 0 and c.id in ids]
            groups.append((row.name, Bucket.EDIT, "edited", edited))
    texts = _target_texts(study)
    groups.append(("edit target", Bucket.EDIT, "target", _as_answers(study, texts)))
    log_probs = _log_probs(study, [c for *_, answers in groups for c in answers])
    notes = [] if overlap_available() else [f"ROUGE-L and chrF were not measured: {INSTALL}"]
    if bert_model is None:
        notes.append("BERTScore was not measured: name a model for it with --bert-score MODEL.")
    return Usefulness(
        answers=[_quality(study, *group, texts, log_probs, bert_model) for group in groups],
        notes=notes,
    )


def _target_texts(study: Study) -> dict[str, str]:
    decode_ids = study.backbone.tokenizer.decode
    return {i: decode_ids(t.continuation, skip_special_tokens=True).strip() for i, t in study.answer_targets.items()}


def _as_answers(study: Study, texts: dict[str, str]) -> list[Completion]:
    return [Completion(p.id, p.bucket.value, p.transcript, texts[p.id], 0, False, gate=0.0) for p in study.of(Bucket.EDIT)]


def _tokens(study: Study, text: str) -> tuple[int, ...]:
    return tuple(study.backbone.tokenizer(text, add_special_tokens=False)["input_ids"])


def _log_probs(study: Study, answers: Sequence[Completion], batch_size: int = 16) -> dict[tuple[str, str], float]:
    """(prompt id, answer) -> mean log-probability per token under the untouched base; each different answer once."""
    prompts = {p.id: p for p in study.prompts}
    wanted = [(i, text) for i, text in dict.fromkeys((c.id, c.response) for c in answers) if _tokens(study, text)]
    # One prompt may have several answers, and a pass knows its rows by id.
    asked = {str(n): (replace(prompts[i], id=str(n)), _tokens(study, text)) for n, (i, text) in enumerate(wanted)}
    tick = study.means.stage("the base's own perplexity of the answers", len(asked))
    found: dict[str, float] = {}
    by_length = sorted(asked, key=lambda n: (len(asked[n][1]), n))
    for chunk in chunks(by_length, batch_size):
        rows, continuations = [asked[n][0] for n in chunk], {n: asked[n][1] for n in chunk}
        found |= continuation_log_prob(study.backbone, rows, continuations, Identity(), batch_size=batch_size)
        tick(len(chunk))
    return {pair: found[str(n)] for n, pair in enumerate(wanted)}


def _quality(
    study: Study,
    row: str,
    bucket: Bucket,
    what: str,
    answers: Sequence[Completion],
    targets: dict[str, str],
    log_probs: dict[tuple[str, str], float],
    bert_model: str | None,
) -> AnswerQuality:
    labels = [study.label(c) for c in answers] if what != "target" else []
    tokens = [_tokens(study, c.response) for c in answers]
    repeated = repetition(tokens)
    scored = [(log_probs[c.id, c.response], len(t)) for c, t in zip(answers, tokens, strict=True) if t]
    compared = bucket == Bucket.EDIT and what != "target"
    pairs = ([c.response for c in answers], [targets[c.id] for c in answers]) if compared else ([], [])
    overlaps = overlap(*pairs) if compared and overlap_available() else None
    return AnswerQuality(
        row=row,
        bucket=bucket.value,
        what=what,
        n=len(answers),
        broken=None if what == "target" else wilson(labels.count(Label.HARMLESS_BROKEN), len(labels)),
        refused=None if what == "target" else wilson(labels.count(Label.HARMLESS_REFUSAL), len(labels)),
        distinct_2=repeated.distinct_2,
        repeated_4=repeated.repeated_4,
        rouge_l=overlaps and overlaps.rouge_l,
        chrf=overlaps and overlaps.chrf,
        bert_score=bert_score(*pairs, model=bert_model) if compared and bert_model else None,
        base_perplexity=perplexity([p for p, _ in scored], [n for _, n in scored]),
    )
