"""A delta in memory: Δθ of one category or several, with the base's own slices, tied to one base (C-ΔΘ, stage 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pydantic import JsonValue, ValidationError
from torch import Tensor

from paving.backbone import Backbone
from paving.backbone.projections import ffn_outputs
from paving.backbone.weights import edited, tensor_sha256
from paving.circuit.description import Base, Component, Composition, Description, Layer, public_name
from paving.circuit.mask import CircuitError, Mask
from paving.circuit.overlap import merged, positions
from paving.circuit.slices import CircuitEdit, SliceDelta, check_fits, slice_of


@dataclass(frozen=True)
class Delta:
    """Δθ and what it needs to be put on a base and taken off again.

    description  what delta.json says
    parts        one a component, in the description's order; values in the base's dtype, before alpha
    base         layer -> the base's own slice on the union of the parts' masks: (d_model, k) for neurons,
                 (k, d_ff) for outputs. With it the base comes back bit for bit from an edited checkpoint alone.
    """

    description: Description
    parts: tuple[SliceDelta, ...]
    base: Mapping[int, Tensor]

    @property
    def alpha(self) -> float:
        return self.description.alpha

    @property
    def mask(self) -> Mask:
        return self.slices.mask

    @cached_property
    def slices(self) -> SliceDelta:
        """What times alpha is added: the one part, or the parts merged with their alphas (float64 values)."""
        return _whole(self.parts, self.description.components, self.description.composition)

    def edited(self, alpha: float | None = None) -> dict[int, Tensor]:
        """Layer -> the slice θ0 + α·Δθ in the base's dtype. alpha: the delta's own if None.

        raises CircuitError for an alpha that is not positive, or that overflows the dtype
        """
        return _edited(self.base, self.slices, self.checked_alpha(alpha))

    def edit(self, alpha: float | None = None) -> CircuitEdit:
        """The same edit in memory, as an intervention on the base."""
        return CircuitEdit(self.slices, self.checked_alpha(alpha))

    def checked_alpha(self, alpha: float | None) -> float:
        return check_alpha(self.alpha if alpha is None else float(alpha))


def check_alpha(alpha: float) -> float:
    """The same alpha. raises CircuitError unless it is a positive, finite number"""
    if not (math.isfinite(alpha) and alpha > 0):
        raise CircuitError(f"alpha {alpha} cannot be used: give a positive number. C-ΔΘ adds refusal; 0 is the base.")
    return alpha


def make_delta(
    backbone: Backbone,
    slices: SliceDelta,
    *,
    category: str,
    alpha: float,
    scores: Mapping[int, Tensor] | None = None,
    metrics: Mapping[str, JsonValue] | None = None,
    recipe: Mapping[str, JsonValue] | None = None,
) -> Delta:
    """The delta of one category on the base that is loaded, unedited, as `backbone`.

    slices   values in the dtype of the base's FFN output projections
    scores   layer -> (n,) attribution of every channel

    raises CircuitError for values that do not fit mask, base or dtype, or are not finite; BackboneError for tied or
    quantised weights.
    """
    projections, mask = ffn_outputs(backbone), slices.mask
    check_fits(projections, mask)
    weights = {layer: projections[layer].weight for layer in mask.channels}
    base = {layer: slice_of(weight, mask, layer).cpu().contiguous() for layer, weight in weights.items()}
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in weights.values()})
    if len(dtypes) > 1:
        raise CircuitError(f"the FFN output projections of {backbone.name} have several dtypes ({', '.join(dtypes)}).")
    part = SliceDelta(mask, {layer: slices.values[layer].detach().cpu().contiguous() for layer in mask.channels})
    check_values([part], base)
    try:
        component = Component(
            category=category,
            alpha=alpha,
            scores=None if scores is None else {layer: _rounded(s) for layer, s in scores.items()},
            metrics=dict(metrics or {}),
            recipe=dict(recipe or {}),
        )
        about = Base(name=public_name(backbone.name), fingerprint=backbone.fingerprint, dtype=dtypes[0])
        names = {layer: (projections[layer].parameter, projections[layer].transposed) for layer in mask.channels}
        return assemble(about, names, mask, base, [component], [part])
    except ValidationError as error:
        raise CircuitError(f"this cannot be the description of a delta: {first_error(error)}") from None


def assemble(
    about: Base,
    names: Mapping[int, tuple[str, bool]],
    within: Mask,
    base: Mapping[int, Tensor],
    components: Sequence[Component],
    parts: Sequence[SliceDelta],
    composition: Composition | None = None,
) -> Delta:
    """Describe parts as one delta.

    names         layer -> (parameter, transposed)
    within, base  the base's slices on a mask that holds the parts' masks; what no part needs is left out
    """
    whole = _whole(parts, components, composition)
    kept = {layer: _restricted(base[layer], within, whole.mask, layer) for layer in whole.mask.channels}
    alpha = components[0].alpha if composition is None else 1.0
    values = _edited(kept, whole, alpha)
    description = Description(
        base=about,
        reading=whole.mask.reading,
        n=whole.mask.n,
        layers=tuple(
            Layer(
                layer=layer,
                parameter=names[layer][0],
                transposed=names[layer][1],
                channels=len(channels),
                edited_sha256=tensor_sha256(values[layer]),
            )
            for layer, channels in whole.mask.channels.items()
        ),
        components=tuple(components),
        composition=composition,
    )
    return Delta(description, tuple(parts), kept)


def with_metrics(delta: Delta, metrics: Mapping[str, JsonValue]) -> Delta:
    """The same delta, with what was measured with the whole of it at its own alpha, in place of what was there.

    raises CircuitError for metrics that are no JSON
    """
    about = delta.description
    try:
        if about.composition is None:
            change = {"components": (Component(**{**dict(about.components[0]), "metrics": dict(metrics)}),)}
        else:
            change = {"composition": Composition(overlap=about.composition.overlap, metrics=dict(metrics))}
    except ValidationError as error:
        raise CircuitError(f"these metrics cannot be saved: {first_error(error)}") from None
    return replace(delta, description=about.model_copy(update=change))


def check_values(parts: Sequence[SliceDelta], base: Mapping[int, Tensor]) -> None:
    """raises CircuitError if the values of a part do not fit its mask and the base's slices, or are not finite."""
    for part in parts:
        axis = 1 if part.mask.reading == "neurons" else 0
        for layer, channels in part.mask.channels.items():
            values, own = part.values[layer], base[layer]
            shape = list(own.shape)
            shape[axis] = len(channels)
            if list(values.shape) != shape or values.dtype != own.dtype:
                raise CircuitError(
                    f"the delta of layer {layer} is {tuple(values.shape)} {values.dtype}; its mask and base need "
                    f"{tuple(shape)} {own.dtype}. Train it on the base in the base's own dtype, or round it to that."
                )
            if not values.isfinite().all():
                raise CircuitError(f"the delta of layer {layer} has values that are not finite. Train it again.")


def first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'delta'}: {first['msg']}"


def _whole(parts: Sequence[SliceDelta], components: Sequence[Component], composition: Composition | None) -> SliceDelta:
    if composition is None:
        return parts[0]
    return merged(parts, [c.alpha for c in components], composition.overlap)


def _edited(base: Mapping[int, Tensor], whole: SliceDelta, alpha: float) -> dict[int, Tensor]:
    values = {layer: edited(own, whole.values[layer], alpha) for layer, own in base.items()}
    for layer, value in values.items():
        if not value.isfinite().all():
            raise CircuitError(
                f"base + alpha * delta of layer {layer} is not finite in {value.dtype} at alpha {alpha:g}. "
                "Take a smaller one."
            )
    return values


def _restricted(base: Tensor, within: Mask, to: Mask, layer: int) -> Tensor:
    return base.index_select(1 if to.reading == "neurons" else 0, positions(within, to, layer)).contiguous()


def _rounded(scores: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{score:.4g}") for score in scores.detach().cpu().double().tolist())
