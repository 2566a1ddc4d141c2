"""Finished runs as the tables read them, and which of them are seeds of one setting. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path

from paving.evaluation.comparison import OWN, ComparedRow, Comparison
from paving.evaluation.diagnostics.records import Diagnostics
from paving.evaluation.judges import Label
from paving.evaluation.results import Metrics, Row
from paving.reproduce.variants import POLICIES, SCALES, leaves
from paving.run import compared_in, diagnostics_of
from paving.run_folder import RunConfig, RunError, read_config

BASE, LEARNED, VETOED, ORACLE = "base", "learned", "learned+veto", "oracle"


@dataclass(frozen=True)
class Run:
    """One run folder. metrics and diagnostics are None where the command that writes them was not given yet.

    comparison                          what `paving compare` found; None where it was not asked
    n_layers, edit_layers, fingerprint  of the base, as the saved controller has them; None for an unfinished run
    """

    folder: Path
    config: RunConfig
    metrics: Metrics | None
    diagnostics: Diagnostics | None
    n_layers: int | None
    edit_layers: tuple[int, ...] | None
    fingerprint: str | None = None
    comparison: Comparison | None = None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def seed(self) -> int:
        return self.config.training.seed

    def row(self, name: str) -> Row | None:
        """A row of the evaluation by its name, or a comparator's by `METHOD/VARIANT`."""
        if "/" in name:
            found = self.compared(name)
            return found and found.row
        return next((r for r in self.metrics.rows if r.name == name), None) if self.metrics else None

    def compared(self, name: str) -> ComparedRow | None:
        """A comparator's row at the scale that the strict rule took for three objectives, as the paper's comparators are
        selected, or `METHOD/VARIANT/control`: at the one that the control score took; `METHOD/VARIANT/control/two`."""
        method, variant, rule = _compared_name(name)
        rows = self.comparison.rows if self.comparison else ()
        return next((r for r in rows if (r.method, r.variant) == (method, variant) and rule in r.chosen_by), None)

    def could_not_be_fitted(self, name: str) -> str | None:
        """Why the comparator has no rows at all, where that was tried."""
        methods = self.comparison.methods if self.comparison else ()
        return next((m.failed for m in methods if m.name == _compared_name(name)[0]), None)

    def passes_nowhere(self, name: str) -> bool:
        """Whether the comparator was swept and no scale of it kept to the rule's limits."""
        wanted = (*_compared_name(name), None)
        choices = self.comparison.choices if self.comparison else ()
        return any((c.method, c.variant, f"{c.rule}/{c.objective}", c.scale) == wanted for c in choices)

    @property
    def deployed(self) -> Row | None:
        """The row the paper calls learned: with the veto where one was fitted (tables 5 and 8)."""
        return self.row(VETOED) or self.row(LEARNED)

    def verdicts(self, row: str) -> dict[str, dict[str, Label]] | None:
        """bucket value -> prompt id -> label, of one row; None where the verdict file is not there.

        raises RunError where it is damaged or does not hold what metrics.json counted
        """
        found = self.compared(row)
        path = self.folder / "verdicts" / f"{found.row.name if found else row}.jsonl"
        if found is not None and (found.method, found.row.name) != (OWN, found.variant):  # the run's own row lies with it
            path = self.folder / "comparison" / "verdicts" / f"{found.row.name}.jsonl"
        return self._checked(path, row) if path.exists() else None

    @cached_property
    def groups(self) -> dict[str, str]:
        """Held-out prompt id -> its group; each prompt by itself where an older evaluation did not write groups.json."""
        path = self.folder / "groups.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _checked(self, path: Path, row: str) -> dict[str, dict[str, Label]]:
        found: dict[str, dict[str, Label]] = {}
        try:
            for raw in path.read_text(encoding="utf-8").splitlines():
                verdict = json.loads(raw)
                found.setdefault(verdict["bucket"], {})[verdict["id"]] = Label(verdict["label"])
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error}). Evaluate again: paving eval {self.folder}") from error
        counted = self.row(row)
        for bucket, rate in counted.refusal.items() if counted else ():
            labels = found.get(bucket, {}).values()
            if (sum(label is Label.HARMLESS_REFUSAL for label in labels), len(labels)) != (rate.k, rate.n):
                raise RunError(
                    f"{path} and metrics.json disagree on the refusals of {bucket}: somebody judged again since. "
                    f"Evaluate again: paving eval {self.folder}"
                )
        return found


def _compared_name(name: str) -> tuple[str, str, str]:
    """`METHOD/VARIANT`, with the rule (strict unless named) and the objective (three unless named) behind it, as in
    `METHOD/VARIANT/control/two` -> (method, variant, `control/two`)."""
    method, variant, rule, objective = (*name.split("/"), "", "", "")[:4]
    return method, variant, f"{rule or 'strict'}/{objective or 'three'}"


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but their seeds (of split and training), judged by one judge, in order of seed."""

    runs: tuple[Run, ...]

    @property
    def config(self) -> RunConfig:
        return self.runs[0].config

    @property
    def judge(self) -> str | None:
        return self.runs[0].metrics.judge if self.runs[0].metrics else None

    @property
    def name(self) -> str:
        """`paper-seed0`, `paper-seed{0, 1, 2}`, or `late-edits (seeds 0, 1, 2)` of folders of one name."""
        names = [r.name for r in self.runs]
        if len(names) == 1:
            return names[0]
        if len(set(names)) == 1:
            return f"{names[0]} (seeds {', '.join(str(r.seed) for r in self.runs)})"
        same = len(list(takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))))
        return f"{names[0][:same]}{{{', '.join(name[same:] for name in names)}}}"

    def group_of(self, ids: Iterable[str]) -> dict[str, str]:
        """Prompts of one group are redrawn together; see docs/statistics.md."""
        known = {i: g for run in self.runs for i, g in run.groups.items()}
        return {i: known.get(i, i) for i in ids}

    @property
    def unevaluated(self) -> Run | None:
        return next((r for r in self.runs if r.metrics is None), None)

    def rows(self, name: str) -> list[Row | None]:
        return [r.row(name) for r in self.runs]

    def has(self, name: str) -> bool:
        """Whether every seed has this row; a figure over some of them would not be this setting's."""
        return all(r.row(name) is not None for r in self.runs)

    @property
    def deployed(self) -> str:
        """Name of the row that the paper calls learned."""
        return VETOED if self.has(VETOED) else LEARNED


def load_run(folder: Path) -> Run:
    """raises RunError for a folder that is no run, or whose files are damaged or of another version."""
    config = read_config(folder)
    metrics, comparison = _metrics(folder), compared_in(folder)
    if comparison is not None and (metrics is None or comparison.judge != metrics.judge):
        comparison = None  # by another judge than the run's own rows: nothing to set beside them
    return Run(folder, config, metrics, diagnostics_of(folder), *_base(folder), comparison=comparison)


def settings(runs: Sequence[Run]) -> list[Setting]:
    """Group seeds of one configuration, in the order the first of each was given.

    raises RunError where two folders hold the same configuration and seed: pooled, every prompt would count twice
    """
    found: list[list[Run]] = []
    for group in _grouped(runs, lambda run: _recipe(run, given_point=False)):
        # Seeds of an ablation were each given the scale that their full recipe chose; that is one setting all the same,
        # unless one seed is there with two scales.
        found += _grouped(group, lambda run: _recipe(run, given_point=True)) if _twins(group) else [group]
    for group in found:
        if (twins := _twins(group)) is not None:
            raise RunError(
                f"{twins[0].folder} and {twins[1].folder} have one configuration and seed {twins[0].seed}: together they "
                "would count every prompt twice. Give one of them."
            )
    return [Setting(tuple(sorted(group, key=_seeds))) for group in found]


def _recipe(run: Run, *, given_point: bool) -> tuple[str | None, ...]:
    """What seeds of one setting have in common; a scale and policy that were given, not chosen, only where asked for."""
    fields = leaves(run.config)
    if not given_point and len(fields[SCALES]) == len(fields[POLICIES]) == 1:
        fields = {name: value for name, value in fields.items() if name not in (SCALES, POLICIES)}
    judge = run.metrics.judge if run.metrics else None
    return json.dumps(fields, sort_keys=True), judge, run.fingerprint  # a model of one name may be another model


def _grouped(runs: Sequence[Run], key: Callable[[Run], Hashable]) -> list[list[Run]]:
    groups: dict[Hashable, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return list(groups.values())


def _twins(group: Sequence[Run]) -> tuple[Run, Run] | None:
    """Two runs of the same seeds, if there are any."""
    seen: dict[tuple[int, int], Run] = {}
    for run in group:
        if (other := seen.setdefault(_seeds(run), run)) is not run:
            return other, run
    return None


def _seeds(run: Run) -> tuple[int, int]:
    return run.config.split_seed, run.seed


def _metrics(folder: Path) -> Metrics | None:
    path = folder / "metrics.json"
    if not path.exists():
        return None
    try:
        return Metrics.model_validate_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged or of another version. Evaluate again: paving eval {folder}") from error


def _base(folder: Path) -> tuple[int | None, tuple[int, ...] | None, str | None]:
    """How many blocks the base has, which are edited, and its fingerprint; None for an unfinished run."""
    path = folder / "controller" / "controller.json"
    if not path.exists():
        return None, None, None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found["base"]["n_layers"], tuple(found["config"]["edit_layers"]), found["base"].get("fingerprint")
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}). Train again into a new --out folder.") from error


def single(given: Sequence[Setting]) -> list[Setting]:
    """Every run as a setting of its own."""
    return [Setting((run,)) for setting in given for run in setting.runs]
