"""(backbone, prompts, intervention) -> completions. Generation knows no method and no judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from paving.backbone import Backbone, PromptBatch, checked_ids, pad_left
from paving.backbone.hooks import contiguous_head_input
from paving.intervention import Applied, Intervention, RowState
from paving.processes import gathered, of_all, rank_and_world, shared
from paving.prompts.types import Prompt

Tick = Callable[[int], None]
TRANSFORMERS = "transformers"


class Decoding(BaseModel):
    """How completions are decoded. Greedy, 64 new tokens, as in the paper's primary protocol (table 5)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: int = Field(64, ge=1)
    do_sample: bool = False
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0

    def generation_config(self, backbone: Backbone) -> GenerationConfig:
        """Of the model's own generation defaults only the tokens that end an answer are taken (see `decode`)."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.do_sample else {}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.do_sample,
            num_beams=1,
            pad_token_id=backbone.pad_id,
            eos_token_id=list(backbone.eos_ids),
            **sampling,
        )


@dataclass(frozen=True)
class Completion:
    """One answer and what the intervention decided for it. `truncated`: cut by max_new_tokens, not ended by the model."""

    id: str
    bucket: str
    prompt: str
    response: str
    n_tokens: int
    truncated: bool
    gate: float
    logit: float | None = None
    veto: bool | None = None
    mixture: tuple[float, ...] | None = None


class Engine(Protocol):
    """What decodes answers: `generate` of this module, or an engine that serves.

    name  written beside what it decoded
    key   tells answers of one setting from those of another
    """

    name: str
    key: str

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        """As `generate` of this module."""


def generate(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    intervention: Intervention,
    decoding: Decoding,
    *,
    batch_size: int = 32,
    known: Sequence[Mapping[str, Completion]] = (),
    by_row: bool = False,
    tick: Tick | None = None,
) -> list[Completion]:
    """Complete every prompt under the intervention; the order is that of `prompts`.

    Prompts are batched by length. `known` holds completions of the same prompts at the same batching: the base's, and
    those of interventions that do the same wherever they decide the same (one editor under another gate policy). A
    batch whose every row was decided there as it is here is taken from there instead of being decoded again to the
    same bits; a closed gate is decided alike everywhere. With `by_row` its rows may come from different ones of them, and
    those that are in none are decoded in batches of their own: the same answers up to rounding, where products depend on
    how many rows there are and are open. `tick(n)`: n more prompts are done.
    """
    if by_row and (decoding.do_sample or rank_and_world()[1] > 1):
        raise ValueError(
            "answers are taken row by row where one process decodes greedily; not by several, nor with sampling."
        )
    room = decoding.max_new_tokens
    rows = {p.id: checked_ids(backbone, p, room=room) for p in prompts}
    batches: list[list[Completion]] = []

    def complete(chunk: Sequence[Prompt], known: Sequence[Mapping[str, Completion]]) -> list[Prompt]:
        """Completes what it can, and returns what it left."""
        ids, mask = pad_left(backbone, [rows[p.id] for p in chunk])
        batch = PromptBatch(ids, mask, tuple(p.id for p in chunk), tuple(p.bucket for p in chunk))
        earlier = [[answers[p.id] for p in chunk] for answers in known if all(p.id in answers for p in chunk)]
        found = complete_batch(backbone, chunk, batch, intervention, decoding, earlier, by_row=by_row)
        batches.append([c for c in found if c is not None])
        if tick is not None:
            tick(of_all(len(batches[-1])))
        return [p for p, c in zip(chunk, found, strict=True) if c is None]

    mine = shared(list(batches_by_length(prompts, rows, batch_size)))
    left = [p for chunk in mine for p in complete(chunk, known)]
    for chunk in batches_by_length(left, rows, batch_size):
        complete(chunk, ())
    done = {completion.id: completion for batch in gathered(batches) for completion in batch}
    return [done[p.id] for p in prompts]


class Transformers:
    """Decoding here, with the backbone itself."""

    name = key = TRANSFORMERS

    def generate(self, *args: Any, **kwargs: Any) -> list[Completion]:
        return generate(*args, **kwargs)


def batches_by_length(
    prompts: Sequence[Prompt], rows: Mapping[str, Sequence[int]], batch_size: int
) -> Iterator[list[Prompt]]:
    """Batches of similar length: little padding, and the same composition for every intervention."""
    ordered = sorted(prompts, key=lambda p: (len(rows[p.id]), p.id))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start : start + batch_size]


def complete_batch(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    batch: PromptBatch,
    intervention: Intervention,
    decoding: Decoding,
    known: Sequence[Sequence[Completion]],
    *,
    by_row: bool = False,
) -> list[Completion | None]:
    """known: completions of this very batch, row by row, from elsewhere. With `by_row` a row that is in none of them is None
    where others are: it is for another batch."""
    if decoding.do_sample:
        torch.manual_seed(decoding.seed)
    config = decoding.generation_config(backbone)
    with intervention.apply(backbone, batch) as applied:
        stop = _StopIfKnown(applied, known, by_row)
        answers = decode(backbone, batch.input_ids, batch.attention_mask, config, StoppingCriteriaList([stop]))
        states = applied.rows()
    if stop.found is not None:
        return [c and _with_state(c, s) for c, s in zip(stop.found, states, strict=True)]
    rows = zip(prompts, answers.tolist(), states, strict=True)
    return [completion_of(backbone, prompt, tokens, state) for prompt, tokens, state in rows]


def completion_of(backbone: Backbone, prompt: Prompt, tokens: Sequence[int], state: RowState) -> Completion:
    """tokens: the new ones, to the end of the answer or beyond it; without an end among them it was cut."""
    ends = [i for i, token in enumerate(tokens) if token in backbone.eos_ids]
    tokens = tokens[: ends[0]] if ends else tokens
    return Completion(
        id=prompt.id,
        bucket=prompt.bucket.value,
        prompt=prompt.transcript,
        response=backbone.tokenizer.decode(tokens, skip_special_tokens=True),
        n_tokens=len(tokens),
        truncated=not ends,
        **asdict(state),
    )


@torch.inference_mode()
def decode(
    backbone: Backbone,
    ids: Tensor,
    mask: Tensor,
    config: GenerationConfig,
    stopping: StoppingCriteriaList | None = None,
) -> Tensor:
    """ids and mask (n, width), padded on the left -> the new tokens, (n, at most config.max_new_tokens) int64."""
    model = backbone.model
    own = model.generation_config
    # transformers fills whatever `config` leaves open from the model's own defaults: Qwen2.5, say, ships a repetition
    # penalty, which would reshape greedy answers without being recorded anywhere.
    model.generation_config = GenerationConfig()
    try:
        with contiguous_head_input(backbone):
            sequences = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=stopping
            )
    finally:
        model.generation_config = own
    return sequences[:, ids.shape[1] :]


def _with_state(completion: Completion, state: RowState) -> Completion:
    return Completion(**{**asdict(completion), **asdict(state)})


class _StopIfKnown(StoppingCriteria):
    """Ends decoding after the first token where every row was decided as in completions that are there already; with
    `by_row`, where any was: the others are None in `found`."""

    def __init__(self, applied: Applied, known: Sequence[Sequence[Completion]], by_row: bool):
        self.applied, self.known, self.by_row = applied, known, by_row
        self.found: Sequence[Completion | None] | None = None

    def __call__(self, input_ids, scores, **kwargs):
        if self.known:
            states = self.applied.rows()
            sources = [tuple(zip(*self.known, strict=True))] if self.by_row else [[(c,) for c in k] for k in self.known]
            found = ([_alike(row, state) for row, state in zip(rows, states, strict=True)] for rows in sources)
            enough = any if self.by_row else all
            self.found = next((f for f in found if enough(c is not None for c in f)), None)
            self.known = ()  # once: decisions hold
        return torch.full((input_ids.shape[0],), self.found is not None, dtype=torch.bool, device=input_ids.device)


def _alike(candidates: Sequence[Completion], state: RowState) -> Completion | None:
    return next((c for c in candidates if _decided_alike(c, state)), None)


def _decided_alike(completion: Completion, state: RowState) -> bool:
    # Behind a closed gate the mixture is idle. Open gates must agree to the last bit, or the text may not.
    return completion.gate == state.gate and (state.gate == 0.0 or completion.mixture == state.mixture)


def save_completions(completions: Sequence[Completion], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for completion in completions:
            file.write(json.dumps(asdict(completion), ensure_ascii=False) + "\n")
    partial.replace(path)


def load_completions(path: Path) -> list[Completion]:
    with path.open(encoding="utf-8") as file:
        rows = (json.loads(line) for line in file if line.strip())
        return [Completion(**{**r, "mixture": tuple(r["mixture"]) if r["mixture"] else None}) for r in rows]
