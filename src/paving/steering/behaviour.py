"""The refusal direction that activation steering adds, one vector a layer, and how it is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.backbone.hooks import Edit, edit_residuals
from paving.steering.row_edits import Positions, adding, row_edit
from paving.steering.states import Extraction, Tick, direction, tail_means
from paving.training.opening_examples import Example, opening_examples
from paving.training.openings import Openings


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
    """vectors: layer -> (d_model,) float32, from one kind of answers to the other (`fit_behaviour`: from compliance to
    refusal). gaps: layer -> how far apart the two lie.

    A gap is the mean of the difference of their states along the vector, in residual units: at a strength of the gap
    (vectors of length 1), a state moves as far as one kind of answer lies from the other.
    """

    vectors: Mapping[int, Tensor]
    gaps: Mapping[int, float]
    positions: Positions
    base_name: str
    base_fingerprint: str

    def edits(self, batch: PromptBatch, strength: Tensor) -> dict[int, Edit]:
        """Hooks for `edit_residuals` that add strength · v, for one batch from its first pass on. strength: (n,) float32."""
        return {layer: row_edit(adding(v), strength, batch, self.positions) for layer, v in self.vectors.items()}

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        """The behaviour as an editor of `Steered`."""
        with edit_residuals(backbone, self.edits(batch, strength)):
            yield


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

    def examples(phrases: Sequence[str]) -> list[Example]:
        drawn = (opening_examples(backbone, prompts, phrases, seed=config.seed, epoch=d) for d in range(config.draws))
        return [example for draw in drawn for example in draw]

    return behaviour_between(backbone, examples(openings.compliance), examples(openings.refusal), config, tick=tick)


def behaviour_between(
    backbone: Backbone,
    away_from: Sequence[Example],
    towards: Sequence[Example],
    config: BehaviourConfig,
    *,
    tick: Tick | None = None,
) -> Behaviour:
    """Per layer, the direction from one kind of answers to another on the same prompts.

    away_from, towards  prompts with answers, row i of one being the counterpart of row i of the other
    raises as `fit_behaviour`
    """
    layers = config.layers or middle_third(backbone.n_layers)
    backbone.check_layers(layers, "behaviour")

    def states(examples: Sequence[Example]) -> Tensor:
        tails = [len(e.answer) if config.read == "opening" else 1 for e in examples]
        rows = [e.prompt + e.answer for e in examples]
        return tail_means(backbone, rows, tails, layers, batch_size=config.batch_size, tick=tick)

    positive, negative = states(towards), states(away_from)
    vectors, gaps = {}, {}
    for i, layer in enumerate(layers):
        vectors[layer] = vector = direction(positive[:, i], negative[:, i], config.extraction)
        gaps[layer] = float(((positive[:, i] - negative[:, i]) @ (vector / vector.norm())).mean())
    return Behaviour(vectors, gaps, config.positions, backbone.name, backbone.fingerprint)


def middle_third(n_layers: int) -> tuple[int, ...]:
    first = n_layers // 3
    return tuple(range(first, max(2 * n_layers // 3, first + 1)))
