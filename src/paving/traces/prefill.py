"""A prefill whose last token is run again: what a router that reads late, and an editor that edits early, need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from paving.backbone import Backbone


def can_run_again(backbone: Backbone, arguments: Mapping[str, Any]) -> bool:
    """Whether `last_token_again` can follow a decoder pass with these arguments.

    It needs a cache from which a token can be taken back (`keep_past`), a plain attention mask, and a caller who asks for
    nothing of the pass but its last states.
    """
    cache, mask = arguments.get("past_key_values"), arguments.get("attention_mask")
    config = backbone.model.config.get_text_config()
    asked = (arguments.get(name) or getattr(config, name, False) for name in ("output_hidden_states", "output_attentions"))
    return (
        isinstance(cache, DynamicCache)
        and not getattr(cache, "offloading", False)
        and all(type(layer) is DynamicLayer or _slides(layer) for layer in cache.layers)
        and (mask is None or (isinstance(mask, Tensor) and mask.dim() == 2))
        and not any(asked)
    )


def keep_past(arguments: Mapping[str, Any]) -> tuple[DynamicSlidingWindowLayer, ...]:
    """Before a pass that `last_token_again` may follow: layers with a sliding window keep what they would drop.

    returns those layers, for `last_token_again` or, where none follows, `drop_past`
    """
    layers = tuple(layer for layer in arguments["past_key_values"].layers if _slides(layer) and not layer.record_past)
    for layer in layers:
        layer.activate_past_recording()
    return layers


def drop_past(layers: Sequence[DynamicSlidingWindowLayer]) -> None:
    for layer in layers:
        layer.crop(0)
        layer.record_past = False


def _slides(layer: Any) -> bool:
    """A window that can be told to keep its past: older versions of transformers have none such."""
    return type(layer) is DynamicSlidingWindowLayer and hasattr(layer, "activate_past_recording")


def last_token_again(
    backbone: Backbone,
    arguments: Mapping[str, Any],
    output: Any,
    rows: Tensor,
    kept_past: Sequence[DynamicSlidingWindowLayer] = (),
) -> Any:
    """Run the last token of a pass again, with whatever hooks now do, and let only `rows` have the difference.

    arguments, output  of the decoder's pass: with its cache, and output.last_hidden_state (n, positions, d_model)
    rows               (n,) bool; the others keep the states and the cached keys and values of the first time, bit for bit
    kept_past          what `keep_past` returned before that pass
    returns            the output with the last position's states of those rows replaced
    """
    cache = arguments["past_key_values"]
    others = (~rows).nonzero().squeeze(-1)
    kept = [(layer.keys[others, :, -1:].clone(), layer.values[others, :, -1:].clone()) for layer in cache.layers]
    cache.crop(-1)
    for layer in kept_past:
        layer.record_past = False
    last = {k: arguments[k][:, -1:] for k in ("input_ids", "inputs_embeds") if arguments.get(k) is not None}
    if arguments.get("position_ids") is not None:
        last["position_ids"] = arguments["position_ids"][..., -1:]  # some models have several a token, in front of the rows
    if arguments.get("cache_position") is not None:
        last["cache_position"] = arguments["cache_position"][-1:]
    again = backbone.model.get_decoder()(**{**arguments, **last, "past_key_values": cache})
    for layer, (keys, values) in zip(cache.layers, kept, strict=True):
        layer.keys[others, :, -1:] = keys
        layer.values[others, :, -1:] = values
    states = output.last_hidden_state.clone()
    states[rows, -1] = again.last_hidden_state[rows, -1]
    output.last_hidden_state = states
    return output
