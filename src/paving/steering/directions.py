"""Mean states of prompts at the tokens behind the instruction, for every layer in one pass over the prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paving.backbone import Backbone, pad_left
from paving.steering.checks import SteeringError
from paving.steering.states import Tick, read_states
from paving.traces.store import chunks


def post_instruction_tokens(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all rendered prompts end with alike: the chat template after the user's text; 1 where it adds none.

    rows  token ids of prompts. A last word that every one of them has would be counted, too

    raises SteeringError where no two prompts differ
    """
    for n, tokens in enumerate(zip(*(reversed(row) for row in rows), strict=False)):
        if len(set(tokens)) > 1:
            return max(n, 1)
    if len({len(row) for row in rows}) > 1:  # the shortest prompt is nothing but what all end with
        return min(len(row) for row in rows)
    raise SteeringError(
        f"the tokens behind the instruction are those that different prompts end with alike; {len(rows)} prompts were "
        "given, and no two of them differ. Give two different ones."
    )


@torch.no_grad()
def position_means(
    backbone: Backbone, rows: Sequence[Sequence[int]], n_positions: int, *, batch_size: int = 16, tick: Tick | None = None
) -> Tensor:
    """Mean block output at the last tokens of the rows: (n_layers, n_positions, d_model) float32, on the CPU.

    n_positions  [:, -1] of the result belongs to the rows' last token
    tick         called with how many more rows are done

    Every row is run once, whatever the number of layers and positions. Only sums are kept, in float64, so memory does not
    grow with the rows.

    raises SteeringError for rows shorter than n_positions
    """
    shortest = min((len(row) for row in rows), default=0)
    if not 1 <= n_positions <= shortest:
        raise SteeringError(
            f"cannot read the last {n_positions} tokens: the shortest of {len(rows)} rows has {shortest}. "
            f"1 to {shortest} are possible."
        )

    def summed(resid: Tensor) -> Tensor:
        return resid[:, -n_positions:].float().sum(0)

    layers = range(backbone.n_layers)
    total = torch.zeros((backbone.n_layers, n_positions, backbone.d_model), dtype=torch.float64)
    for chunk in chunks(sorted(rows, key=len), batch_size):
        seen = read_states(backbone, *pad_left(backbone, chunk), layers, summed)
        total += torch.stack([seen[layer] for layer in layers]).cpu().double()
        if tick is not None:
            tick(len(chunk))
    return (total / len(rows)).float()
