"""CAA: contrastive activation addition, from refusal to safe reframe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from paving.backbone import Backbone
from paving.steering.addition import Addition
from paving.steering.answer_pairs import AnswerPairsConfig, answer_states
from paving.steering.material import Material
from paving.steering.states import Tick, direction


class CaaConfig(AnswerPairsConfig):
    """extraction: `mean` (CAA) or `pca_pairwise` (Residual Paving, table 7: PCA of pairwise differences)."""

    extraction: Literal["mean", "pca_pairwise"] = "pca_pairwise"


@dataclass(frozen=True)
class Caa:
    """h_l ← h_l + s · v at every position after the prompt, v = mean(positive − negative) (arXiv 2312.06681).

    vector  v, (d_model,) float32, from refusal to safe reframe. For `pca_pairwise` the first principal component of the
            pairs' differences, what their mean has along it: at s = 1 either extraction moves a state as far as safe
            reframes lie from refusals. That length is ours; the paper gives none.
    """

    vector: Tensor
    layer: int
    n_pairs: int
    base_name: str
    base_fingerprint: str

    def editor(self) -> Addition:
        return Addition(self.vector, self.layer, "answer")


def fit_caa(
    backbone: Backbone,
    material: Material,
    config: CaaConfig | None = None,
    *,
    states: tuple[Tensor, Tensor] | None = None,
    tick: Tick | None = None,
) -> Caa:
    """Positive: a training edit prompt and its edit target. Negative: the same prompt and the base's own refusal.

    states  (positive, negative) at the configured block, where they are known: see `answer_states`

    CAA's own pairs are multiple-choice questions that differ in the letter of the answer, where it reads that letter's
    state; these have answers of several tokens, whose mean is read.

    raises SteeringError without such pairs, or where their states do not differ
    """
    config = config or CaaConfig()
    reframe, refusal = states or answer_states(backbone, material, config, tick=tick)
    vector = direction(reframe, refusal, config.extraction)
    if config.extraction == "pca_pairwise":
        vector = vector * ((reframe - refusal) @ vector).mean()
    return Caa(vector, config.layer_of(backbone), len(reframe), backbone.name, backbone.fingerprint)
