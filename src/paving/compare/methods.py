"""The comparators that `paving compare` knows. Adding one is a file in steering/ and an entry here (docs/comparators.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from paving.backbone import Backbone
from paving.compare.workshop import Workshop
from paving.evaluation.comparison import BASE, OWN
from paving.steering.act_add import ActAddConfig, fit_act_add
from paving.steering.caa import CaaConfig, fit_caa
from paving.steering.cast import AnswerCast, fit_answer_cast
from paving.steering.rdo import RDOConfig, fit_rdo
from paving.steering.repit import fit_repit
from paving.steering.repit_place import PlaceConfig
from paving.steering.steered import Editor, Routing
from paving.steering.weight_delta import load_weight_delta, save_weight_delta
from paving.steering.weight_steering import WeightEditor, WeightSteeringConfig, fit_answer_weights
from paving.steering.wrmd import fit_wrmd

# The paper sweeps 0.5 to 16 (table 18); what moves a keep too far at 0.5 may pass the strict limits below it.
SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
VARIANTS = ("global", "probe", "probe+veto", "oracle")
OWN_ROUTING = "own"


@dataclass(frozen=True)
class Noted:
    """A fitted method, and what a reader must know of this fit; an empty note is none."""

    editor: Editor
    note: str


Fit = Callable[[Workshop], Editor | Noted]


@dataclass(frozen=True)
class Stored:
    """How a fit that takes long, and says nothing that a reader must know, is kept on disk until its comparison is finished.
    save: (editor, path). Both raise SteeringError where they cannot"""

    save: Callable[[Editor, Path], None]
    load: Callable[[Path, Backbone], Editor]


@dataclass(frozen=True)
class Method:
    """One comparator.

    name      as in tables and file names: letters, digits and -
    fit       what it is fitted with -> what it does to a row. SteeringError where it cannot be: its rows are n/a
    scales    tried in ascending order
    variants  of `VARIANTS`, the routings it can be measured under (a weight edit: `global` alone), and `own`
    own       the routing that belongs to the method itself (CAST's condition), for the variant `own`
    note      what a reader of the table must know, such as "reconstructed from a description"; may be empty
    stored    where fitting again after a kill would cost minutes
    version   raised when the recipe changes: saved sweeps and answers of another version are measured again
    """

    name: str
    fit: Fit
    scales: tuple[float, ...] = SCALES
    variants: tuple[str, ...] = VARIANTS
    note: str = ""
    own: Callable[[Editor], Routing] | None = None
    stored: Stored | None = None
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


Extraction = Literal["mean", "pca_pairwise"]


def _caa(shop: Workshop) -> Noted:
    return _answer_vector(shop, "CAA", lambda layer, states: _caa_at(shop, layer, states, "pca_pairwise"))


def _caa_mean(shop: Workshop) -> Noted:
    return _answer_vector(shop, "CAA, mean", lambda layer, states: _caa_at(shop, layer, states, "mean"))


def _act_add(shop: Workshop) -> Noted:
    def at(layer: int, states: tuple[Tensor, Tensor]) -> Editor:
        return fit_act_add(shop.backbone, shop.material, ActAddConfig(layer=layer), states=states).editor()

    return _answer_vector(shop, "ActAdd", at)


def _caa_at(
    shop: Workshop, layer: int, states: tuple[Tensor, Tensor], extraction: Literal["mean", "pca_pairwise"]
) -> Editor:
    return fit_caa(shop.backbone, shop.material, CaaConfig(layer=layer, extraction=extraction), states=states).editor()


def _answer_vector(shop: Workshop, what: str, at: Callable[[int, tuple[Tensor, Tensor]], Editor]) -> Noted:
    found = shop.best_block(what, at)
    return Noted(
        at(found.layer, shop.answer_states[found.layer]), f"block {found.layer}, of {len(found.margins)} blocks tried"
    )


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


def _repit(shop: Workshop) -> Noted:
    where, published = shop.repit_place, PlaceConfig().kl_limit
    found = fit_repit(shop.backbone, shop.material, shop.no_longer_refused, layer=where.layer, position=where.position)
    kept = "" if found.within_limit else ", the least non-target success: no ρ keeps to its limit"
    place = f"block {where.layer}, token {where.position}, KL {where.kl:.2f}"
    widened = f"no place keeps to the published limit (KL {published:g}); chosen under {where.limit:g}"
    concepts = f"{len(found.concepts)} non-target concepts"
    said = [f"ρ {found.rho:g}{kept}", place, concepts, *([widened] if where.limit > published else [])]
    return Noted(found, "; ".join(said))


def _wrmd(shop: Workshop) -> Editor:
    return fit_wrmd(shop.backbone, shop.material, shop.refusal_confidence)


def _cast(shop: Workshop) -> AnswerCast:
    return fit_answer_cast(shop.backbone, shop.material)


def _ws(shop: Workshop) -> Editor:
    # Three times the rate for a quarter of the epochs: at 1e-5 two epochs move a weight by about one step of bfloat16.
    config = WeightSteeringConfig(epochs=2, learning_rate=3e-5, seed=shop.material.seed)
    return WeightEditor(fit_answer_weights(shop.backbone, shop.material, config, say=shop.say))


# What is written k blocks back is scaled when it is written and at every block's input since: (1 - s)^(k + 1) of it is left,
# at 0.1 half of what is six blocks old. Below 0.02 a step of bfloat16 swallows most of what would be taken away.
EVERYWHERE = (0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)
ONE_BLOCK = (0.25, 0.5, 0.75, 1.0)  # nothing is left to take away beyond 1
RECONSTRUCTED = "reconstructed from a description"
SEARCHED = "its block is searched by us on calibration prompts"

METHODS = (
    Method("caa", _caa, note=f"PCA of pairwise differences; {SEARCHED}", version=3),
    Method("caa-mean", _caa_mean, note=f"mean difference; {SEARCHED}", version=3),
    Method("act-add", _act_add, note=f"{RECONSTRUCTED} (tables 7 and 18); {SEARCHED}", version=3),
    Method("dim-ablation", lambda shop: Noted(shop.dim.ablation(), shop.dim_note), EVERYWHERE, version=4),
    Method(
        "dim-act-sub", lambda shop: Noted(shop.dim.act_sub(), shop.dim_note),
        note="refusal-direction ActAdd at coefficient -1 is the same", version=3,
    ),
    Method(
        "orthogonal", lambda shop: Noted(shop.dim.orthogonal(), shop.dim_note), (1.0,), ("global",),
        note="an edit of weights: all rows alike", version=3,
    ),
    Method("rdo", _rdo, EVERYWHERE, note="100 steps; targets are edit targets", version=4),
    Method("repit", _repit, ONE_BLOCK, note="place and rho by the first token of the answer, not by COSMIC", version=4),
    Method("wrmd", _wrmd, note=f"{RECONSTRUCTED}; confidence is the base's first-token probability"),
    Method(
        "cast", _cast, (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2), (*VARIANTS, OWN_ROUTING), version=2,
        note="towards edit targets; own: its condition, edit prompts against keeps", own=lambda editor: editor.condition,
    ),
    Method("ws", _ws, SCALES, ("global",), note="two epochs at 3e-5; an edit of weights: all rows alike", version=3,
        stored=Stored(
            lambda editor, path: save_weight_delta(editor.delta, path),
            lambda path, backbone: WeightEditor(load_weight_delta(path, backbone)),
        ),
    ),
)  # fmt: skip
