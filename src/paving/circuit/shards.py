"""A checkpoint folder as files: which tensor lies where. No model is built and no weight is held to learn that."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paving.backbone.embedded import EMBEDDED, embedded_checkpoint
from paving.circuit.folders import CHUNK
from paving.circuit.mask import CircuitError

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What belongs to a checkpoint beside its weights. Weights in other formats are left behind: they are not edited.
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
TEMPLATES = "additional_chat_templates"


@dataclass(frozen=True)
class Stored:
    """One tensor in a file. dtype as safetensors names it (`BF16`); start and end are byte offsets in the file."""

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in safetensors, one file or sharded.

    config   config.json
    tensors  name -> where it lies
    headers  weight file -> metadata of its header
    index    metadata of the shard index; None for a single file
    """

    folder: Path
    config: Mapping[str, object]
    tensors: Mapping[str, Stored]
    headers: Mapping[str, Mapping[str, str]]
    index: Mapping[str, object] | None

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        with safe_open(self.folder / self.tensors[name].file, framework="pt") as file:
            return file.get_tensor(name)

    def chunks(self, name: str) -> Iterator[bytes]:
        """The tensor's bytes, a few MiB at a time."""
        stored = self.tensors[name]
        with (self.folder / stored.file).open("rb") as file:
            file.seek(stored.start)
            for at in range(stored.start, stored.end, CHUNK):
                yield file.read(min(CHUNK, stored.end - at))


def checkpoint_folder(model: str | Path) -> Path:
    """The folder of a base: a local folder, the embedded model, or a Hugging Face id that is in the local cache already.

    raises CircuitError if there is none; nothing is downloaded
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if str(model) == EMBEDDED:
        return embedded_checkpoint()
    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except HFValidationError:
        raise CircuitError(f"there is no checkpoint folder {model}. Give one, {EMBEDDED}, or a model id.") from None
    except LocalEntryNotFoundError:
        raise CircuitError(
            f"there is no checkpoint folder {model}, and no model of that name in the local Hugging Face cache. Give a "
            f"checkpoint folder, {EMBEDDED}, or download the model first: hf download {model}"
        ) from None


def open_checkpoint(folder: str | Path, config: Mapping[str, object] | None = None) -> Checkpoint:
    """config: of a folder that has none yet

    raises CircuitError for a folder that is no whole checkpoint in safetensors"""
    folder = Path(folder)
    config = read_json(folder / CONFIG) if config is None else config
    single, index = folder / SINGLE, folder / INDEX
    # As transformers chooses: the single file is read where both are there.
    if single.is_file():
        names, listed = [SINGLE], None
    elif index.is_file():
        content = read_json(index)
        listed = content.get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) and Path(f).name == f for f in listed.values()):
            raise CircuitError(f"{index} has no weight_map of tensors and files; save or download the checkpoint again.")
        names = sorted(set(listed.values()))
    else:
        others = sorted(p.name for p in folder.glob("*") if p.suffix in {".bin", ".pt", ".pth", ".gguf", ".h5"})
        raise CircuitError(
            f"{folder} has neither {SINGLE} nor {INDEX}{' (only ' + ', '.join(others) + ')' if others else ''}. Edits are "
            "written into safetensors: load it in transformers and save it with save_pretrained first."
        )
    headers, stored = {}, []
    for name in names:
        headers[name], found = _header(folder / name)
        stored += found
    tensors = {s.name: s for s in stored}
    if listed is not None and (len(tensors) != len(stored) or {n: s.file for n, s in tensors.items()} != listed):
        raise CircuitError(f"{index} does not list the tensors that its files hold; save or download the checkpoint again.")
    metadata = None if listed is None else content.get("metadata", {})
    return Checkpoint(folder, config, tensors, headers, metadata)


def stored_name(names: Collection[str], parameter: str) -> str | None:
    """What a checkpoint calls a model's parameter, or None if that cannot be told.

    Most files use the model's own names. Where they do not (GPT-2 files without `transformer.`, multimodal models with
    prefixes in another order) it is the one name with the longest dotted ending in common, the layer's number included;
    of several, the one that has most of the other parts too, as a language model and a vision tower may end alike.
    """
    if parameter in names:
        return parameter
    wanted = parameter.split(".")[::-1]
    number = max((i for i, part in enumerate(wanted) if part.isdigit()), default=1)
    alike = {name: _alike(wanted, name.split(".")[::-1]) for name in names}
    best = max(alike.values(), default=(0, 0))
    found = [name for name, how in alike.items() if how == best]
    return found[0] if len(found) == 1 and best[0] > number else None


def belongs_beside(name: str) -> bool:
    """Is this path in a checkpoint folder part of the checkpoint, and no weights?"""
    path = PurePosixPath(name)
    top = str(path.parent) in {".", TEMPLATES}
    # An index is one only of the files that it lists; those of other formats stay behind with their weights.
    return top and not name.endswith(".index.json") and any(path.match(pattern) for pattern in BESIDE)


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CircuitError(f"{path.parent} is no whole checkpoint: {path.name} is missing.") from None
    except (OSError, ValueError) as error:
        raise CircuitError(f"{path} cannot be read: {error}. Save or download the checkpoint again.") from None
    if not isinstance(content, dict):
        raise CircuitError(f"{path} is not a JSON object. Save or download the checkpoint again.")
    return content


def _header(path: Path) -> tuple[dict[str, str], list[Stored]]:
    """Metadata and tensors of one safetensors file: 8 bytes of length, a JSON header, the tensors' bytes."""
    try:
        with safe_open(path, framework="pt") as file:  # checks that the offsets cover the file without gap or overlap
            names = set(file.keys())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length), object_pairs_hook=_without_repeats)
        metadata = header.pop("__metadata__", {})
        tensors = [
            Stored(name, path.name, t["dtype"], tuple(t["shape"]), *(8 + length + o for o in t["data_offsets"]))
            for name, t in header.items()
        ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CircuitError(f"{path} is missing or damaged: {error}. Save or download the checkpoint again.") from None
    if names != {t.name for t in tensors}:
        raise CircuitError(f"{path} is damaged: its header can be read in two ways. Save or download the checkpoint again.")
    return metadata, tensors


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name is there twice in the header")
    return content


def _alike(one: list[str], other: list[str]) -> tuple[int, int]:
    """(parts in common from the start, parts in common anywhere) of two reversed names."""
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return start, (Counter(one) & Counter(other)).total()
