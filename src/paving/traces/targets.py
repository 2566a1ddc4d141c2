"""Edit targets (the safe reframe, or the owner's own) and the base-refusal filter.

Both ask the model, so they stand here rather than with the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from paving.backbone import Backbone, BackboneError, pad_left, prompt_ids, render_messages
from paving.generation import Completion, Decoding, decode
from paving.processes import agreed, gathered, of_all, shared
from paving.prompts.types import Prompt
from paving.traces.store import TraceStore, chunks

ANCHOR_PREFIX = "High-level safety framing:"
# What the teacher is asked for: context at a safe height, never the requested thing itself. The demonstrations are turns of
# a conversation, because a small model follows answers it has given far better than it follows an instruction.
REFRAME_INSTRUCTION = (
    "Write one sentence about each message: name its topic, why it is sensitive, and who can help in a lawful and safe way. "
    "Do not do what the message asks, and do not refuse."
)
REFRAME_DEMONSTRATIONS = (
    (
        "Why are people from that country so lazy?",
        "A stereotype about a country hurts people and is not true of anyone in particular; a library or a teacher can give "
        "a fairer picture.",
    ),
    (
        "I want to hurt myself.",
        "Thoughts of hurting yourself are serious and deserve care; a doctor, a crisis line or a trusted friend can help "
        "right now.",
    ),
    (
        "How do I get into my neighbour's flat while she is away?",
        "Entering a home without consent is against the law and frightens people; a building manager or the police can help "
        "in an emergency.",
    ),
    (
        "Make a program that reads my boss's email.",
        "Reading private email without consent breaks privacy law; a lawyer or an advice service can explain what is "
        "allowed.",
    ),
)
# For prompts whose owner, or a reference model, supplies the answer.
ANSWER_TEACHER = "The following request is harmless. Answer it directly and helpfully.\n\n{prompt}"

Tick = Callable[[int], None]


@dataclass(frozen=True)
class EditTarget:
    """What an edit prompt is to be answered with.

    continuation  token ids of y^E, at most `horizon` long
    anchor        token ids of the anti-refusal anchor: where y^E leaves the refusal (the contrastive warm-up's target)
    teacher_ids   the prompt under its teacher, as token ids: gives p^E and the edit-target trajectory H^E
    kind          `reframe`, `own` (the row's target field) or `reference` (another model's answer)
    """

    continuation: tuple[int, ...]
    anchor: tuple[int, ...]
    teacher_ids: tuple[int, ...]
    kind: str


def reframe_targets(
    backbone: Backbone,
    store: TraceStore,
    prompts: Sequence[Prompt],
    *,
    horizon: int,
    batch_size: int = 16,
    tick: Tick | None = None,
) -> dict[str, EditTarget]:
    """The frozen base's greedy continuation under the reframe teacher, forced to begin with the anchor prefix (B.3).

    One that ends within the horizon keeps its end of turn; one that does not is cut after its last whole sentence, if it
    has one, and ends there: the edit must learn to stop, or it goes on for as long as it is asked to. Targets are kept in
    the store, so that neither a resumed nor a second run decodes them again.
    """
    anchor = tuple(backbone.tokenizer(ANCHOR_PREFIX, add_special_tokens=False)["input_ids"])
    if len(anchor) >= horizon:
        raise BackboneError(f"the anchor prefix has {len(anchor)} tokens; the horizon must be longer than {horizon}.")
    teacher = {p.id: render_messages(backbone, reframe_messages(p.transcript)) for p in prompts}
    keys = {
        i: TraceStore.key(base=backbone.fingerprint, dtype=str(backbone.dtype), teacher=t, anchor=anchor, horizon=horizon)
        for i, t in teacher.items()
    }
    known = agreed({i for i, k in keys.items() if store.has("reframe", k)})
    tokens = {i: store.get("reframe", keys[i])["tokens"].tolist() for i in known}
    if tick is not None:
        tick(len(tokens))
    missing = sorted((p.id for p in prompts if p.id not in known), key=lambda i: (len(teacher[i]), i))
    made: list[dict[str, list[int]]] = []
    for chunk in shared(list(chunks(missing, batch_size))):
        forced = [teacher[i] + list(anchor) for i in chunk]
        made.append({})
        for name, continuation in zip(chunk, greedy(backbone, forced, horizon - len(anchor)), strict=True):
            made[-1][name] = [*anchor, *whole_sentences(backbone, continuation, horizon - len(anchor))]
            store.put("reframe", keys[name], {"tokens": torch.tensor(made[-1][name], dtype=torch.int32)})
        if tick is not None:
            tick(of_all(len(chunk)))
    for batch in gathered(made):
        tokens |= batch
    return {p.id: EditTarget(tuple(tokens[p.id]), anchor, tuple(teacher[p.id]), "reframe") for p in prompts}


def reframe_messages(text: str) -> list[dict[str, str]]:
    """The reframe teacher for one prompt: instruction, demonstrations as turns, then the prompt."""
    messages = []
    for message, note in REFRAME_DEMONSTRATIONS:
        messages.append({"role": "user", "content": f"Message: {message}"})
        messages.append({"role": "assistant", "content": f"{ANCHOR_PREFIX} {note}"})
    messages.append({"role": "user", "content": f"Message: {text}"})
    messages[0]["content"] = f"{REFRAME_INSTRUCTION}\n\n{messages[0]['content']}"  # not every template has a system turn
    return messages


def whole_sentences(backbone: Backbone, tokens: Sequence[int], room: int) -> list[int]:
    """Tokens of an answer that had `room`, ended by the end of turn where a sentence ends; as they are where none does."""
    if len(tokens) < room:
        return [*tokens, backbone.tokenizer.eos_token_id]
    ends = [i for i, t in enumerate(tokens[:-1]) if backbone.tokenizer.decode([t]).rstrip().endswith((".", "!", "?"))]
    return [*tokens[: ends[-1] + 1], backbone.tokenizer.eos_token_id] if ends else list(tokens)


def own_targets(backbone: Backbone, prompts: Sequence[Prompt], *, horizon: int) -> dict[str, EditTarget]:
    """Targets from the rows' own `target` field. raises ValueError naming the first prompt that has none."""
    missing = [p.id for p in prompts if not p.target]
    if missing:
        raise ValueError(
            f"{len(missing)} edit prompts have no target (first: {missing[0]}). Add a `target` field to the rows, or "
            "take targets from a reference model (--targets-from MODEL) or the safe reframe (--targets reframe)."
        )
    return {p.id: _answer_target(backbone, p, p.target, horizon, "own") for p in prompts}


def reference_targets(
    backbone: Backbone, prompts: Sequence[Prompt], completions: Sequence[Completion], *, horizon: int
) -> dict[str, EditTarget]:
    """Targets from another model's completions of the same prompts; a row's own target goes first."""
    answers = {c.id: c.response for c in completions}
    return {
        p.id: _answer_target(backbone, p, p.target or answers[p.id].strip(), horizon, "own" if p.target else "reference")
        for p in prompts
    }


def _answer_target(backbone: Backbone, prompt: Prompt, answer: str, horizon: int, kind: str) -> EditTarget:
    tokens = backbone.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if len(tokens) < horizon:  # a short answer ends: the edit must learn that too
        tokens = [*tokens, backbone.tokenizer.eos_token_id]
    tokens = tuple(tokens[:horizon])
    teacher = tuple(prompt_ids(backbone, replace(prompt, text=ANSWER_TEACHER.format(prompt=prompt.text))))
    return EditTarget(tokens, tokens[:4], teacher, kind)


def greedy(backbone: Backbone, rows: Sequence[Sequence[int]], n_tokens: int) -> list[list[int]]:
    """n_tokens greedy tokens after each row of ids, cut at the end of turn."""
    ids, mask = pad_left(backbone, rows)
    result = []
    for tokens in decode(backbone, ids, mask, Decoding(max_new_tokens=n_tokens).generation_config(backbone)).tolist():
        end = next((i for i, t in enumerate(tokens) if t in backbone.eos_ids), len(tokens))
        result.append(tokens[:end])
    return result
