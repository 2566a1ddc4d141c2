"""Base traces on disk, by content: built once, read by every stage, within a size that the user can set."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

GIB = 1024**3
HEADER = 256  # bytes; no tensor takes more than this of a file's header


class TraceError(RuntimeError):
    """Traces that cannot be stored or read; the message says what to do. Nothing that was stored is lost."""


class TraceStore:
    """Named tensors under `root`, keyed by what they were made from.

    budget_gib bounds what is on disk under root. Small parts (boundary states, distributions) are always kept; the
    prompt KV, which is large and can be rebuilt from the prompt, is kept only while it fits.
    """

    def __init__(self, root: Path, budget_gib: float = 8.0):
        self.root = root
        self.budget = int(budget_gib * GIB)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TraceError(f"cannot keep traces in {root}: {error.strerror}. Give another --cache folder.") from error
        self.used = sum(f.stat().st_size for f in root.rglob("*.safetensors"))

    @staticmethod
    def key(**content: object) -> str:
        """A name for anything made from exactly this content (JSON-able values)."""
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def path(self, kind: str, key: str) -> Path:
        return self.root / kind / key[:2] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).exists()

    def put(self, kind: str, key: str, tensors: Mapping[str, Tensor], *, rebuildable: bool = False) -> bool:
        """Store tensors; returns False (and stores nothing) where a rebuildable part would exceed the budget."""
        size = sum(t.numel() * t.element_size() + HEADER for t in tensors.values())
        if rebuildable and self.used + size > self.budget:
            return False
        path = self.path(kind, key)
        replaced = path.stat().st_size if path.exists() else 0
        partial = path.with_suffix(f".partial-{platform.node()}-{os.getpid()}")  # of every process that writes here
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):  # it may never have been made, and what went wrong is told below
                partial.unlink()
            full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
            why = "the disk is full" if full else str(error)
            raise TraceError(
                f"cannot write a trace under {self.root}: {why}. Free space, lower --cache-gib, or give another --cache "
                "folder; what was cached so far is kept and the same command goes on from there."
            ) from error
        self.used += path.stat().st_size - replaced
        return True

    def get(self, kind: str, key: str) -> dict[str, Tensor]:
        """raises TraceError where the file is missing or damaged (a damaged file is removed, so a re-run rebuilds it)."""
        path = self.path(kind, key)
        try:
            return load_file(path)
        except FileNotFoundError:
            raise TraceError(f"{path} is gone; run the same command again to rebuild it.") from None
        except (OSError, SafetensorError) as error:
            path.unlink(missing_ok=True)
            raise TraceError(
                f"{path} was damaged ({error}) and has been removed; run the same command again to rebuild it."
            ) from error


def chunks(items: Sequence, size: int):
    for start in range(0, len(items), size):
        yield items[start : start + size]


def to_storage(resid: Tensor) -> Tensor:
    """Residual states are stored in bfloat16: their use (features, cosines) does not need more, and they are many."""
    return resid.to(torch.bfloat16)
