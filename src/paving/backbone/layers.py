"""Find the decoder layers of any Hugging Face causal language model, in one generic way."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


class BackboneError(ValueError):
    """A model that cannot be used as a backbone; the message says what is missing and what would do."""


class ChatTemplateError(BackboneError):
    """A conversation that the model's chat template cannot say, whatever its words."""


def text_config(model: PreTrainedModel):
    """The configuration of the text decoder; for a multimodal model that is a part of the whole."""
    return model.config.get_text_config(decoder=True)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks whose outputs are the residual stream, in order of depth.

    The model is asked for its own decoder (so a vision tower of equal depth cannot be taken for it); inside it the
    blocks are the one `nn.ModuleList` as long as the text configuration says the model is deep.

    raises BackboneError if there is no such list, or more than one, or if the model is an encoder-decoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        # Its decoder has such a list too, but the prompt is read by the encoder, which nothing here looks at.
        raise BackboneError(
            f"{type(model).__name__} is an encoder-decoder. A decoder-only Hugging Face causal language model is needed."
        )
    n_layers = getattr(text_config(model), "num_hidden_layers", None)
    if n_layers is None:
        raise BackboneError(
            f"{type(model).__name__} does not say how deep it is: its text configuration has no num_hidden_layers. "
            "A decoder-only Hugging Face causal language model is needed."
        )
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    root = decoder if isinstance(decoder, nn.Module) else model
    lists = {name: m for name, m in root.named_modules() if isinstance(m, nn.ModuleList)}
    found = {name: m for name, m in lists.items() if len(m) == n_layers}
    if len(found) > 1:
        # With few layers another list (heads, experts) can have the same length. Blocks are the outermost such list.
        top = min(name.count(".") for name in found)
        found = {name: m for name, m in found.items() if name.count(".") == top}
    if len(found) != 1:
        seen = ", ".join(f"{name} ({len(m)})" for name, m in lists.items()) or "none"
        raise BackboneError(
            f"cannot tell which modules of {type(model).__name__} are its {n_layers} decoder layers: "
            f"found {len(found)} module lists of that length (all lists: {seen}). "
            "Supported are decoders that keep their blocks in one nn.ModuleList, "
            "such as Llama, Qwen2, Qwen3, Gemma 2, Gemma 3, Mistral, Phi-3, OLMo2 and SmolLM."
        )
    return next(iter(found.values()))
