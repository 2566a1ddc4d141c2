"""What decodes the answers of a run's rows, and where answers that were not decoded here stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from paving.backbone import Backbone
from paving.controller.residual_paving import ResidualPaving
from paving.generation import TRANSFORMERS, Engine, Transformers
from paving.intervention import Intervention
from paving.prompts.types import Bucket, Prompt
from paving.run_folder import RunError

VLLM = "vllm"


def answers_folder(folder: Path, engine: str) -> Path:
    """raises RunError for an engine that is not known"""
    if engine not in (TRANSFORMERS, VLLM):
        raise RunError(f"the engine {engine!r} is not known; allowed: {TRANSFORMERS}, {VLLM}.")
    return folder if engine == TRANSFORMERS else folder / "engines" / engine


@contextmanager
def engine_of(
    name: str,
    folder: Path,
    controller: ResidualPaving,
    backbone: Backbone,
    options: Mapping[str, object] | None,
    rows: Sequence[Intervention] = (),
) -> Iterator[Engine]:
    """folder: the controller's; rows: what is to be decoded.

    raises RunError for options without an engine, ControllerError where vLLM cannot be had, ValueError for a row that it
    does not serve, before it starts
    """
    if name == TRANSFORMERS:
        if options:
            raise RunError(
                f"engine options are vLLM's own, and {TRANSFORMERS} decodes. Leave them out, or add --engine {VLLM}."
            )
        yield Transformers()
        return
    from paving.serving.offline import asked_of, vllm_engine

    for row in rows:
        asked_of(controller, row, Prompt("", "", Bucket.EDIT, group=""))
    with vllm_engine(folder, controller, backbone, options or {}) as engine:
        yield engine
