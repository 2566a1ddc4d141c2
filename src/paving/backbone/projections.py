"""Find the FFN output projection of a decoder block: the matrix whose channels a circuit is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paving.backbone.layers import BackboneError
from paving.backbone.load import Backbone

# Where the decoders of transformers keep it: Llama and its kin, GPT-2, GPT-NeoX, Phi and OPT, GPT-J, Falcon.
NAMES = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc2", "fc2", "mlp.fc_out", "feed_forward.down_proj")


@dataclass(frozen=True)
class Projection:
    """The FFN output projection of one block.

    layer      the block's index
    module     an nn.Linear, or a Conv1D (GPT-2), whose stored weight is the transpose
    parameter  the weight's name in the model's state_dict
    """

    layer: int
    module: nn.Module
    parameter: str

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """(d_model, d_ff): rows are output coordinates, columns FFN neurons; a view of the stored parameter."""
        stored = self.module.weight
        return stored.t() if self.transposed else stored


def ffn_outputs(backbone: Backbone) -> dict[int, Projection]:
    """The FFN output projection of every block, by layer.

    raises BackboneError for blocks without one (mixtures of experts), for quantised weights, and for weights that
    another module shares, where an edit would change more than it says.
    """
    backbone.check_in_memory("reading or changing FFN output projections")
    names = {id(p): name for name, p in backbone.model.named_parameters(remove_duplicate=False)}
    owners: dict[int, list[str]] = {}
    for name, parameter in backbone.model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    found = {}
    for layer, block in enumerate(backbone.layers):
        module = _ffn_output(backbone, layer, block)
        shared = owners.get(module.weight.data_ptr(), [])
        if len(shared) > 1:
            raise BackboneError(
                f"the FFN output projection of layer {layer} of {backbone.name} is tied: {', '.join(shared)} are one. "
                "A circuit edit there would change them all; untie and save the checkpoint first."
            )
        found[layer] = Projection(layer, module, names[id(module.weight)])
    return found


def _ffn_output(backbone: Backbone, layer: int, block: nn.Module) -> nn.Module:
    modules = dict(block.named_modules())
    module = next((modules[n] for n in NAMES if n in modules), None)
    if module is None:
        raise BackboneError(
            f"cannot find the FFN output projection in layer {layer} of {backbone.name} ({type(block).__name__}). "
            f"Looked for {', '.join(NAMES)}. Dense FFNs are supported; mixtures of experts are not."
        )
    weight = getattr(module, "weight", None)
    plain = isinstance(module, (nn.Linear, Conv1D)) and isinstance(weight, Tensor) and weight.dtype in FLOATS
    if not plain or type(module) not in (nn.Linear, Conv1D) or getattr(backbone.model, "quantization_method", None):
        raise BackboneError(
            f"the FFN output projection of layer {layer} of {backbone.name} is a {type(module).__name__} "
            f"({getattr(weight, 'dtype', 'no weight')}): quantised or wrapped weights cannot be edited bit for bit. "
            "Load the unquantised checkpoint."
        )
    return module


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
