"""Tiny models for edge attribution: shallow ones, and linear ones on which attribution must equal patching."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from paving.backbone import Backbone, as_backbone
from paving.circuit.edges import TokenPair, whole_graph
from paving.circuit.edges.circuit import EdgeCircuit
from paving.circuit.edges.faithfulness import patched_logits
from paving.circuit.edges.graph import taken_apart
from paving.circuit.edges.metrics import measured
from paving.circuit.edges.nodes import recorded
from paving.circuit.edges.scores import pair_scores
from paving.circuit.token_pairs import last_logits, pair_batches
from tiny_models import CONFIGS, tiny_tokenizer

LINEAR = "tiny_linear_attention"


def shallow(architecture: str, *, layers: int = 2, seed: int = 0, dtype=torch.float64, **changes) -> Backbone:
    config = CONFIGS[architecture]()
    config.num_hidden_layers = layers
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases start at 0 and norm weights at 1, where neither can be missed
                parameter.data += torch.randn_like(parameter) / 5
    if dtype == torch.float64:
        _double_norms(model)
    return as_backbone(model, tiny_tokenizer(), f"tiny-{architecture}")


def _double_norms(model: nn.Module) -> None:
    """transformers' RMSNorm computes in float32 whatever the model is in, which finite differences would drown in."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                double = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon, dtype=torch.float64)
                double.weight = norm.weight
                setattr(parent, name, double)


def linear(architecture: str, **changes) -> Backbone:
    """A model that is linear in what every node writes: no norms, a linear FFN, attention without a softmax.

    Head h gives q_i plus the mean over positions j <= i of k_j + v_j of its group, so that every edge into q, k and v
    does something, and grouped heads share what the real ones share.
    """
    backbone = shallow(architecture, **changes)
    for block in backbone.layers:
        for name in ("input_layernorm", "post_attention_layernorm", "ln_1", "ln_2"):
            if hasattr(block, name):
                setattr(block, name, nn.Identity())
        gated = next((name for name in ("act_fn", "activation_fn") if hasattr(block.mlp, name)), None)
        if gated:
            setattr(block.mlp, gated, _Ones())  # act(gate) * up = up
        else:
            block.mlp.act = nn.Identity()
    inner = backbone.model.base_model
    name = "norm" if hasattr(inner, "norm") else "ln_f"
    setattr(inner, name, nn.Identity())
    backbone.model.set_attn_implementation(LINEAR)
    return backbone


class _Ones(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x)


def _linear_attention(_module, query, key, value, attention_mask, **_kwargs):
    groups = query.shape[1] // key.shape[1]
    both = (key + value).repeat_interleave(groups, 1)
    seen = (attention_mask == 0).to(query)
    weights = seen / seen.sum(-1, keepdim=True).clamp_min(1)
    return (query + weights @ both).transpose(1, 2).contiguous(), None


AttentionInterface.register(LINEAR, _linear_attention)
AttentionMaskInterface.register(LINEAR, eager_mask)


def some_pairs(lengths: tuple[tuple[int, int], ...] = ((7, 7), (5, 8), (9, 4)), seed: int = 3) -> tuple[TokenPair, ...]:
    """Random token pairs of the given (clean, corrupt) lengths."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(7, 190, (n,), generator=generator).tolist())

    return tuple(TokenPair(f"pair-{i}", drawn(a), drawn(b)) for i, (a, b) in enumerate(lengths))


def mixed_logits(logits: Tensor) -> Tensor:
    """A metric that is linear in every logit."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return logits @ weights.to(logits)


@torch.no_grad()
def exact_patching(backbone: Backbone, pairs: tuple[TokenPair, ...], metric) -> Tensor:
    """(n_pairs, n_destinations, n_sources): change of the metric when one edge alone is patched; 0 off the graph."""
    graph, parts = taken_apart(backbone)
    every = whole_graph(graph).edges
    (batch,) = pair_batches(backbone, pairs, len(pairs))
    clean = measured(metric, last_logits(backbone, batch.clean, batch.clean_mask), batch.rows)
    corrupt, _ = recorded(backbone, parts, batch.corrupt, batch.corrupt_mask)
    effects = torch.zeros(len(pairs), graph.n_destinations, graph.n_sources, dtype=clean.dtype)
    for source, destination in every:
        without = EdgeCircuit(graph, every - {(source, destination)})
        logits = patched_logits(backbone, parts, batch, without, corrupt)
        effects[:, destination, source] = measured(metric, logits, batch.rows) - clean
    return effects


def scores_of(backbone: Backbone, pairs: tuple[TokenPair, ...], metric, method: str, steps: int = 5) -> Tensor:
    """(n_pairs, n_destinations, n_sources) by attribution."""
    graph, parts = taken_apart(backbone)
    (batch,) = pair_batches(backbone, pairs, len(pairs))
    return pair_scores(backbone, graph, parts, batch, metric, method, steps)
