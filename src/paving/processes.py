"""Several processes on one job, as torchrun and `accelerate launch` start them: each does its share, and all know the whole.

Every process runs the same code on the same data and comes to the same state. What is heavy goes over shares: batches of
prompts when a model runs over many, rows of a step when a controller is trained. In a process by itself every function here
does nothing. The first process alone has the run folder; the others have copies, which go when they end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")


class ProcessError(RuntimeError):
    """Processes that cannot work together."""


def rank_and_world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def launched() -> Iterator[None]:
    """Joins the others where a launcher started this process (WORLD_SIZE in the environment). The first alone has stdout.

    A process that the launcher ends, as it does where another failed, cleans up as one that was interrupted, unless it is
    killed before it comes to it.
    raises ProcessError where accelerate is not installed
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or (dist.is_available() and dist.is_initialized()):
        yield
        return
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ProcessError("several processes need Hugging Face Accelerate: pip install accelerate.") from error
    # The others wait while the first one judges, which may take a judge hours.
    state = PartialState(timeout=timedelta(days=7))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with contextlib.ExitStack() as stack:
            if rank_and_world()[0]:
                quiet = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(quiet))
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        state.destroy_process_group()


@contextmanager
def together(folder: Path, cache: Path) -> Iterator[Path]:
    """`launched`, with the cache looked at and the run folder that this process works in (`workspace`)."""
    with launched():
        check_shared(cache)
        with workspace(folder) as mine:
            yield mine


@contextmanager
def workspace(folder: Path) -> Iterator[Path]:
    """The folder itself for the first process; for another a copy of its own, which nobody sees and which goes.

    raises ProcessError where not all see the same folder
    """
    rank, world = rank_and_world()
    if world == 1:
        yield folder
        return
    wait()
    listed = sorted((str(p.relative_to(folder)), p.stat().st_size) for p in folder.rglob("*") if p.is_file())
    if any(other != listed for other in gathered([listed])):
        raise ProcessError(f"the processes do not see the same files in {folder}. Give a run folder that every node sees.")
    with tempfile.TemporaryDirectory() as scratch:
        mine = Path(scratch) / folder.resolve().name
        if rank and folder.exists():
            shutil.copytree(folder, mine)
        wait()  # nobody writes before everybody has read
        yield mine if rank else folder
        wait()  # whoever ends first ends the process group of all


def check_shared(cache: Path) -> None:
    """raises ProcessError where the processes do not see one another's files in `cache`"""
    rank, world = rank_and_world()
    if world == 1:
        return
    cache.mkdir(parents=True, exist_ok=True)
    mark = cache / agreed(f".seen-by-all-{os.getpid()}")
    if rank == 0:
        mark.touch()
    wait()
    seen = all(gathered([mark.exists()]))
    wait()
    if rank == 0:
        mark.unlink(missing_ok=True)
    if not seen:
        raise ProcessError(f"the processes do not share {cache}. Give a folder that every node sees, with --cache.")


def shared(items: Sequence[T]) -> Sequence[T]:
    """This process's share: every world-th, from its rank on."""
    rank, world = rank_and_world()
    return items[rank::world]


def of_all(n: int) -> int:
    """For progress: what all have done about when this process has done n of its share."""
    return n * rank_and_world()[1]


def gathered(mine: Sequence[T]) -> list[T]:
    """What all made of their shares (`shared`), in the order of the whole."""
    _, world = rank_and_world()
    if world == 1:
        return list(mine)
    parts: list[Sequence[T]] = [()] * world
    dist.all_gather_object(parts, list(mine))
    whole: list = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank::world] = part
    return whole


def agreed(value: T) -> T:
    """The first process's value, for all: where each would look at files that another is writing."""
    return once(lambda: value)


def once(do: Callable[[], T]) -> T:
    """The first process does it and all have the result: what costs money, or writes where others read."""
    rank, world = rank_and_world()
    if world == 1:
        return do()
    box = [do() if rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def summed(values: Sequence[float]) -> list[float]:
    """Each value, added up over the processes."""
    _, world = rank_and_world()
    if world == 1:
        return list(values)
    total = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(total)
    return total.tolist()


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Adds gradients up over the processes, in place. One that no process has stays None: an optimiser passes it over."""
    _, world = rank_and_world()
    if world == 1 or not parameters:
        return
    there = summed([float(p.grad is not None) for p in parameters])
    mine = [p for p, n in zip(parameters, there, strict=True) if n]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in mine])
    dist.all_reduce(flat)
    for p, part in zip(mine, flat.split([p.numel() for p in mine]), strict=True):
        p.grad = part.view_as(p).clone()


def from_first(tensors: Sequence[Tensor]) -> None:
    """The first process's values, in place: sums may round differently elsewhere."""
    _, world = rank_and_world()
    for tensor in tensors if world > 1 else ():
        dist.broadcast(tensor, src=0)


def wait() -> None:
    """Until all are here."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator()
    return torch.device("cpu") if accelerator is None or dist.get_backend() == "gloo" else accelerator
