"""`paving utility RUN` on a circuit run: what the edited weights cost on ordinary benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paving.backbone import Backbone
from paving.circuit.delta_files import load_delta, weights_sha256
from paving.circuit_run.config import CircuitConfig
from paving.circuit_run.evaluate import EDIT, report
from paving.circuit_run.fitting import Deferred, Fitting, recipe_key
from paving.circuit_run.folder import load_circuit, read_circuit_config
from paving.circuit_run.inputs import run_pairs
from paving.circuit_run.rows import Comparator, comparator
from paving.circuit_run.stages import read_strengths
from paving.evaluation.utility import Settings, Utility
from paving.run import Means
from paving.run_folder import RunError
from paving.training.strength import choose_strength
from paving.utility import Row, base_and_edited


def utility(
    folder: Path,
    tasks: Sequence[str],
    means: Means,
    *,
    against: Sequence[str] = (),
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    include: Sequence[Path] = (),
    force: bool = False,
) -> Utility:
    """Ask every task of the base and of the base with the run's delta at its α; arguments as `paving.utility.utility`.

    against  comparators that `evaluate` has measured, each at the strength that the limit chose for it, if it chose any
    raises RunError for a run without a delta, a missing harness, or answers that were asked otherwise
    """
    config = read_circuit_config(folder)
    strengths = {name: strength_of(folder, comparator(name), config) for name in dict.fromkeys(against)}
    if not (folder / "delta").exists():
        raise RunError(f"{folder} has no finished delta. Train it first: paving circuit edit {folder}")
    delta = load_delta(folder / "delta")

    def edited(backbone: Backbone) -> list[Row]:
        load_circuit(folder, backbone.fingerprint)  # the files behind a model's name may have changed since
        if delta.description.base.fingerprint != backbone.fingerprint:
            raise RunError(f"{folder / 'delta'} was not made on {config.model} as it is now. Put back the run's own delta.")
        rows = [Row(EDIT, delta.edit(), f"{weights_sha256(delta)}/{delta.alpha}")]
        train = run_pairs(config, folder)[0] if strengths else ()
        for name, strength in strengths.items():
            if strength is None:
                means.say(f"{name} has no strength within the limit, and no row")
                continue
            fitting = Fitting(comparator(name), backbone, config, train, folder, means)
            rows.append(Row(name, Deferred(name, strength, fitting), recipe_key(config, name, strength)))
        return rows

    settings = Settings(limit=limit, fewshot=fewshot, chat=chat, seed=config.seed, batch_size=batch_size)
    found = base_and_edited(
        folder, tasks, means, edited, model=config.model, dtype=config.dtype, settings=settings, include=include, force=force
    )
    if (folder / "metrics.json").exists():
        report(folder)
    return found


def strength_of(folder: Path, other: Comparator, config: CircuitConfig) -> float | None:
    """The strength that the limit chooses for a comparator; None where it allows none. raises RunError for one that was
    not evaluated"""
    path = folder / "comparators" / f"{other.name}.json"
    if not path.exists():
        raise RunError(
            f"{other.name} was not measured in {folder}. First: paving circuit evaluate {folder} --against {other.name}"
        )
    best = choose_strength(read_strengths(path)[1], config.strength.limit)
    return best and best.strength
