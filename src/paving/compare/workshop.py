"""What methods are fitted with: base and material, and what several of them begin with, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paving.backbone import Backbone
from paving.prompts.types import Bucket, Prompt, SplitName
from paving.steering.answer_pairs import AnswerPairsConfig, states_of_answers
from paving.steering.best_block import BestBlock, best_block
from paving.steering.checks import SteeringError
from paving.steering.dim import Dim, DimConfig, fit_dim
from paving.steering.material import Material
from paving.steering.refusal_score import RefusalTokens, prompt_scores, refusal_tokens
from paving.steering.repit_place import Place, best_place
from paving.steering.steered import Editor
from paving.training.prepare import Stage


@dataclass(frozen=True)
class Workshop:
    """stage(what, n) gives a tick; say takes a line."""

    backbone: Backbone
    material: Material
    stage: Stage
    say: Callable[[str], None]

    @property
    def dim(self) -> Dim:
        """The refusal direction that ablation, act-sub, orthogonalisation, RDO and RepIt begin with.

        Where none keeps to the published limits they are widened, and `dim_note` says so.

        raises SteeringError where no direction keeps to any
        """
        if isinstance(self._dim, SteeringError):
            raise self._dim
        return self._dim

    @property
    def dim_note(self) -> str:
        """Empty where the direction keeps to the published limits, and was read of prompts that the base tells apart."""
        held, published = self.dim.limits, DimConfig().limits()
        whole = [
            f"all {n} {bucket.replace('_', ' ')} prompts are read, of which the refusal score tells {wanted} as wanted"
            for bucket, (read, wanted, n) in self.dim.read.items()
            if read > wanted
        ]
        if held == published:
            return "; ".join(whole)
        induced = "" if held.induced == published.induced else ", and none on induced refusal,"
        widened = (
            f"no direction keeps to DIM's published limit (KL {published.kl:g} on benign prompts); chosen under {held.kl:g}"
            f"{induced} instead: block {self.dim.chosen.layer}, KL {self.dim.chosen.kl:.2f}"
        )
        return "; ".join([widened, *whole])

    @cached_property
    def _dim(self) -> Dim | SteeringError:
        """Kept also where there is none: five methods ask, and the search takes minutes."""
        try:
            return fit_dim(self.backbone, self.material, DimConfig(last_positions=None, widen=True), stage=self.stage)
        except SteeringError as error:
            return error

    @cached_property
    def repit_place(self) -> Place:
        """raises SteeringError where no place keeps to any limit"""
        return best_place(self.backbone, self.material, self.refusals_begin_with, stage=self.stage)

    @cached_property
    def answer_states(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Block -> (safe reframes, refusals), each (n_pairs, d_model): of every other block in the middle three fifths."""
        layers = range(self.backbone.n_layers // 5, 4 * self.backbone.n_layers // 5, 2)
        tick = self.stage("answers read", 2 * len(self.material.of(SplitName.TRAIN, Bucket.EDIT)))
        config = AnswerPairsConfig()
        both = states_of_answers(self.backbone, self.material, layers, config, tick=tick)
        return {layer: (both[0][:, i], both[1][:, i]) for i, layer in enumerate(layers)}

    def best_block(self, what: str, editor_at: Callable[[int, tuple[Tensor, Tensor]], Editor]) -> BestBlock:
        """The block for an answer vector. editor_at: (block, its states) -> what would be added there"""
        states = self.answer_states
        return best_block(
            self.backbone, self.material, lambda layer: editor_at(layer, states[layer]), states,
            answer_tokens=AnswerPairsConfig().answer_tokens, tick=self.stage(f"{what}: blocks", len(states)),
        )  # fmt: skip

    @cached_property
    def refusals_begin_with(self) -> RefusalTokens:
        return refusal_tokens(self.material)

    def refusal_scores(self, prompts: Sequence[Prompt], editor: Editor | None = None) -> dict[str, float]:
        """Prompt id -> log-odds that its answer begins as the base's refusals do, with `editor` at strength 1 if given."""
        return prompt_scores(self.backbone, prompts, self.refusals_begin_with, editor)

    def no_longer_refused(self, editor: Editor) -> tuple[float, float]:
        """Of the calibration prompts whose refusal begins under the base: the shares of edit prompts and of harmful keeps
        where it does no longer.

        raises SteeringError where the base refuses none of a bucket so: what an edit costs there cannot be told
        """
        shares = []
        for bucket in (Bucket.EDIT, Bucket.HARMFUL_KEEP):
            prompts = self._refused(bucket)
            if not prompts:
                raise SteeringError(
                    f"no refusal of the calibration's {bucket.value} prompts begins as those of edit prompts do, so that "
                    "strengths cannot be told apart by it. Give calibration prompts that the base refuses."
                )
            scores = self.refusal_scores(prompts, editor)
            shares.append(sum(s < 0 for s in scores.values()) / len(scores))
        return shares[0], shares[1]

    def _refused(self, bucket: Bucket) -> list[Prompt]:
        prompts = self.material.of(SplitName.CALIBRATION, bucket)
        base = self.refusal_scores(prompts)
        return [p for p in prompts if base[p.id] > 0]

    @cached_property
    def refusal_confidence(self) -> dict[str, float]:
        """Prompt id -> probability that the base's answer begins as its refusals do, train and calibration prompts."""
        prompts = [p for s in (SplitName.TRAIN, SplitName.CALIBRATION) for b in Bucket for p in self.material.of(s, b)]
        scores = self.refusal_scores(prompts)
        return {i: torch.tensor(s, dtype=torch.float64).sigmoid().item() for i, s in scores.items()}
