"""The refusal direction that activation steering adds, one vector a layer, and how it is added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import Edit
from paving.steering.states import Extraction, Tick, direction, tail_means
from paving.training.opening_examples import opening_examples
from paving.training.openings import Openings

Positions = Literal["all", "answer"]


class BehaviourConfig(BaseModel):
    """How a behaviour is extracted.

    layers       blocks whose output is edited; default: the middle third (blocks 10-19 of 30)
    extraction   see `paving.steering.states.direction`
    read         where states are read: mean over the `opening` (CAST), or its `last` token
    positions    where the vector is added: `all` (CAST: the whole prompt and the answer), or `answer`: from the last
                 prompt token on, where Residual Paving edits
    draws        openings drawn for each prompt
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[int, ...] | None = Field(None, min_length=1)
    extraction: Extraction = "pca_pairwise"
    read: Literal["opening", "last"] = "opening"
    positions: Positions = "all"
    draws: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    seed: int = 0


@dataclass(frozen=True)
class Behaviour:
    """vectors: layer -> (d_model,) float32, from compliance to refusal. gaps: layer -> how far apart the two lie.

    A gap is the mean of (refusal state − compliance state) along the vector, in residual units: at a strength of the
    gap (vectors of length 1), a state moves as far as a refusal opening lies from a compliance opening.
    """

    vectors: Mapping[int, Tensor]
    gaps: Mapping[int, float]
    positions: Positions
    base_name: str
    base_fingerprint: str

    def edits(self, batch: PromptBatch, strength: float, rows: Tensor | None = None) -> dict[int, Edit]:
        """Hooks for `edit_residuals` that add strength · v, for one batch from its first pass on.

        rows  (n,) bool, the rows to be edited; None: all
        """
        return {layer: self._edit(vector * strength, batch, rows) for layer, vector in self.vectors.items()}

    def _edit(self, added: Tensor, batch: PromptBatch, rows: Tensor | None) -> Edit:
        begin = 0 if self.positions == "all" else batch.width - 1
        columns = 0  # that this block has seen in earlier passes

        def edit(resid: Tensor) -> Tensor | None:
            nonlocal columns
            first = max(0, begin - columns)
            columns += resid.shape[1]
            if first >= resid.shape[1]:
                return None
            vector = added.to(resid)
            if rows is None and first == 0:
                return resid + vector
            chosen = slice(None)
            if rows is not None:  # several samples a prompt follow their prompt's row
                chosen = rows.to(resid.device).repeat_interleave(len(resid) // len(rows)).nonzero().squeeze(-1)
            edited = resid.clone()  # rows that are not chosen keep the base's bits
            edited[chosen, first:] = resid[chosen, first:] + vector
            return edited

        return edit


def fit_behaviour(
    backbone: Backbone,
    prompts: Sequence[str],
    openings: Openings,
    config: BehaviourConfig | None = None,
    *,
    tick: Tick | None = None,
) -> Behaviour:
    """Per layer, the direction from (prompt + compliance opening) to (prompt + refusal opening) (CAST, section 3).

    prompts  request texts; CAST takes benign ones, so that the direction holds no trace of the requests refused
    tick     called with how many of the 2 · draws · len(prompts) texts are done

    raises BackboneError for a layer that does not exist; SteeringError where the two kinds of states do not differ
    """
    config = config or BehaviourConfig()
    layers = config.layers or middle_third(backbone.n_layers)
    backbone.check_layers(layers, "behaviour")

    def states(phrases: Sequence[str]) -> Tensor:
        examples = [
            example
            for draw in range(config.draws)
            for example in opening_examples(backbone, prompts, phrases, seed=config.seed, epoch=draw)
        ]
        tails = [len(e.answer) if config.read == "opening" else 1 for e in examples]
        rows = [e.prompt + e.answer for e in examples]
        return tail_means(backbone, rows, tails, layers, batch_size=config.batch_size, tick=tick)

    refusing, complying = states(openings.refusal), states(openings.compliance)
    vectors, gaps = {}, {}
    for i, layer in enumerate(layers):
        vectors[layer] = vector = direction(refusing[:, i], complying[:, i], config.extraction)
        gaps[layer] = float(((refusing[:, i] - complying[:, i]) @ (vector / vector.norm())).mean())
    return Behaviour(vectors, gaps, config.positions, backbone.name, backbone.fingerprint)


def middle_third(n_layers: int) -> tuple[int, ...]:
    first = n_layers // 3
    return tuple(range(first, max(2 * n_layers // 3, first + 1)))
