"""`paving utility RUN` on a circuit run: what the edited weights cost on ordinary benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paving.backbone import Backbone
from paving.circuit.delta_files import load_delta, weights_sha256
from paving.circuit_run.evaluate import EDIT, report
from paving.circuit_run.folder import load_circuit, read_circuit_config
from paving.evaluation.utility import Settings, Utility
from paving.run import Means
from paving.run_folder import RunError
from paving.utility import Row, base_and_edited


def utility(
    folder: Path,
    tasks: Sequence[str],
    means: Means,
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    chat: bool = True,
    batch_size: int = 16,
    include: Sequence[Path] = (),
    force: bool = False,
) -> Utility:
    """Ask every task of the base and of the base with the run's delta at its α; arguments as `paving.utility.utility`.

    raises RunError for a run without a delta, a missing harness, or answers that were asked otherwise
    """
    config = read_circuit_config(folder)
    if not (folder / "delta").exists():
        raise RunError(f"{folder} has no finished delta. Train it first: paving circuit edit {folder}")
    delta = load_delta(folder / "delta")

    def edited(backbone: Backbone) -> Row:
        load_circuit(folder, backbone.fingerprint)  # the files behind a model's name may have changed since
        if delta.description.base.fingerprint != backbone.fingerprint:
            raise RunError(f"{folder / 'delta'} was not made on {config.model} as it is now. Put back the run's own delta.")
        return Row(EDIT, delta.edit(), f"{weights_sha256(delta)}/{delta.alpha}")

    settings = Settings(limit=limit, fewshot=fewshot, chat=chat, seed=config.seed, batch_size=batch_size)
    found = base_and_edited(
        folder, tasks, means, edited, model=config.model, dtype=config.dtype, settings=settings, include=include, force=force
    )
    if (folder / "metrics.json").exists():
        report(folder)
    return found
