"""The run folder: one configuration, what it was made with, and how its files are written."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from paving.backbone import EMBEDDED
from paving.controller.config import ControllerConfig
from paving.evaluation.judges.named import judge_line
from paving.generation import Decoding
from paving.prompts.splits import SplitSizes
from paving.training.config import CalibrationConfig, TrainingConfig
from paving.training.gate_search import GateSearch

STARTER = "starter"


class RunError(RuntimeError):
    """A run folder or command that cannot go on; the message says what, what is allowed, and how to mend it."""


class RunConfig(BaseModel):
    """Everything that decides the outcome of a run. Saved as config.json; a folder belongs to one configuration.

    edit, benign, harmful  a prompt file or dataset each (see paving.prompts.readers), or `starter`
    targets_from           a model whose answers are the edit targets, for over-refused safe prompts
    objectives             two: nothing is fitted or calibrated on harmful keeps, as in the paper's two-objective rows (table
                           9); to be measured and not deployed, so such a controller is not exported or served
    router                 how the gate was searched, in a run whose experts are another's (see router_search)
    system                 the system prompt that every prompt without its own is asked behind, as it will be served;
                           contrast pairs of a gate search, too
    judge                  who says what a refusal is, in filters, calibration and evaluation (see judges.named)
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = EMBEDDED
    dtype: str = "auto"
    edit: str = STARTER
    benign: str = STARTER
    harmful: str = STARTER
    system: str | None = None
    sizes: SplitSizes = SplitSizes()
    split_seed: int = 0
    targets_from: str | None = None
    controller: ControllerConfig = ControllerConfig()
    training: TrainingConfig = TrainingConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    decoding: Decoding = Decoding()
    allow_leakage: bool = False
    objectives: Literal["two", "three"] = "three"
    judge: str = "rules"
    router: GateSearch | None = None

    @field_validator("judge")
    @classmethod
    def _judge_is_known(cls, line: str) -> str:
        return str(judge_line(line))

    @model_validator(mode="after")
    def _promises_need_harmful_keeps(self) -> Self:
        if self.objectives == "two" and (self.router is not None or self.calibration.promise is not None):
            raise ValueError(
                "two objectives leave harmful keeps out, which a promise and a searched gate are made from: "
                'use objectives="three", or leave the promise and the router out.'
            )
        return self


def check_run(config: RunConfig, folder: Path) -> None:
    """raises RunError where the folder belongs to another configuration or is no run folder. Creates nothing."""
    path = folder / "config.json"
    if path.exists():
        there = read_config(folder)
        if there != config:
            raise RunError(
                f"{folder} belongs to another configuration ({difference(there, config)}). "
                "Give another --out folder; nothing was changed."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise RunError(f"{folder} holds files but no config.json, so it is no run folder. Give another --out folder.")


def open_run(config: RunConfig, folder: Path) -> None:
    """Create the folder, or go on in one of this configuration. raises RunError as `check_run` does."""
    check_run(config, folder)
    path = folder / "config.json"
    if path.exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {folder}: {error.strerror}. Give another --out folder.") from error
    write_json(folder / "environment.json", environment())
    write_text(path, config.model_dump_json(indent=1))


def read_config(folder: Path) -> RunConfig:
    path = folder / "config.json"
    if not path.exists():
        raise RunError(f"{folder} is no run folder: config.json is missing. Make one with: paving train --out {folder}")
    try:
        return RunConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        if (path.parent / "circuit.json").exists():
            raise RunError(
                f"{folder} is a circuit's run, not a controller's. For those: paving circuit edit, paving circuit evaluate"
            ) from error
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise RunError(
            f"{path} is no run configuration of this version ({where}: {first['msg']}). Train into a new --out folder."
        ) from error


def difference(a: RunConfig, b: RunConfig) -> str:
    """`training.seed: 0 there, 1 asked`: the settings that differ, at most five of them, long values cut."""
    one, two = _leaves(a.model_dump(mode="json")), _leaves(b.model_dump(mode="json"))
    differing = [name for name in one | two if one.get(name) != two.get(name)]
    told = [f"{name}: {_short(one.get(name))} there, {_short(two.get(name))} asked" for name in differing[:5]]
    if len(differing) > len(told):
        told.append(f"and {len(differing) - len(told)} more")
    return "; ".join(told)


def _leaves(values: dict, prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in values.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def environment() -> dict[str, object]:
    packages = {}
    for name in ("paving", "torch", "transformers", "safetensors", "numpy", "scipy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }


def write_json(path: Path, content: object) -> None:
    write_text(path, json.dumps(content, indent=1, default=str))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
