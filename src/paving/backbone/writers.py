"""What writes to the residual stream: the modules whose outputs are added to it, and the weights that make them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from paving.backbone.attention_parts import ATTENTION, OUTPUT
from paving.backbone.layers import BackboneError
from paving.backbone.load import Backbone
from paving.backbone.projections import FLOATS, ffn_outputs

# The norms of a block tell how it is built. Names alone do not: Llama's post_attention_layernorm is what its FFN reads
# through, Gemma's is what its attention writes through.
PRE_NORM = ({"input_layernorm", "post_attention_layernorm"}, {"ln_1", "ln_2"})
WRITTEN_THROUGH = ("post_attention_layernorm", "post_feedforward_layernorm")
POST_NORM = ({"input_layernorm", "pre_feedforward_layernorm", *WRITTEN_THROUGH}, set(WRITTEN_THROUGH))
SUPPORTED = (
    "Supported are blocks of one attention and one FFN: Llama, Qwen2, Qwen3, Mistral, Phi-3, SmolLM, GPT-2, and with a norm "
    "over what they add Gemma 2, Gemma 3 and OLMo2."
)
FINAL_NORMS = ("norm", "ln_f")


@dataclass(frozen=True)
class Writers:
    """The modules of one block whose outputs, the first where there are several, are added to the residual stream.

    attention, ffn  the attention and FFN modules, or the norms over their outputs where the block has such (`normed`)
    projection      attention's output projection
    """

    layer: int
    attention: nn.Module
    ffn: nn.Module
    projection: nn.Module
    normed: bool


def block_writers(backbone: Backbone) -> tuple[Writers, ...]:
    """What each block adds to the stream, in order of depth.

    raises BackboneError for blocks that are built in another way, naming what is supported
    """
    return tuple(_writers(backbone, layer, block) for layer, block in enumerate(backbone.layers))


def _writers(backbone: Backbone, layer: int, block: nn.Module) -> Writers:
    children = dict(block.named_children())
    norms = {name for name in children if "norm" in name or name.startswith("ln_")}
    attention = next((name for name in ATTENTION if name in children), None)
    known = {*norms, attention, "mlp", *(name for name, m in children.items() if isinstance(m, nn.Dropout))}
    if attention is None or "mlp" not in children or children.keys() - known or norms not in (*PRE_NORM, *POST_NORM):
        raise BackboneError(
            f"cannot tell what layer {layer} of {backbone.name} ({type(block).__name__}) adds to the residual stream: it "
            f"has the parts {', '.join(children)}. {SUPPORTED}"
        )
    inner = dict(children[attention].named_children())
    projection = next((inner[name] for name in OUTPUT if name in inner), None)
    if projection is None:
        raise BackboneError(
            f"cannot find the output projection of attention in layer {layer} of {backbone.name}: it has the parts "
            f"{', '.join(inner)}, looked for {', '.join(OUTPUT)}. {SUPPORTED}"
        )
    normed = norms in POST_NORM
    added = (children[name] for name in (WRITTEN_THROUGH if normed else (attention, "mlp")))
    return Writers(layer, *added, projection, normed)


@dataclass(frozen=True)
class StreamTensor:
    """One stored tensor whose vectors along one axis lie in the residual stream: getattr(module, name).

    axis  0 for the weight of a Linear (d_model, inputs); -1 for embeddings, Conv1D and biases (..., d_model)
    """

    module: nn.Module
    name: str
    axis: int


def stream_tensors(backbone: Backbone) -> tuple[StreamTensor, ...]:
    """Everything stored that writes to the stream: embeddings (of positions, too), attention and FFN outputs, biases.

    raises BackboneError where an edit of these would not be an edit of what is written: blocks with a norm in between,
    decoders with other parts, mixtures of experts, quantised, wrapped or offloaded weights
    """
    backbone.check_in_memory("changing what writes to the stream")
    writers = block_writers(backbone)
    if writers[0].normed:
        raise BackboneError(
            f"{backbone.name} puts a norm between its projections and the residual stream (Gemma 2, Gemma 3, OLMo2), so no "
            "change of the projections keeps a direction out of the stream. Ablate it at run time."
        )
    found = [StreamTensor(module, "weight", -1) for module in _embeddings(backbone)]
    for writer, ffn in zip(writers, ffn_outputs(backbone).values(), strict=True):
        _check_plain(backbone, writer)
        for module in (writer.projection, ffn.module):
            found.append(StreamTensor(module, "weight", -1 if isinstance(module, Conv1D) else 0))
            if module.bias is not None:
                found.append(StreamTensor(module, "bias", -1))
    return tuple(found)


def _embeddings(backbone: Backbone) -> list[nn.Module]:
    children = dict(backbone.model.get_decoder().named_children())
    embeddings = {name: m for name, m in children.items() if isinstance(m, nn.Embedding)}
    other = [
        f"{name} ({type(m).__name__})"
        for name, m in children.items()
        if name not in embeddings and m is not backbone.layers and not isinstance(m, nn.Dropout)
        if name not in FINAL_NORMS and not name.startswith("rotary")
    ]
    wide = all(m.embedding_dim == backbone.d_model and m.weight.dtype in FLOATS for m in embeddings.values())
    if other or not wide or backbone.model.get_input_embeddings() not in embeddings.values():
        raise BackboneError(
            f"cannot tell which embeddings of {backbone.name} write to its residual stream: its decoder has the parts "
            f"{', '.join(children)}. {SUPPORTED}"
        )
    return list(embeddings.values())


def _check_plain(backbone: Backbone, writer: Writers) -> None:
    module = writer.projection
    if type(module) not in (nn.Linear, Conv1D) or module.weight.dtype not in FLOATS:
        raise BackboneError(
            f"the output projection of attention in layer {writer.layer} of {backbone.name} is a {type(module).__name__}: "
            "quantised or wrapped weights cannot be edited bit for bit. Load the unquantised checkpoint."
        )
