"""What the frozen base did on a prompt: boundary states, prompt KV, and its distributions along a continuation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from paving.backbone import Backbone, PromptBatch, pad_left
from paving.backbone.hooks import record_residuals
from paving.processes import agreed, of_all, shared, wait
from paving.prompts.types import Bucket
from paving.traces.forward import join_cache, pad_right, prompt_cache, split_cache, teacher_forced_logits
from paving.traces.store import TraceStore, chunks, to_storage
from paving.traces.top_k import TopK, top_k

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Forced:
    """A prompt with the continuation to be forced on it, as token ids.

    bucket is carried for the stages that fit a controller; no trace depends on it.
    """

    id: str
    bucket: Bucket
    prompt_ids: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """One row's trace. T is the length of its continuation.

    boundary_last, boundary_mean  (n_layers, d_model) bfloat16: every block's output at / over the prompt
    top                           the base's top-k along the continuation, (T, k)
    resid                         (n_layers, T, d_model) bfloat16, base states along the continuation; None unless asked
    """

    boundary_last: Tensor
    boundary_mean: Tensor
    top: TopK
    resid: Tensor | None

    def boundary(self, layers: Sequence[int], pooling: str) -> Tensor:
        """(n_features) float32, the router's input: as `boundary_features` lays it out."""
        parts = [self.boundary_last] if "last" in pooling else []
        if "mean" in pooling:
            parts.append(self.boundary_mean)
        return torch.cat([part[list(layers)] for part in parts], dim=1).float().flatten()


class BaseTraces:
    """Builds traces of one backbone into a store, and reads them back."""

    def __init__(self, backbone: Backbone, store: TraceStore, *, k: int = 1024, batch_size: int = 8):
        self.backbone, self.store, self.k, self.batch_size = backbone, store, k, batch_size

    def _key(self, row: Forced) -> str:
        return TraceStore.key(
            base=self.backbone.fingerprint,
            dtype=str(self.backbone.dtype),
            prompt=row.prompt_ids,
            continuation=row.continuation,
            k=self.k,
        )

    def _prefix_key(self, prompt_ids: Sequence[int]) -> str:
        return TraceStore.key(base=self.backbone.fingerprint, dtype=str(self.backbone.dtype), prefix=tuple(prompt_ids)[:-1])

    def build(self, rows: Sequence[Forced], *, with_resid: bool = False, tick: Tick | None = None) -> None:
        """Make whatever is missing. `with_resid` also keeps the states along the continuation (edit prompts)."""
        kind = "forced-resid" if with_resid else "forced"
        absent = agreed([not self.store.has(kind, self._key(r)) for r in rows])
        missing = [r for r, is_absent in zip(rows, absent, strict=True) if is_absent]
        if tick is not None:
            tick(len(rows) - len(missing))
        by_length = sorted(missing, key=lambda r: (len(r.prompt_ids), r.id))
        for chunk in shared(list(chunks(by_length, self.batch_size))):
            self._build_chunk(chunk, kind, with_resid)
            if tick is not None:
                tick(of_all(len(chunk)))
        wait()  # all are there, whoever made them

    @torch.no_grad()
    def _build_chunk(self, chunk: Sequence[Forced], kind: str, with_resid: bool) -> None:
        batch = forced_batch(self.backbone, chunk)
        continuation, _ = pad_right([r.continuation for r in chunk], self.backbone.pad_id, self.backbone.device)
        every_layer = range(self.backbone.n_layers)
        with record_residuals(self.backbone, every_layer) as prefix_states:
            cache = prompt_cache(self.backbone, batch)
        prefixes = split_cache(cache, batch)
        with record_residuals(self.backbone, every_layer) as states:
            logits = teacher_forced_logits(self.backbone, batch, continuation, cache=cache)
        top = top_k(logits, self.k)
        resid = torch.stack([states[layer] for layer in every_layer], dim=1)  # (n, n_layers, T, d)
        mask = batch.attention_mask[:, :-1, None]
        sums = torch.stack([(prefix_states[la].float() * mask).sum(1) for la in every_layer], dim=1)
        for i, row in enumerate(chunk):
            steps = len(row.continuation)
            tensors = {
                "boundary_last": to_storage(resid[i, :, 0]),
                "boundary_mean": to_storage((sums[i] + resid[i, :, 0].float()) / len(row.prompt_ids)),
                "top_log_probs": top.log_probs[i, :steps],
                "top_ids": top.ids[i, :steps].to(torch.int32),
            }
            if with_resid:
                tensors["resid"] = to_storage(resid[i, :, :steps])
            self.store.put(kind, self._key(row), tensors)
            key = self._prefix_key(row.prompt_ids)
            if not self.store.has("prefix", key):
                self.store.put("prefix", key, {"kv": prefixes[i]}, rebuildable=True)

    def read(self, row: Forced, *, with_resid: bool = False) -> Trace:
        tensors = self.store.get("forced-resid" if with_resid else "forced", self._key(row))
        return Trace(
            tensors["boundary_last"],
            tensors["boundary_mean"],
            TopK(tensors["top_log_probs"], tensors["top_ids"].long()),
            tensors.get("resid"),
        )

    def prefix(self, rows: Sequence[Forced]) -> tuple[PromptBatch, DynamicCache]:
        """The batch of these prompts and the KV of all their columns but the last; rebuilt where it was not kept."""
        batch = forced_batch(self.backbone, rows)
        keys = [self._prefix_key(r.prompt_ids) for r in rows]
        if all(self.store.has("prefix", key) for key in keys):
            kept = [self.store.get("prefix", key)["kv"].to(self.backbone.device) for key in keys]
            return batch, join_cache(kept, batch.width - 1)
        with torch.no_grad():
            return batch, prompt_cache(self.backbone, batch)


def forced_batch(backbone: Backbone, rows: Sequence[Forced]) -> PromptBatch:
    ids, mask = pad_left(backbone, [r.prompt_ids for r in rows])
    return PromptBatch(ids, mask, tuple(r.id for r in rows), tuple(r.bucket for r in rows))
