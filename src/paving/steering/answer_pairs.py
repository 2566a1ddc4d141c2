"""Pairs of answers to the same edit prompt: the safe reframe that is wanted, and the refusal that the base gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from paving.backbone import Backbone, checked_ids
from paving.prompts.types import Bucket, SplitName
from paving.steering.checks import SteeringError
from paving.steering.material import Material
from paving.steering.states import Tick, tail_means


class AnswerPairsConfig(BaseModel):
    """What is read of the training split's edit prompts, for methods that contrast their two answers.

    layer          block whose output is read and edited; default: at two fifths of the depth (block 12 of 30). CAA's best
                   layer of Llama-2-7B is 13 of 32; its authors sweep, as `best_block` does
    answer_tokens  of both answers at most so many are read, the end of turn left out: the horizon of Residual Paving
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int | None = Field(None, ge=0)
    answer_tokens: int = Field(12, ge=1)
    batch_size: int = Field(16, ge=1)

    def layer_of(self, backbone: Backbone) -> int:
        """raises BackboneError for a layer that does not exist"""
        layer = self.layer if self.layer is not None else 2 * backbone.n_layers // 5
        backbone.check_layers((layer,), "steering")
        return layer


def answer_states(
    backbone: Backbone, material: Material, config: AnswerPairsConfig, *, tick: Tick | None = None
) -> tuple[Tensor, Tensor]:
    """(safe reframe, refusal), both (n_pairs, d_model) float32: mean block output over the answer's tokens.

    Row i of both is the same training edit prompt. tick: called as of 2 · n_pairs texts n more are done

    raises SteeringError where the base's own answer, or an answer's first token, is missing
    """
    positive, negative = states_of_answers(backbone, material, (config.layer_of(backbone),), config, tick=tick)
    return positive[:, 0], negative[:, 0]


def states_of_answers(
    backbone: Backbone,
    material: Material,
    layers: Sequence[int],
    config: AnswerPairsConfig,
    *,
    tick: Tick | None = None,
) -> tuple[Tensor, Tensor]:
    """As `answer_states`, of several blocks in one pass: both (n_pairs, n_layers, d_model) float32."""
    prompts = material.of(SplitName.TRAIN, Bucket.EDIT)

    def states(side: Literal["targets", "answers"]) -> Tensor:
        known = getattr(material, side)
        rows, tails = [], []
        for prompt in prompts:
            answer = [t for t in known.get(prompt.id, ()) if t not in backbone.eos_ids][: config.answer_tokens]
            if not answer:
                raise SteeringError(
                    f"training edit prompt {prompt.id} has no tokens in Material.{side}, so it makes no pair of safe "
                    "reframe and refusal. Give both for every edit prompt, or leave the prompt out."
                )
            rows.append([*checked_ids(backbone, prompt, room=len(answer)), *answer])
            tails.append(len(answer))
        return tail_means(backbone, rows, tails, layers, batch_size=config.batch_size, tick=tick)

    with torch.no_grad():
        return states("targets"), states("answers")
