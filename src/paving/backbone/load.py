"""Load a causal language model with its tokenizer and decoder layers: the frozen base of everything else."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from paving.backbone.embedded import EMBEDDED, embedded_checkpoint
from paving.backbone.fingerprint import fingerprint
from paving.backbone.layers import BackboneError, decoder_layers, text_config
from paving.backbone.offload import device_of, forget_with, is_offload, is_offloaded, placement


@dataclass(frozen=True)
class Backbone:
    """A frozen causal LM. Parameters have requires_grad off and dropout is off."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def layers(self) -> nn.ModuleList:
        return decoder_layers(self.model)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.model)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def d_model(self) -> int:
        return text_config(self.model).hidden_size

    @property
    def context_length(self) -> int:
        return text_config(self.model).max_position_embeddings

    @property
    def device(self) -> torch.device:
        return device_of(self.model.get_input_embeddings())

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends an answer: the generation configuration's, the model's, and the tokenizer's own."""
        ids: set[int] = set()
        for source in (self.model.generation_config, text_config(self.model), self.tokenizer):
            value = getattr(source, "eos_token_id", None)
            ids.update([value] if isinstance(value, int) else value or [])
        return tuple(sorted(ids))

    def check_in_memory(self, what: str) -> None:
        """raises BackboneError where weights stand elsewhere than in memory, and `what` would read or change them"""
        if is_offloaded(self.model):
            raise BackboneError(
                f"{what} needs all weights of {self.name} in memory, and some are offloaded. Give a device that holds them."
            )

    def check_layers(self, layers: tuple[int, ...], what: str) -> None:
        for layer in layers:
            if not 0 <= layer < self.n_layers:
                raise BackboneError(
                    f"{what} layer {layer} does not exist: {self.name} has layers 0..{self.n_layers - 1}. "
                    "A layer index names the block whose output is read or edited. Presets: paving models"
                )


def load_backbone(
    model: str | Path = EMBEDDED,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> Backbone:
    """Load `model` as a frozen backbone.

    model   `embedded:SmolLM2-135M-Instruct`, a local checkpoint folder, or a Hugging Face model id
    dtype   `auto` (the checkpoint's own), `float32`, `bfloat16` or `float16`
    device  `auto` (an accelerator if torch sees one, else the CPU), a torch device string, or `offload` (also
            `offload:20GiB`) for a base larger than the device (see backbone.offload)

    raises BackboneError if it cannot be loaded, has no chat template, or is no decoder whose layers can be found.
    """
    name = str(model)
    path = str(embedded_checkpoint()) if name == EMBEDDED else name
    allowed = ("auto", "float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise BackboneError(f"dtype {dtype!r} is not known; allowed: {', '.join(allowed)}.")
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(accelerator) if accelerator is not None else "cpu"
    looks_local = path.startswith((".", "/", "~")) or os.sep + os.sep in path
    if looks_local and not Path(path).expanduser().is_dir():
        raise BackboneError(f"there is no model folder {path}. Give a checkpoint folder or a Hugging Face model id.")
    placed = placement(device) if is_offload(device) else {}
    path = str(Path(path).expanduser()) if looks_local or Path(path).is_dir() else path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        torch_dtype = "auto" if dtype == "auto" else getattr(torch, dtype)
        lm = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=torch_dtype, trust_remote_code=trust_remote_code, **placed
        )
    except (OSError, ValueError, KeyError) as error:
        if placed:
            shutil.rmtree(placed["offload_folder"], ignore_errors=True)
        raise BackboneError(
            f"cannot load {name}: {str(error).splitlines()[0]} "
            "Give a checkpoint folder, a Hugging Face model id that this machine can reach, or "
            f"{EMBEDDED} (no network needed)."
        ) from error
    if placed:
        forget_with(lm, placed["offload_folder"])
    return as_backbone(lm if placed else lm.to(device), tokenizer, name)


def as_backbone(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Backbone:
    """Freeze an already loaded model and check that it can be a backbone. The tokenizer is set to pad on the left."""
    if not getattr(tokenizer, "chat_template", None):
        raise BackboneError(
            f"{name} has no chat template, so there is no way to tell a request from its answer. "
            "Use an instruction-tuned model, or set tokenizer.chat_template and save the tokenizer."
        )
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise BackboneError(
            f"the tokenizer of {name} has neither a padding nor an end-of-text token, so prompts cannot be batched and "
            "answers cannot end. Set tokenizer.eos_token and save the tokenizer."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Left padding puts every prompt's last token in one column, which is where routing reads and editing begins.
    tokenizer.padding_side = "left"
    model.eval()
    model.requires_grad_(False)
    backbone = Backbone(name=name, model=model, tokenizer=tokenizer)
    _ = backbone.layers  # an unsupported architecture is refused here rather than in the middle of a run
    return backbone
