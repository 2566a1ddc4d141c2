"""Folders that are written as a whole or not at all: an interrupted write is never taken for a finished one."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paving.circuit.mask import CircuitError

CHUNK = 1 << 23  # bytes read at a time; a multiple of every element size


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A new folder beside `out` that takes its name when the block ends well, and is removed when it does not.

    A process killed meanwhile leaves `.partial-*` beside `out`, never `out`. Whoever fills the folder writes last the
    file without which it cannot be read.

    raises CircuitError if `out` exists and may not be replaced, or cannot be written.
    """
    check_free(out, overwrite=overwrite)
    partial = out.parent / f".partial-{out.name}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in filter(Path.is_file, partial.rglob("*")):
            _flush(path)  # else the rename could reach the disk before the content
        check_free(out, overwrite=overwrite)  # it may have appeared meanwhile; os.replace would take an empty folder
        _rename(partial, out)
    except OSError as error:
        raise CircuitError(f"cannot write {out}: {error}. Nothing is there; free space or give another folder.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(out: Path, *, overwrite: bool = False) -> None:
    """raises CircuitError if `out` exists and may not be replaced; only a folder ever is."""
    if out.is_symlink() or (out.exists() and not (overwrite and out.is_dir())):
        raise CircuitError(
            f"{out} exists already and was left as it is. Give another folder or remove it; a delta is also replaced with "
            "overwrite=True."
        )


def _rename(partial: Path, out: Path) -> None:
    if not out.exists():
        os.replace(partial, out)
        return
    old = out.parent / f".partial-{out.name}-{secrets.token_hex(4)}"
    try:
        os.replace(out, old)
        os.replace(partial, out)
    except BaseException:  # Ctrl-C between the two must not leave the place empty
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
