"""How likely a language model is to give each of a few fixed answers to a prompt: no sampling, nothing to parse.

An answer's score is the sum of its tokens' log-probabilities, the log-probability that the model writes it next. It is
*not* divided by the length. As long as no answer is the beginning of another, the answers are events that exclude each
other, so their sums can be renormalised into the probabilities of decoding constrained to the answers; averages per
token cannot (they favour an answer with a long, foregone ending, such as HARMLESS-...).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from paving.backbone import Backbone, pad_left
from paving.backbone.hooks import contiguous_head_input
from paving.evaluation.judges.untrusted import JudgeError, common
from paving.traces.forward import pad_right

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Answers:
    """The answers that a judge chooses from.

    spellings  per answer the token sequences that write it; their probabilities are added up
    """

    names: tuple[str, ...]
    spellings: tuple[tuple[Ids, ...], ...]

    def __post_init__(self) -> None:
        flat = [(name, ids) for name, found in zip(self.names, self.spellings, strict=True) for ids in found]
        for name, ids in flat:
            if not ids:
                raise JudgeError(f"the answer {name!r} has no tokens in this tokenizer; use another judge model.")
        for i, (name, ids) in enumerate(flat):
            for j, (other, longer) in enumerate(flat):
                if i != j and longer[: len(ids)] == ids:
                    raise JudgeError(
                        f"the answer {name!r} is the beginning of {other!r} in tokens, so their probabilities cannot be "
                        "compared. Choose answers of which none begins another, such as single letters."
                    )

    @property
    def longest(self) -> int:
        return max(len(ids) for found in self.spellings for ids in found)


def spelled(encode: Callable[[str], list[int]], rendered: str, answers: Sequence[Sequence[str]]) -> Answers:
    """Answers in tokens, as they follow the prompt text `rendered`.

    Each answer is one or more texts that mean it. A text is tokenised both on its own and behind the prompt: where
    words carry the space before them (SentencePiece) the two differ, and a model may have learned either.
    """
    before = encode(rendered)
    spellings = []
    for texts in answers:
        found: dict[Ids, None] = {}
        for text in texts:
            found[tuple(encode(text))] = None
            whole = encode(rendered + text)
            if whole[: len(before)] == before:
                found[tuple(whole[len(before) :])] = None
        spellings.append(tuple(found))
    return Answers(tuple(texts[0] for texts in answers), tuple(spellings))


@dataclass(frozen=True)
class Scorer:
    """Scores answers to prompts on one model. What all prompts begin with (a rubric is most of one) is run only once.

    shared      the tokens that prompts of this judge begin with; a prompt that leaves them earlier shares up to there
    batch_size  1: every row is computed by itself, so the rows beside it cannot change its scores, to the last bit.
                More rows a pass are faster on an accelerator, and equal up to the rounding of the model's dtype.
    """

    backbone: Backbone
    shared: Ids
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise JudgeError(f"batch_size is {self.batch_size}; at least one row is judged at a time.")

    @torch.inference_mode()
    def log_probs(self, rows: Sequence[Sequence[int]], answers: Answers) -> Tensor:
        """(rows, answers) float32: the log-probability that the model continues each prompt with each answer."""
        scores = torch.empty(len(rows), len(answers.names))
        for kept, chunk in self._batches(rows):
            scores[chunk] = self._score(kept, [rows[i] for i in chunk], answers).cpu()
        return scores

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(how many tokens are shared, row numbers), rows of similar length together. A prompt's last token is run."""
        kept = [min(common(row, self.shared), len(row) - 1) for row in rows]
        ordered = sorted(range(len(rows)), key=lambda i: (kept[i], len(rows[i]), i))
        for n, group in groupby(ordered, key=kept.__getitem__):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                yield n, members[start : start + self.batch_size]

    def _score(self, kept: int, rows: Sequence[Sequence[int]], answers: Answers) -> Tensor:
        # Whole rows are padded on the left, also the shorter ones of a batch: padding between the shared tokens and the
        # rest would use up columns of a sliding window. A short row runs a few shared tokens again instead.
        ids, mask = pad_left(self.backbone, rows)
        cache = self._cache(kept, [mask.shape[1] - len(row) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        first = self._run(ids[:, kept:], mask, positions[:, kept:], cache, keep=1)[:, 0]  # (rows, vocab)
        texts = [(i, ids) for i, found in enumerate(answers.spellings) for ids in found]
        totals = torch.stack([first[:, ids[0]] for _, ids in texts], dim=1)
        if answers.longest > 1:
            totals += self._rest([ids for _, ids in texts], mask, cache)
        of = [[t for t, (i, _) in enumerate(texts) if i == answer] for answer in range(len(answers.names))]
        return torch.stack([totals[:, spellings].logsumexp(1) for spellings in of], dim=1)

    def _rest(self, texts: Sequence[Ids], mask: Tensor, cache: DynamicCache) -> Tensor:
        """(rows, texts): the log-probability of all tokens of each text after its first, which the cache leads up to."""
        n, m = len(mask), len(texts)
        tokens, real = pad_right(texts, self.backbone.pad_id, mask.device)
        steps = tokens.shape[1] - 1
        cache.batch_repeat_interleave(m)
        # Padding stands behind the text that it pads, so no token that counts can see it.
        mask = torch.cat([mask.repeat_interleave(m, 0), mask.new_ones(n * m, steps)], dim=1)
        positions = (mask.cumsum(-1) - 1)[:, -steps:]
        logs = self._run(tokens[:, :-1].repeat(n, 1), mask, positions, cache, keep=steps)
        wanted = tokens[:, 1:].repeat(n, 1)[:, :, None]
        each = logs.gather(2, wanted)[:, :, 0].masked_fill(real[:, 1:].repeat(n, 1) == 0, 0.0)
        return each.sum(1).view(n, m)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, *, keep: int) -> Tensor:
        """(n, keep, vocab) float32 log-probabilities of what follows each of the last `keep` tokens."""
        with contiguous_head_input(self.backbone):
            logits = self.backbone.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            ).logits
        return logits.float().log_softmax(-1)

    @cached_property
    def _prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the shared tokens, (1, kv_heads, shared, head_dim) a layer. Full length on every layer."""
        cache = DynamicCache()
        if self.shared:
            ids = torch.tensor([self.shared], device=self.backbone.device)
            self.backbone.model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _cache(self, kept: int, padding: Sequence[int]) -> DynamicCache:
        """`kept` columns of a batch's cache: row i is padding[i] columns of nothing, and shared tokens up to the end."""
        cache = DynamicCache()
        for i, layer in enumerate(self._prefix if kept else ()):
            rows = [[F.pad(kv, (0, 0, p, 0))[:, :, :kept] for kv in layer] for p in padding]
            keys, values = (torch.cat(column) for column in zip(*rows, strict=True))
            cache.update(keys, values, i)
        return cache


def judge_name(kind: str, model: str, fingerprint: str, dtype: torch.dtype, *settings: object) -> str:
    """A judge's name for the report and for caches: what it is, its weights and dtype, and a digest of the rest.

    Everything that may change a verdict belongs in `settings`, so that a verdict is never taken for another judge's.
    """
    digest = hashlib.sha256(json.dumps([str(s) for s in settings]).encode()).hexdigest()[:8]
    # Where a local checkpoint lies is nobody's business, and moving it changes nothing.
    shown = Path(model).expanduser().name if Path(model).expanduser().is_dir() else model
    return f"{kind}[{shown}@{fingerprint}/{str(dtype).removeprefix('torch.')}]#{digest}"
