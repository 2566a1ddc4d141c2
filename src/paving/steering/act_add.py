"""Edit-target ActAdd: the difference of two mean states, added at every position."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from paving.backbone import Backbone
from paving.steering.addition import Addition
from paving.steering.answer_pairs import AnswerPairsConfig, answer_states
from paving.steering.material import Material
from paving.steering.row_edits import Positions
from paving.steering.states import Tick, direction


class ActAddConfig(AnswerPairsConfig):
    """positions: where the vector is added, see `Addition`."""

    positions: Positions = "all"


@dataclass(frozen=True)
class ActAdd:
    """x ← x + s · v, v = mean safe-reframe target state − mean base-refusal state (Residual Paving, tables 7 and 18).

    Reconstructed from these two lines of the paper, after arXiv 2308.10248: that the states are means over the answers'
    tokens, and that v is added at every position, is ours. Over the same pairs v is then CAA's `mean`; what differs is that
    CAA leaves the prompt alone.
    """

    vector: Tensor
    layer: int
    positions: Positions
    n_pairs: int
    base_name: str
    base_fingerprint: str

    def editor(self) -> Addition:
        return Addition(self.vector, self.layer, self.positions)


def fit_act_add(
    backbone: Backbone,
    material: Material,
    config: ActAddConfig | None = None,
    *,
    states: tuple[Tensor, Tensor] | None = None,
    tick: Tick | None = None,
) -> ActAdd:
    """States of the training split's edit prompts with their edit targets, and with the base's own refusals.

    states  both at the configured block, where they are known: see `answer_states`

    raises SteeringError without both for every prompt, or where their states do not differ
    """
    config = config or ActAddConfig()
    reframe, refusal = states or answer_states(backbone, material, config, tick=tick)
    vector, layer = direction(reframe, refusal, "mean"), config.layer_of(backbone)
    return ActAdd(vector, layer, config.positions, len(reframe), backbone.name, backbone.fingerprint)
