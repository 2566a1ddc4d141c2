"""The paper's tables and figures (Residual Paving, arXiv 2605.20262) made again from run folders. No model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paving.reproduce import ablations, backbones, comparators, hyperparameters, mechanism, routing, three_way
from paving.reproduce.figures import FIGURES, draw_figure, figure_name
from paving.reproduce.render import markdown, terminal
from paving.reproduce.result import Reproduction
from paving.reproduce.runs import Run, Setting, load_run, settings

TABLES = ("1", "2", "3", "4", "5", "6", "7", "14", "15", "16", "17", "18", "19", "20")
WITHOUT_RUNS = ("6", "18")  # what they show does not need any


def reproduce(table: str, folders: Sequence[Path]) -> Reproduction:
    """A table of the paper from these run folders.

    raises ValueError for a table that is not made here, or without a run where one is needed;
    RunError for a folder that is no run, or for two of one configuration and seed
    """
    name = table_name(table)
    found = settings([load_run(folder) for folder in folders])
    if not found and name not in WITHOUT_RUNS:
        raise ValueError(f"table {name} is made from runs: give run folders, as in paving reproduce {name} --runs RUN.")
    match name:
        case "1":
            return three_way.table_1(found)
        case "2":
            return ablations.table_2(found)
        case "3":
            return backbones.table_3(found)
        case "4":
            return mechanism.table_4(found)
        case "5":
            return hyperparameters.table_5(found)
        case "6":
            return backbones.table_6(found)
        case "7":
            return hyperparameters.table_7(found)
        case "14":
            return ablations.table_14(found)
        case "15":
            return three_way.table_15(found)
        case "16":
            return three_way.table_16(found)
        case "17":
            return three_way.table_17(found)
        case "18":
            return comparators.table_18(found)
        case "19":
            return ablations.table_19(found)
    return routing.table_20(found)


def table_name(asked: str) -> str:
    """`Table 2/19`, `tab.19` or `19` -> "19". raises ValueError naming what is made here."""
    name = asked.lower().removeprefix("table").removeprefix("tab").strip(" -_.")
    name = "19" if name == "2/19" else name
    if name not in TABLES:
        raise ValueError(f"there is no table {asked!r} here; allowed: {', '.join(TABLES)}, {', '.join(FIGURES)}.")
    return name


__all__ = [
    "FIGURES",
    "TABLES",
    "Reproduction",
    "Run",
    "Setting",
    "draw_figure",
    "figure_name",
    "load_run",
    "markdown",
    "reproduce",
    "settings",
    "table_name",
    "terminal",
]
