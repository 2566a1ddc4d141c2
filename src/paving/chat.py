"""A terminal chat with a paved model that shows what the controller decided for every turn."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.console import Console
from rich.markup import escape

from paving.backbone import render_messages
from paving.controller.conformal import PValues, Reference
from paving.controller.paved_model import PavedModel
from paving.intervention import RowState


def chat_loop(
    paved: PavedModel, console: Console, *, max_new_tokens: int, lines: Iterable[str], system: str | None = None
) -> None:
    """Read one turn a line until end of input or `/quit`; `/reset` forgets the conversation.

    system: what every conversation begins with; None: the prompt that the controller was fitted behind, if any
    """
    system = paved.system if system is None else system
    opening = [{"role": "system", "content": system}] if system else []
    console.print(f"[dim]{escape(paved.controller.base_name)} with {paved.controller.policy.name} gate, scale "
                  f"{paved.controller.scale:g}. /reset starts over, /quit ends.[/]")  # fmt: skip
    messages: list[dict[str, str]] = [*opening]
    console.print("[bold]you>[/] ", end="")
    for line in lines:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            messages[:] = opening
        elif text:
            messages.append({"role": "user", "content": text})
            answer, row = turn(paved, messages, max_new_tokens)
            messages.append({"role": "assistant", "content": answer})
            console.print(f"[dim]{describe(row, paved.controller.reference)}[/]")
            console.print(escape(answer))
        console.print("[bold]you>[/] ", end="")


def turn(paved: PavedModel, messages: list[dict[str, str]], max_new_tokens: int) -> tuple[str, RowState]:
    """The answer to a conversation, and the decision that was taken for it."""
    ids = torch.tensor([render_messages(paved._backbone, messages)])
    output, rows = paved.generate(ids, max_new_tokens=max_new_tokens, do_sample=False, return_gates=True)
    return paved.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True), rows[0]


def describe(row: RowState, reference: Reference | None = None) -> str:
    parts = [f"gate {row.gate:.3f} ({'open' if row.gate > 0 else 'closed'})"]
    if row.logit is not None:
        parts.append(f"logit {row.logit:+.2f}")
        if reference is not None:
            parts.append(evidence(reference.p_values(row.logit)) + ("" if reference.apart else " (out of fold)"))
    if row.veto is not None:
        parts.append(f"veto {'yes' if row.veto else 'no'}")
    if row.mixture is not None:
        parts.append("mixture " + " / ".join(f"{w:.2f}" for w in row.mixture))
    return ", ".join(parts)


def evidence(p: PValues) -> str:
    """`p(edit) 0.310, p(harmful keep) 0.030`: low speaks against the bucket."""
    shown = ((name.replace("_", " "), value) for name, value in p._asdict().items())
    return ", ".join(f"p({name}) {'n/a' if value is None else format(value, '.3f')}" for name, value in shown)
