"""`paving.load(...)`: a Hugging Face causal LM that routes and edits, row by row, and otherwise behaves as it did."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paving.backbone import Backbone, PromptBatch, as_backbone, load_backbone, pad_left, render_messages
from paving.controller.card import write_card
from paving.controller.gates import CONFORMAL
from paving.controller.residual_paving import ResidualPaving
from paving.controller.store import ControllerError, check_deployable, load_controller, read_description, save_controller
from paving.intervention import RowState
from paving.prompts.types import Bucket


class PavedModel(nn.Module):
    """A frozen causal LM with a controller. `generate` and calling it take what the model itself takes.

    Each row has its own gate, decided once from the prompt; rows with a closed gate get the base model's answer.
    Attributes not found here are the model's own (`config`, `device`, `generation_config`, ...).
    """

    def __init__(self, backbone: Backbone, controller: ResidualPaving, trained_on: Mapping[str, Any] | None = None):
        """trained_on: what the controller's folder says of its training, promises above all; saved along with it again"""
        super().__init__()
        controller.check(backbone)
        check_deployable(controller)
        self.model = backbone.model
        self.tokenizer = backbone.tokenizer
        self.controller = controller
        self._backbone = backbone
        self._threshold = controller.threshold
        self._trained_on = None if trained_on is None else dict(trained_on)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        bucket: list[Bucket] | None = None,
        return_gates: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`model.generate` with the edit: greedy or sampling, streaming, several samples a prompt, a KV cache to go on from.

        input_ids      (n, width) int64, padded on the left
        bucket         true labels, only for the oracle policy
        return_gates   also return one RowState a row: (output, rows)

        raises ValueError for right padding, beam search and assisted decoding, whose rows would lose their gates.
        """
        input_ids = kwargs.pop("inputs", input_ids)
        if input_ids is None:
            raise ValueError("generate needs input_ids (n, width); `inputs_of` renders prompts.")
        if self._num_beams(kwargs) > 1 or kwargs.get("assistant_model") is not None:
            raise ValueError(
                "beam search and assisted decoding reorder or skip rows, and each row has its own gate. "
                "Use greedy decoding or sampling."
            )
        batch = self._batch(input_ids, attention_mask, bucket)
        past = kwargs.get("past_key_values")
        start = past.get_seq_length() if past is not None else 0
        with self.controller.apply(self._backbone, batch, start=start) as applied:
            output = self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **kwargs)
            rows = applied.rows()
        return (output, rows) if return_gates else output

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        prompt_length: int | None = None,
        bucket: list[Bucket] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One pass. The first `prompt_length` columns (default: all) are the prompt; the rest is edited as generated text.

        raises ValueError if a KV cache is given: the gate of an answer under way is known only to `generate`.
        """
        if kwargs.get("past_key_values") is not None:
            raise ValueError("a single pass cannot go on from a KV cache, as its gate is not known; use generate.")
        width = input_ids.shape[1] if prompt_length is None else prompt_length
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        batch = self._batch(input_ids[:, :width], mask[:, :width], bucket)
        with self.controller.apply(self._backbone, batch):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    @property
    def system(self) -> str | None:
        """The system prompt that the controller was fitted behind, if any: `inputs_of` begins conversations with it."""
        return (self._trained_on or {}).get("system")

    def inputs_of(self, conversations: Sequence[str | Sequence[dict[str, str]]]) -> dict[str, Tensor]:
        """What `generate` takes, rendered as for training: its chat template arguments, behind its system prompt.

        A template that writes today's date or opens a thinking block gives the gate other states than it was fitted on.

        conversations  a user's text each, or messages {"role", "content"}; a system message of their own is kept

        Returns input_ids and attention_mask, (n, width) int64 on the model's device, padded on the left.
        raises BackboneError where the chat template takes no system prompt, ValueError for no conversation
        """
        if isinstance(conversations, str) or not conversations:
            raise ValueError(f"inputs_of needs a list of texts or conversations, at least one; got {conversations!r}.")
        opening = [{"role": "system", "content": self.system}] if self.system else []
        rows = []
        for one in conversations:
            messages = [{"role": "user", "content": one}] if isinstance(one, str) else list(one)
            own = bool(messages) and messages[0]["role"] == "system"
            rows.append(render_messages(self._backbone, messages if own else [*opening, *messages]))
        ids, mask = pad_left(self._backbone, rows)
        return {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def gates(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[RowState, ...]:
        """Gate, veto and mixture of each prompt, without generating."""
        batch = self._batch(input_ids, attention_mask, None)
        with self.controller.apply(self._backbone, batch) as applied:
            self.model.get_decoder()(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            )
            return applied.rows()

    def set_policy(self, name: str, *, threshold: float | None = None, use_veto: bool | None = None) -> PavedModel:
        """Another gate policy from now on: soft, hard, thresholded, conformal:ALPHA, closed, open or oracle. Returns self.

        raises ValueError for a name that is not known, and an alpha that the calibration cannot show
        """
        # A policy without a threshold must not lose the calibrated one: what was promised rests on it.
        if threshold is not None and name.startswith(CONFORMAL):
            raise ValueError(f"{name} makes its threshold of the calibration; leave `threshold` out.")
        if hasattr(self.controller.policy, "threshold"):
            self._threshold = self.controller.threshold
        self._threshold = self._threshold if threshold is None else threshold
        policy = self.controller.policy_named(name, self._threshold)
        self.controller = self.controller.with_policy(policy, use_veto=use_veto)
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the controller (safetensors, JSON, model card); the base is named by fingerprint, not copied."""
        save_controller(
            self.controller, Path(folder), None if self._trained_on is None else {"trained_on": self._trained_on}
        )
        write_card(Path(folder), read_description(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: Any = None, **load: Any) -> PavedModel:
        """Load a saved controller with its base: `model` if given, else the base it was trained for."""
        return load_paved(model, controller=folder, **load)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload what `save_pretrained` writes; private unless asked otherwise. Returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    def _num_beams(self, options: dict[str, Any]) -> int:
        """As `model.generate` will take it: from its arguments, else the configuration given, else the model's own."""
        configs = (options.get("generation_config"), self.model.generation_config)
        stated = [options.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs)]
        return next((n for n in stated if n is not None), 1)

    def _batch(self, ids: Tensor, mask: Tensor | None, bucket: list[Bucket] | None) -> PromptBatch:
        ids = ids.to(self._backbone.device)
        mask = torch.ones_like(ids) if mask is None else mask.to(ids.device)
        if not bool(mask[:, -1].all()):
            raise ValueError(
                "prompts must be padded on the left (tokenizer.padding_side = 'left'): the gate reads, and the edit "
                "begins at, the last column."
            )
        n = len(ids)
        return PromptBatch(ids, mask, tuple(str(i) for i in range(n)), tuple(bucket) if bucket else (None,) * n)


def load_paved(
    model: str | Path | PreTrainedModel | None = None,
    *,
    controller: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> PavedModel:
    """A paved model: `model` (a name, a folder, or a loaded Hugging Face model with its tokenizer) and a controller.

    model       None: the base that the controller was trained on, by the name it had then
    controller  a run folder, a controller folder, or a Hugging Face repository id

    raises BackboneError if the controller was trained for another base; ControllerError if it cannot be read, or was
    fitted to be measured only (two objectives).
    """
    folder = controller_folder(controller)
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer too: paving.load(model, tokenizer=..., controller=...).")
        backbone = as_backbone(model, tokenizer, model.config._name_or_path or type(model).__name__)
    else:
        base = read_description(folder)["base"]["name"] if model is None else model
        backbone = load_backbone(base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return PavedModel(backbone, load_controller(folder, backbone), trained_on(folder))


def trained_on(folder: Path) -> dict[str, Any] | None:
    """What a controller's folder says of its training; the system prompt of a run of before stands in the run's own file."""
    found, run = read_description(folder).get("trained_on"), folder.parent / "config.json"
    if found is not None and "system" not in found and run.exists():
        with suppress(ValueError, AttributeError):
            system = json.loads(run.read_text(encoding="utf-8")).get("system")
            return found | ({"system": system} if system else {})
    return found


def controller_folder(where: str | Path) -> Path:
    """A local controller folder, a run folder's controller, or the downloaded copy of a hub repository."""
    path = Path(where).expanduser()
    if (path / "controller" / "controller.json").exists():
        return path / "controller"
    if path.is_dir():
        return path
    text = str(where)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

        try:
            # Only what a controller consists of: nothing else of a repository is ever downloaded or run.
            return Path(snapshot_download(text, allow_patterns=["controller.json", "controller.safetensors"]))
        except (HfHubHTTPError, RepositoryNotFoundError, LocalEntryNotFoundError, OSError) as error:
            raise ControllerError(f"no folder {text}, and the hub has no such controller: {error}") from error
    raise ControllerError(f"there is no controller folder {where}. Give a run folder or a saved controller.")
