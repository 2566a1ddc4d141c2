"""The trained part of a controller: router, bottleneck experts, veto. Plain tensors in, plain tensors out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paving.controller.config import ControllerConfig
from paving.controller.gate_machines import GateMachines

Edit = Callable[[Tensor], Tensor]
Joined = tuple[list[int], Tensor, Tensor, Tensor, Tensor]  # active experts, w_in, b_in, w_out, gain of one layer


class Router(nn.Module):
    """Boundary feature z (n, n_features) -> gate logit (n,) and expert weights (n, K). Section 3.2.

    Features are standardised with training-set statistics first; the veto reads the same standardised features.
    """

    def __init__(self, n_features: int, hidden: int, n_experts: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_features))
        self.register_buffer("std", torch.ones(n_features))
        self.body = nn.Sequential(nn.Linear(n_features, hidden), nn.GELU())
        self.gate = nn.Linear(hidden, 1)
        self.mixture = nn.Linear(hidden, n_experts)

    def normalise(self, z: Tensor) -> Tensor:
        return (z.float() - self.mean) / self.std

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.body(self.normalise(z))
        return self.gate(hidden).squeeze(-1), self.mixture(hidden).softmax(-1)


class Veto(nn.Module):
    """Linear harmful-keep classifier over standardised boundary features (A.4). `fitted` is 0 until it was trained."""

    def __init__(self, n_features: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(n_features))
        self.register_buffer("bias", torch.zeros(()))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("fitted", torch.zeros(()))

    def forward(self, normalised: Tensor) -> Tensor:
        """(n, n_features) -> (n,) logits; a row is vetoed where its logit exceeds the threshold."""
        return normalised @ self.weight + self.bias


class Experts(nn.Module):
    """K bottleneck maps per edited layer: e_k,l(h) = rms_l * g_k,l * w_k(l) * GELU(h / rms_l W_in + b) W_out; without
    GELU where the configuration leaves it out.

    rms_l is the base's own residual size at that layer, so one learning rate fits every depth. W_out starts at zero:
    an untrained controller edits nothing.
    """

    def __init__(self, config: ControllerConfig, d_model: int, n_layers: int):
        super().__init__()
        width = d_model // config.bottleneck_ratio
        n_edit, k = len(config.edit_layers), config.n_experts
        self.layers = config.edit_layers
        self.n_layers = n_layers
        self.gain_clip = config.gain_clip
        self.linear = config.activation == "none"
        self.w_in = nn.Parameter(torch.randn(n_edit, k, d_model, width) / d_model**0.5)
        self.b_in = nn.Parameter(torch.zeros(n_edit, k, width))
        self.w_out = nn.Parameter(torch.zeros(n_edit, k, width, d_model))
        self.gain = nn.Parameter(torch.ones(n_edit, k))
        self.register_buffer("rms", torch.ones(n_edit))
        window = [[config.window(e, layer, n_layers) for e in range(k)] for layer in config.edit_layers]
        self.register_buffer("window", torch.tensor(window), persistent=True)
        self._kept: tuple[tuple, dict[int, Joined]] | None = None  # what the frozen experts joined to, and from what

    def edits(self, strength: Tensor, dtype: torch.dtype) -> dict[int, Edit]:
        """Per edited layer, the function resid (n, t, d) -> resid + edit.

        strength: (n, K) float32, scale * gate * mixture of each row. All K experts of a layer are one pair of matrix
        products: their bottlenecks lie side by side, and each row weighs them before the second product.
        """
        result = {}
        for layer, (active, w_in, b_in, w_out, gain) in self._joined(dtype).items():
            weight = (strength[:, active] * gain).repeat_interleave(self.w_in.shape[-1], dim=1)
            result[layer] = _layer_edit(w_in, b_in, w_out, weight.to(dtype), self.linear)
        return result

    def _joined(self, dtype: torch.dtype) -> dict[int, Joined]:
        """The experts of each layer side by side, in `dtype`: joined anew while they learn, once while they are frozen.

        Joining costs as much as several decode steps of edits, so a frozen module keeps the result. It is told stale
        by the tensors' version counters, which every in-place change moves except one made through `.data`.
        """
        tensors = (self.w_in, self.b_in, self.w_out, self.gain, self.rms, self.window)
        if any(t.requires_grad or t.is_inference() for t in tensors):
            return self._join(dtype)
        made_from = (dtype, *((t.data_ptr(), t.device, t.dtype, t._version) for t in tensors))
        kept = self._kept
        if kept is None or kept[0] != made_from:
            # Ordinary tensors even where the caller is in inference mode: a later batch may need gradients to pass.
            with torch.inference_mode(False):
                self._kept = kept = (made_from, self._join(dtype))
        return kept[1]

    def _join(self, dtype: torch.dtype) -> dict[int, Joined]:
        gains = self.gain.clamp(0.0, self.gain_clip) * self.window
        # Taken apart once: going back through `w[i, e]` would fill and add a gradient of w's whole size for every i, e.
        parts_in, parts_bias, parts_out = (w.flatten(0, 1).unbind() for w in (self.w_in, self.b_in, self.w_out))
        result = {}
        for i, (layer, reached) in enumerate(zip(self.layers, (self.window > 0).tolist(), strict=True)):
            active = [e for e, inside in enumerate(reached) if inside]
            if not active:
                continue
            mine = [i * len(reached) + e for e in active]
            w_in = torch.cat([parts_in[j] for j in mine], dim=1) / self.rms[i]
            b_in = torch.cat([parts_bias[j] for j in mine])
            w_out = torch.cat([parts_out[j] for j in mine], dim=0) * self.rms[i]
            result[layer] = (active, w_in.to(dtype), b_in.to(dtype), w_out.to(dtype), gains[i, active])
        return result


def _layer_edit(w_in: Tensor, b_in: Tensor, w_out: Tensor, weight: Tensor, linear: bool) -> Edit:
    """w_in (d, m), b_in (m), w_out (m, d), weight (n, m) -> function on resid (n, t, d)."""

    def edit(resid: Tensor) -> Tensor:
        n, t, d = resid.shape
        flat = resid.reshape(n * t, d)
        row_weight = weight if t == 1 else weight.repeat_interleave(t, dim=0)
        hidden = torch.addmm(b_in, flat, w_in)
        hidden = (hidden if linear else F.gelu(hidden, approximate="tanh")) * row_weight
        return torch.addmm(flat, hidden, w_out).view(n, t, d)

    return edit


class ControllerWeights(nn.Module):
    """Everything that is trained, for one backbone shape. float32 whatever the backbone's dtype."""

    def __init__(self, config: ControllerConfig, d_model: int, n_layers: int):
        super().__init__()
        if config.edit_layers is None:
            raise ValueError("resolve the configuration against a backbone first: config.resolved(backbone).")
        n_features = config.n_features(d_model)
        self.router = Router(n_features, config.router_hidden, config.n_experts)
        self.veto = Veto(n_features)
        self.experts = Experts(config, d_model, n_layers)
        self.gate = GateMachines(config.gate) if config.gate else None

    def route(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Boundary features (n, n_features) -> gate logits (n,) and expert weights (n, K), as deployed."""
        logit, mixture = self.router(z)
        return (logit if self.gate is None else self.gate(z)), mixture

    def unlikeness(self, z: Tensor) -> Tensor:
        """(n, n_features) -> (n,): root mean square of the standardised features, about 1 for those the router was fitted
        on. Large where a prompt lies far from all of them; it says nothing of the direction."""
        return self.router.normalise(z).square().mean(1).sqrt()
