"""CAST: activation steering of those rows whose prompt meets a condition (arXiv 2409.05907)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor

from paving.backbone import Backbone, PromptBatch
from paving.intervention import Decided
from paving.prompts.types import Bucket, SplitName
from paving.steering.behaviour import Behaviour, BehaviourConfig, behaviour_between, fit_behaviour
from paving.steering.checks import check_base, check_strength
from paving.steering.condition import Condition, ConditionConfig, fit_condition
from paving.steering.material import Material, answered
from paving.steering.states import Tick
from paving.steering.steered import Steered
from paving.training.openings import Openings


@dataclass(frozen=True)
class AnswerCast:
    """CAST turned round: an editor, and the condition that belongs to it as a routing.

    behaviour  vectors of the length of their gap: at strength 1 a state moves as far as an edit target lies from a refusal
    """

    behaviour: Behaviour
    condition: Condition

    @contextmanager
    def editing(self, backbone: Backbone, batch: PromptBatch, strength: Tensor) -> Iterator[None]:
        with self.behaviour.editing(backbone, batch, strength):
            yield


OPENING = 12  # tokens of an answer that are its opening: where refusals and reframes part


@dataclass(frozen=True)
class ConditionalSteering:
    """h_l ← h_l + f(sim(h_c, P_c h_c)) · s · v_l, with f 1 where the prompt meets the condition and 0 elsewhere.

    The condition is read in a first, unedited pass over the prompts, so that it may stand in any layer, below or above
    the edited ones; it costs that pass. CAST's code reads it on the way and therefore only below the first edit, and
    reads row 0 for the whole batch, with the decision kept on a class. Here each row has its own.

    strength  s, as in `ActivationSteering`
    """

    behaviour: Behaviour
    condition: Condition
    strength: float = 1.0
    name: str = "cast"

    def __post_init__(self) -> None:
        check_strength(self.strength, "strength")

    @contextmanager
    def apply(self, backbone: Backbone, batch: PromptBatch) -> Iterator[Decided]:
        """The rows' `logit` is the margin by which the condition is met or missed.

        raises BackboneError on another base than the one it was fitted on
        """
        base = self.behaviour.base_name, self.behaviour.base_fingerprint
        with Steered(self.name, self.behaviour, self.condition, self.strength, *base).apply(backbone, batch) as decided:
            yield decided


def fit_answer_cast(
    backbone: Backbone,
    material: Material,
    behaviour: BehaviourConfig | None = None,
    condition: ConditionConfig | None = None,
    *,
    tick: Tick | None = None,
) -> AnswerCast:
    """From the base's refusals of edit prompts towards their edit targets, where a prompt looks like an edit prompt rather
    than like a keep.

    raises as `fit_behaviour` and `fit_condition`
    """
    prompts = material.of(SplitName.TRAIN, Bucket.EDIT)

    def without_end(answers: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
        """A short target ends within its opening, where a refusal does not: the vector would point to the end of a turn."""
        return {p.id: [t for t in answers[p.id] if t not in backbone.eos_ids] for p in prompts}

    both = (without_end(material.answers), without_end(material.targets))
    refusals, targets = (answered(backbone, prompts, answers, length=OPENING) for answers in both)
    keeps = [p for b in (Bucket.BENIGN_KEEP, Bucket.HARMFUL_KEEP) for p in material.of(SplitName.TRAIN, b)]
    others = random.Random(material.seed).sample(keeps, len(keeps))
    n = max(len(prompts), len(others))  # PCA of pairs wants as many of both; the shorter side is gone through again
    pairs = [(prompts[i % len(prompts)], others[i % len(others)]) for i in range(n)]
    config = behaviour or BehaviourConfig()
    found = behaviour_between(backbone, refusals, targets, config, tick=tick)
    found = replace(found, vectors={layer: v * found.gaps[layer] for layer, v in found.vectors.items()})
    return AnswerCast(found, fit_condition(backbone, pairs, condition, tick=tick))


def fit_cast(
    backbone: Backbone,
    pairs: Sequence[tuple[str, str]],
    openings: Openings,
    behaviour: BehaviourConfig | Behaviour | None = None,
    condition: ConditionConfig | None = None,
    *,
    tick: Tick | None = None,
) -> ConditionalSteering:
    """pairs: (harmful, benign) request texts of one category. behaviour: how to fit it, or one that is fitted already.

    The condition contrasts the category with its benign counterparts; CAST's own category experiment contrasts it with
    four other categories as well.
    """
    if isinstance(behaviour, Behaviour):
        check_base(backbone, behaviour.base_name, behaviour.base_fingerprint, "the behaviour")
    else:
        behaviour = fit_behaviour(backbone, [benign for _, benign in pairs], openings, behaviour, tick=tick)
    return ConditionalSteering(behaviour, fit_condition(backbone, pairs, condition, tick=tick))
