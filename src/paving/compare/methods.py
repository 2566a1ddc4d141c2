"""The comparators that `paving compare` knows. Adding one is a file in steering/ and an entry here (docs/comparators.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from paving.compare.workshop import Workshop
from paving.evaluation.comparison import BASE, OWN
from paving.prompts.types import Bucket, SplitName
from paving.steering.act_add import fit_act_add
from paving.steering.caa import CaaConfig, fit_caa
from paving.steering.cast import AnswerCast, fit_answer_cast
from paving.steering.rdo import RDOConfig, fit_rdo
from paving.steering.repit import fit_repit
from paving.steering.steered import Editor, Routing
from paving.steering.weight_steering import WeightEditor, WeightSteeringConfig, fit_answer_weights
from paving.steering.wrmd import fit_wrmd

SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
VARIANTS = ("global", "probe", "probe+veto", "oracle")
OWN_ROUTING = "own"


@dataclass(frozen=True)
class Noted:
    """A fitted method, and what a reader must know of this fit; an empty note is none."""

    editor: Editor
    note: str


Fit = Callable[[Workshop], Editor | Noted]


@dataclass(frozen=True)
class Method:
    """One comparator.

    name      as in tables and file names: letters, digits and -
    fit       what it is fitted with -> what it does to a row. SteeringError where it cannot be: its rows are n/a
    scales    tried in ascending order
    variants  of `VARIANTS`, the routings it can be measured under (a weight edit: `global` alone), and `own`
    own       the routing that belongs to the method itself (CAST's condition), for the variant `own`
    note      what a reader of the table must know, such as "reconstructed from a description"; may be empty
    version   raised when the recipe changes: saved sweeps and answers of another version are measured again
    """

    name: str
    fit: Fit
    scales: tuple[float, ...] = SCALES
    variants: tuple[str, ...] = VARIANTS
    note: str = ""
    own: Callable[[Editor], Routing] | None = None
    version: int = 1

    def __post_init__(self) -> None:
        allowed = (*VARIANTS, OWN_ROUTING) if self.own else VARIANTS
        if not self.variants or not set(self.variants) <= set(allowed):
            raise ValueError(f"{self.name}: variants are {self.variants}; allowed: {', '.join(allowed)}, at least one.")
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"{self.name}: scales are {self.scales}; at least one, and each above 0 (0 is the base).")
        if not re.fullmatch(r"[A-Za-z0-9-]+", self.name) or self.name in (BASE, OWN):
            raise ValueError(f"{self.name!r} cannot name a method: letters, digits and - only, and not {BASE} or {OWN}.")


def method(name: str, table: Sequence[Method]) -> Method:
    """raises ValueError naming what is allowed."""
    found = next((m for m in table if m.name == name), None)
    if found is None:
        raise ValueError(f"the method {name!r} is not known; allowed: {', '.join(m.name for m in table)}.")
    return found


def check_variants(names: Sequence[str], chosen: Sequence[Method]) -> None:
    """raises ValueError for a variant that none of the methods has."""
    offered = list(dict.fromkeys(v for m in chosen for v in m.variants))
    if unknown := [v for v in names if v not in offered]:
        raise ValueError(
            f"the variant {unknown[0]!r} is none of {', '.join(m.name for m in chosen)}; allowed: {', '.join(offered)}."
        )


# --- the entries ------------------------------------------------------------------------------------------------


def _caa(shop: Workshop) -> Editor:
    return fit_caa(shop.backbone, shop.material, tick=_two_answers(shop, "CAA")).editor()


def _caa_mean(shop: Workshop) -> Editor:
    config = CaaConfig(extraction="mean")
    return fit_caa(shop.backbone, shop.material, config, tick=_two_answers(shop, "CAA, mean")).editor()


def _act_add(shop: Workshop) -> Editor:
    return fit_act_add(shop.backbone, shop.material, tick=_two_answers(shop, "ActAdd")).editor()


def _rdo(shop: Workshop) -> Editor:
    dim, config = shop.dim, RDOConfig()
    tick = shop.stage("GoR-RDO (steps)", config.steps)
    found = fit_rdo(
        shop.backbone, shop.material, initial=dim.direction, layer=dim.chosen.layer, alpha=float(dim.direction.norm()),
        config=config, watch=lambda _step, _loss: tick(1),
    )  # fmt: skip
    step = (
        f"the direction of step {found.best_step} of {len(found.losses)}" if found.best_step else "no step improved on DIM"
    )
    return Noted(found.editor(), "; ".join(filter(None, (step, shop.dim_note))))


def _repit(shop: Workshop) -> Editor:
    where = shop.dim.chosen
    found = fit_repit(shop.backbone, shop.material, shop.no_longer_refused, layer=where.layer, position=where.position)
    kept = "" if found.within_limit else ", the least non-target success: no ρ keeps to its limit"
    return Noted(found, "; ".join(filter(None, (f"ρ {found.rho:g}{kept}", shop.dim_note))))


def _wrmd(shop: Workshop) -> Editor:
    return fit_wrmd(shop.backbone, shop.material, shop.refusal_confidence)


def _cast(shop: Workshop) -> AnswerCast:
    return fit_answer_cast(shop.backbone, shop.material)


def _ws(shop: Workshop) -> Editor:
    config = WeightSteeringConfig(epochs=2, seed=shop.material.seed)
    return WeightEditor(fit_answer_weights(shop.backbone, shop.material, config, say=shop.say))


def _two_answers(shop: Workshop, what: str):
    return shop.stage(f"{what}: answers read", 2 * len(shop.material.of(SplitName.TRAIN, Bucket.EDIT)))


PROJECTION = (0.5, 1.0)  # nothing is left to take away beyond 1
RECONSTRUCTED = "reconstructed from a description"

METHODS = (
    Method("caa", _caa, note="PCA of pairwise differences; its layer is ours (two fifths of the depth)"),
    Method("caa-mean", _caa_mean, note="mean difference; its layer is ours (two fifths of the depth)"),
    Method("act-add", _act_add, note=f"{RECONSTRUCTED} (tables 7 and 18); its layer is ours"),
    Method("dim-ablation", lambda shop: Noted(shop.dim.ablation(), shop.dim_note), PROJECTION, version=2),
    Method(
        "dim-act-sub", lambda shop: Noted(shop.dim.act_sub(), shop.dim_note),
        note="refusal-direction ActAdd at coefficient -1 is the same", version=2,
    ),
    Method(
        "orthogonal", lambda shop: Noted(shop.dim.orthogonal(), shop.dim_note), (1.0,), ("global",),
        note="an edit of weights: all rows alike", version=2,
    ),
    Method("rdo", _rdo, PROJECTION, note="100 steps; targets are edit targets", version=2),
    Method("repit", _repit, PROJECTION, note="layer and token are DIM's; rho by the first token of the answer", version=2),
    Method("wrmd", _wrmd, (0.25, *SCALES[:4]), note=f"{RECONSTRUCTED}; confidence is the base's first-token probability"),
    Method(
        "cast", _cast, (0.05, 0.1, 0.2, 0.4, 0.8), ("global", OWN_ROUTING, "oracle"),
        note="towards edit targets; own: its condition, edit prompts against keeps", own=lambda editor: editor.condition,
    ),
    Method("ws", _ws, SCALES[:4], ("global",), note="two epochs; an edit of weights: all rows alike", version=2),
)  # fmt: skip
