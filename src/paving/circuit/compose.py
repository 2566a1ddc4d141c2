"""Several categories in one delta, and one of them taken out again (C-ΔΘ, composition)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from paving.backbone.weights import same_bits
from paving.circuit.delta import Delta, assemble, check_alpha
from paving.circuit.description import Component, Composition
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.overlap import Overlap, positions, union
from paving.circuit.slices import SliceDelta


def compose(deltas: Sequence[Delta], *, overlap: Overlap = "largest", scale: float = 1.0) -> Delta:
    """One delta of several categories on one base, overlap resolved channel by channel.

    overlap  what holds on a channel that several circuits share: `largest`, the α_i·Δ_i with the largest norm there;
             `sum`; `mean`, over the circuits that hold it. A channel of one circuit alone gets that circuit's own edit,
             bit for bit. The default is `largest`: no channel is pushed farther than by one edit that was measured on
             its own, where a sum adds up what circuits of refusal have in common, and a mean weakens each of them. The
             paper resolves overlap per neuron too; its rule (algorithm 2) could not be found.

    scale    of every α: what several edits cost adds up, so that together each has to be weaker to keep to a limit. What was
             measured of a component at its own α is then left out

    Every component keeps its values and its α, which is folded in: the α of a composition is 1. The order of `deltas`
    does not matter. Compositions among them are taken apart first; one component alone is given back as it was.

    raises CircuitError for no delta, a scale that is not positive, a category that is there twice, or deltas of different
    bases or readings
    """
    if not deltas:
        raise CircuitError("nothing to compose: give at least one delta.")
    deltas = sorted(deltas, key=lambda d: d.description.categories)
    categories = [c for d in deltas for c in d.description.categories]
    twice = sorted({c for c in categories if categories.count(c) > 1})
    if twice:
        raise CircuitError(f"the category {', '.join(twice)} is there more than once. Compose one delta a category.")
    for other in deltas[1:]:
        _check_kin(deltas[0], other)
    within = union([d.mask for d in deltas])
    base = {layer: _shared_base(deltas, within, layer) for layer in within.channels}
    held = sorted((_scaled(*pair, scale) for d in deltas for pair in _components(d)), key=lambda pair: pair[0].category)
    return _joined(deltas, within, base, held, overlap)


def subtract(composed: Delta, category: str) -> Delta:
    """The composition without one category: bit for bit what composing the others from scratch gives.

    raises CircuitError for a category that is not in it, or the only one
    """
    about = composed.description
    rest = [pair for pair in _components(composed) if pair[0].category != category]
    if len(rest) == len(about.components):
        raise CircuitError(f"there is no category {category!r} in this delta; it holds {', '.join(about.categories)}.")
    if about.composition is None or not rest:
        raise CircuitError(f"{category!r} is all there is in this delta: remove the delta from the checkpoint instead.")
    return _joined([composed], composed.mask, composed.base, rest, about.composition.overlap)


def _components(delta: Delta) -> list[tuple[Component, SliceDelta]]:
    return list(zip(delta.description.components, delta.parts, strict=True))


def _scaled(component: Component, part: SliceDelta, scale: float) -> tuple[Component, SliceDelta]:
    if scale == 1.0:
        return component, part
    return component.model_copy(update={"alpha": check_alpha(component.alpha * scale), "metrics": {}}), part


def _joined(
    deltas: Sequence[Delta],
    within: Mask,
    base: dict[int, Tensor],
    held: Sequence[tuple[Component, SliceDelta]],
    overlap: Overlap,
) -> Delta:
    """Metrics of a composition are not those of its parts, so a new one has none until it is measured."""
    names = {line.layer: (line.parameter, line.transposed) for d in deltas for line in d.description.layers}
    components, parts = zip(*held, strict=True)
    composition = Composition(overlap=overlap) if len(held) > 1 else None
    return assemble(deltas[0].description.base, names, within, base, components, parts, composition)


def _check_kin(one: Delta, other: Delta) -> None:
    a, b = one.description, other.description
    who = f"{', '.join(a.categories)} and {', '.join(b.categories)} cannot be composed:"
    if a.base.fingerprint != b.base.fingerprint:
        raise CircuitError(
            f"{who} they belong to different bases, {a.base.name} (fingerprint {a.base.fingerprint}) and {b.base.name} "
            f"({b.base.fingerprint}). Make both on one base."
        )
    kinds = [(d.reading, d.n, d.base.dtype) for d in (a, b)]
    if kinds[0] != kinds[1]:
        raise CircuitError(
            f"{who} one edits {a.reading} of {a.n} in {a.base.dtype}, the other {b.reading} of {b.n} in {b.base.dtype}. "
            "Make both with one reading, on the base in one dtype."
        )
    ours, theirs = ({line.layer: (line.parameter, line.transposed) for line in d.layers} for d in (a, b))
    if any(ours[layer] != theirs[layer] for layer in ours.keys() & theirs.keys()):
        raise CircuitError(f"{who} they name the weight of a layer differently, so one of them is damaged.")


def _shared_base(deltas: Sequence[Delta], within: Mask, layer: int) -> Tensor:
    """The base's slice of one layer on the union of the masks.

    raises CircuitError where two deltas hold different base values for one channel: fingerprints only sample weights
    """
    holders = [d for d in deltas if layer in d.base]
    neurons = within.reading == "neurons"
    rows = [d.base[layer].t() if neurons else d.base[layer] for d in holders]
    if len({row.shape[1] for row in rows}) > 1:
        raise CircuitError(f"the base slices of layer {layer} differ in width between the deltas; one of them is damaged.")
    shared = torch.zeros(len(within.channels[layer]), rows[0].shape[1], dtype=rows[0].dtype)
    filled = torch.zeros(len(shared), dtype=torch.bool)
    for delta, own in zip(holders, rows, strict=True):
        at = positions(within, delta.mask, layer)
        seen = filled[at]
        if not same_bits(shared[at[seen]], own[seen]):
            raise CircuitError(
                f"the deltas hold different weights of their base in layer {layer}, though its fingerprint is the same: "
                "one was made on a base that had been changed. Make both on the same base."
            )
        shared[at], filled[at] = own, True
    return (shared.t() if neurons else shared).contiguous()
