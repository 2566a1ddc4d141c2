"""Find what a decoder block is made of: its two norms, the q, k, v and output projections of its heads, its FFN."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paving.backbone.layers import BackboneError
from paving.backbone.load import Backbone

# Where the decoders of transformers keep them: Llama and its kin, GPT-2.
NORMS = (("input_layernorm", "post_attention_layernorm"), ("ln_1", "ln_2"))
ATTENTION = ("self_attn", "attn")
SEPARATE = ("q_proj", "k_proj", "v_proj")
FUSED = ("c_attn", "qkv_proj")  # GPT-2; Phi-3
OUTPUT = ("o_proj", "c_proj")
SUPPORTED = (
    "Supported are blocks that add attention and then a dense FFN to the residual stream, each reading it through a norm of "
    "its own: Llama, Qwen2, Qwen3, Mistral, Phi-3, SmolLM and GPT-2. Not supported: blocks that normalise or scale what "
    "they add (Gemma 2, Gemma 3, OLMo2, Granite), attention and FFN in parallel, quantised or wrapped projections."
)


@dataclass(frozen=True)
class HeadReader:
    """The outputs of a projection that are one of q, k, v: `n_heads` heads of `head_dim`, from output `start` on.

    module  an nn.Linear, or a Conv1D (GPT-2), whose stored weight is the transpose
    """

    module: nn.Module
    start: int
    n_heads: int
    head_dim: int

    def of(self, output: Tensor) -> Tensor:
        """(..., n_heads, head_dim), a view of the module's output (..., outputs)."""
        stop = self.start + self.n_heads * self.head_dim
        return output[..., self.start : stop].unflatten(-1, (self.n_heads, self.head_dim))

    def weight(self, head: int) -> Tensor:
        """(head_dim, d_model): the rows of one head, a view of the stored parameter."""
        stored = matrix(self.module)
        return stored[self.start + head * self.head_dim : self.start + (head + 1) * self.head_dim]

    def bias(self, head: int) -> Tensor | None:
        """(head_dim,), or None where the projection has none."""
        stored = self.module.bias
        return None if stored is None else stored[self.start + head * self.head_dim :][: self.head_dim]


@dataclass(frozen=True)
class BlockParts:
    """One decoder block, taken apart: mid = resid + output(heads(norm(resid))), next = mid + ffn(ffn_norm(mid)).

    k, v    have one head a key-value group; head h of q reads group h // (q.n_heads // k.n_heads)
    output  the projection whose input is the heads' mixed values, (n, t, n_heads * head_dim), head by head
    ffn     the whole feed-forward module: normed residual in, what it adds out
    """

    layer: int
    norm: nn.Module
    q: HeadReader
    k: HeadReader
    v: HeadReader
    output: nn.Module
    ffn_norm: nn.Module
    ffn: nn.Module

    @property
    def readers(self) -> tuple[HeadReader, HeadReader, HeadReader]:
        return self.q, self.k, self.v

    def heads_written(self, mixed: Tensor) -> Tensor:
        """(n_heads, n, t, d_model): what each head adds to the residual stream, without the projection's bias.

        mixed: (n, t, n_heads * head_dim), the input of the output projection
        """
        by_head = mixed.unflatten(-1, (self.q.n_heads, self.q.head_dim)).permute(2, 0, 1, 3).flatten(1, 2)
        weight = matrix(self.output).unflatten(1, (self.q.n_heads, self.q.head_dim)).permute(1, 2, 0)
        return (by_head @ weight).unflatten(1, mixed.shape[:2])


def matrix(module: nn.Module) -> Tensor:
    """(outputs, inputs): the weight of a Linear or Conv1D, a view of the stored parameter."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def block_parts(backbone: Backbone) -> tuple[BlockParts, ...]:
    """The parts of every block, in order of depth.

    raises BackboneError for blocks that are built in another way, naming what is supported
    """
    return tuple(_parts(backbone, layer, block) for layer, block in enumerate(backbone.layers))


def _parts(backbone: Backbone, layer: int, block: nn.Module) -> BlockParts:
    children = dict(block.named_children())
    norms = next((pair for pair in NORMS if all(name in children for name in pair)), None)
    attention = next((children[name] for name in ATTENTION if name in children), None)
    # One more norm (Gemma: pre_feedforward_layernorm) means that these two do not stand where the names say.
    extra = [name for name, _ in children.items() if "norm" in name and name not in (norms or ())]
    if norms is None or attention is None or "mlp" not in children or extra:
        raise _refused(backbone, layer, f"it has the parts {', '.join(children)}")
    inner = dict(attention.named_children())
    output = next((inner[name] for name in OUTPUT if name in inner), None)
    fused = next((inner[name] for name in FUSED if name in inner), None)
    separate = [inner.get(name) for name in SEPARATE]
    used = [output, fused] if fused is not None else [output, *separate]
    if any(type(module) not in (nn.Linear, Conv1D) for module in used):
        raise _refused(
            backbone, layer, f"its attention has {', '.join(f'{n} ({type(m).__name__})' for n, m in inner.items())}"
        )
    head_dim = getattr(attention, "head_dim", None)
    width = matrix(output).shape[1]
    if fused is not None:
        rest = matrix(fused).shape[0] - width
        modules, widths = (fused, fused, fused), (width, rest // 2, rest // 2)
        starts = (0, width, width + rest // 2)
    else:
        modules, widths, starts = tuple(separate), tuple(matrix(m).shape[0] for m in separate), (0, 0, 0)
    q, k, v = widths
    if not head_dim or q != width or k != v or any(w % head_dim for w in widths) or not k or q % k:
        raise _refused(backbone, layer, f"q, k, v of {widths} outputs do not make heads of {head_dim} for {width} inputs")
    readers = (HeadReader(m, s, w // head_dim, head_dim) for m, s, w in zip(modules, starts, widths, strict=True))
    return BlockParts(layer, children[norms[0]], *readers, output, children[norms[1]], children["mlp"])


def _refused(backbone: Backbone, layer: int, why: str) -> BackboneError:
    return BackboneError(f"cannot take layer {layer} of {backbone.name} apart into heads and FFN: {why}. {SUPPORTED}")
