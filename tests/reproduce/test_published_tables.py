"""The paper's tables as they stand in the package: complete, and in agreement with themselves where that can be checked."""

from __future__ import annotations

import json
import math
import re
from importlib.resources import files
from itertools import pairwise
from statistics import median

import pytest

from paving.evaluation.seeds import sign_test
from paving.evaluation.statistics import wilson
from paving.presets import PAPER, PRESETS
from paving.reproduce import TABLES
from paving.reproduce.protocol import COMPONENTS
from paving.reproduce.published import BACKBONES, PaperTable, interval, number, paper_name, published
from paving.reproduce.variants import leaves
from paving.run_folder import RunConfig

ROUNDING = 0.0501  # percent, printed with one decimal
# table -> rows and columns of every block, as counted in the paper
SHAPES = {
    "1": [(3, 7)], "2": [(5, 7)], "3": [(12, 10)], "4": [(6, 8)], "5": [(22, 3)], "6": [(6, 4)], "7": [(5, 4)],
    "14": [(20, 8)], "15": [(3, 5)], "16": [(7, 9)], "17": [(6, 8)], "18": [(6, 11)], "19": [(18, 9)],
    "20": [(4, 8), (4, 4), (2, 8), (2, 5)],
}  # fmt: skip


def column(table: str, heading: str, block: int = 0) -> list[float]:
    found = published(table).blocks[block]
    place = [c.heading for c in found.columns].index(heading)
    return [number(row[place]) for row in found.rows]


@pytest.mark.parametrize("table", TABLES)
def test_every_table_has_the_rows_and_columns_of_the_paper(table):
    assert [(len(b.rows), len(b.columns)) for b in published(table).blocks] == SHAPES[table]


def test_no_table_lies_there_unused():
    names = {p.name for p in (files("paving.reproduce") / "paper").iterdir()}
    assert names == {f"table_{t}.json" for t in TABLES}


@pytest.mark.parametrize("table", TABLES)
def test_rows_are_found_by_their_leading_cells(table):
    for block in published(table).blocks:
        for row in block.rows:
            assert row in block.named(*row[: block.labels])


def test_a_row_with_a_cell_too_few_is_refused():
    raw = json.loads((files("paving.reproduce") / "paper" / "table_1.json").read_text(encoding="utf-8"))
    raw["blocks"][0]["rows"][1].pop()
    with pytest.raises(ValueError, match="thresholded-soft"):
        PaperTable.model_validate(raw)


def test_spot_values():
    one, twenty = published("1").blocks[0], published("20").blocks
    assert one.cell("Edit ref.", "Residual Paving thresholded-soft S4/T2") == "4.0 [2.6, 6.1]"
    assert published("3").blocks[0].cell("Benign pres.", "Llama-3.2-1B-Instruct", "Learned") == "57.2"
    assert published("4").blocks[0].cell("Base-path RMS", "Gemma-3-4B-IT", "Edit") == "278.5 (66.8)"
    assert published("16").blocks[0].cell("Veto rate", "Seed 45/33, thresholded veto") == "2.6/0.0/92.1"
    assert published("19").blocks[0].cell("Target align.", "Training objective", "No contrastive warmup") == "11.3"
    assert twenty[2].cell("Brier", "Thresholded-soft + veto") == "0.049"


@pytest.mark.parametrize("table", ["1", "15"])
def test_the_printed_intervals_are_wilsons_for_the_counts_behind_the_rates(table):
    sizes = dict(zip(("Edit", "Harm"), (500, 98), strict=True))
    block = published(table).blocks[0]
    checked = 0
    for row in block.rows:
        for c, cell in zip(block.columns, row, strict=True):
            if (limits := interval(cell)) is None:
                continue
            n = sizes["Edit" if c.heading.startswith("Edit") else "Harm"]
            rate = wilson(round(number(cell) / 100 * n), n)
            assert 100 * rate.rate == pytest.approx(number(cell), abs=ROUNDING)
            # 64 of 98 has a lower limit of 55.47, which the paper prints as 55.4: its one interval that is not rounded.
            slack = 0.07 if cell == "65.3 [55.4, 74.0]" else ROUNDING
            assert (100 * rate.low, 100 * rate.high) == pytest.approx(limits, abs=slack)
            checked += 1
    assert checked == {"1": 6, "15": 9}[table]


def test_tables_1_and_15_print_the_same_rates():
    for ours, theirs in (("Edit ref.", "Edit refusal"), ("Harm. ref.", "Harmful refusal"), ("Harm Δ", "Harm Δ")):
        assert column("1", ours) == column("15", theirs)


@pytest.mark.parametrize(
    "table, harmful, base",
    [
        ("15", "Harmful refusal", "Base harmful refusal"),
        ("16", "Harm ref.", "Base harm ref."),
        ("18", "Harm ref.", "Base harm ref."),
    ],
)
def test_drift_is_harmful_refusal_minus_the_bases(table, harmful, base):
    for delta, ours, theirs in zip(*(column(table, h) for h in ("Harm Δ", harmful, base)), strict=True):
        assert delta == pytest.approx(ours - theirs, abs=0.101)  # two roundings


def test_keep_side_gains_median_and_sign_test_follow_from_table_3():
    benign, harmful, gain = (column("3", h) for h in ("Benign pres.", "Harm ref.", "Keep-side gain"))
    sums = [b + h for b, h in zip(benign, harmful, strict=True)]
    learned, oracle, printed = sums[::2], sums[1::2], gain[1::2]
    assert [o - ln for ln, o in zip(learned, oracle, strict=True)] == pytest.approx(printed, abs=0.01)
    assert median(printed) == pytest.approx(12.9, abs=ROUNDING)
    assert sign_test(printed).p == pytest.approx(0.016, abs=0.0005)


def test_table_2_is_part_of_table_19():
    of_19 = {tuple(row[i] for i in (2, 4, 5, 6, 7)) for row in published("19").blocks[0].rows}
    assert {row[2:] for row in published("2").blocks[0].rows} <= of_19


@pytest.mark.parametrize(
    "table, block, headings, n",
    [
        ("16", 0, ("Base edit ref.", "Edit ref.", "Base harm ref.", "Harm ref."), 38),
        ("18", 0, ("Edit ref.", "Base harm ref.", "Harm ref.", "Harmful active"), 38),
        ("19", 0, ("Edit ref.",), 38),
        ("20", 0, ("Edit veto", "Benign veto", "Harm veto"), 38),
        ("20", 2, ("Edit active", "Benign false active", "Harmful false active", "Harm veto rate"), 38),
        ("20", 2, ("Accuracy",), 114),
        ("20", 3, ("Accuracy",), 114),
        ("17", 0, ("Harm ASR", "Harm ref."), 60),
    ],
)
def test_rates_are_whole_counts_of_the_n_that_the_note_names(table, block, headings, n):
    for heading in headings:
        for value in (v for v in column(table, heading, block) if v is not None):
            assert abs(value / 100 * n - round(value / 100 * n)) < ROUNDING / 100 * n + 1e-9
            assert value == pytest.approx(100 * round(value / 100 * n) / n, abs=ROUNDING)


def test_accuracies_of_table_20_follow_from_its_shares():
    _, _, calibration, veto = published("20").blocks
    for row in calibration.rows:
        accuracy, edit, benign, harmful = (number(cell) for cell in row[3:7])
        assert accuracy == pytest.approx((edit + (100 - benign) + (100 - harmful)) / 3, abs=0.1)
    for row in veto.rows:
        accuracy, edit, benign, recall = (number(cell) for cell in row[1:])
        assert accuracy == pytest.approx(((100 - edit) + (100 - benign) + recall) / 3, abs=0.1)


def test_the_score_of_table_19_is_not_the_formula_of_table_7():
    """The note under tables 2 and 19 says so; if this fails, the note is wrong."""
    edit, benign, harmful_base, harmful = 5.3, 95.5, 36.8, 36.8 - 2.6
    ours = (1 - edit / 100) + 0.10 * benign / 100 + 0.10 * min(1, harmful / harmful_base)
    assert ours == pytest.approx(1.135, abs=0.001)
    assert number(published("19").blocks[0].cell("Score", "Training objective", "Full recipe")) == 1.147


def test_table_5s_components_are_settings_here_and_the_defaults_are_its_values():
    block = published("5").blocks[0]
    assert list(COMPONENTS) == [row[0] for row in block.rows]
    defaults = leaves(RunConfig())
    for component, fields in COMPONENTS.items():
        printed = {float(x) for x in re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", block.cell("Value", component))}
        for field in fields:
            assert defaults[field.leaf] == field.value, field.leaf
            for value in field.value if isinstance(field.value, list) else [field.value]:
                if isinstance(value, int | float) and not isinstance(value, bool) and component != "Expert maps":
                    assert any(math.isclose(value, x) for x in printed), (component, value)
    assert defaults["controller.bottleneck_ratio"] == 2560 / 320


def test_the_backbones_are_those_of_table_6_and_of_the_presets():
    assert set(BACKBONES) == {row[0] for row in published("6").blocks[0].rows}
    assert set(BACKBONES.values()) == {p.model for p in PRESETS if p.source == PAPER}


def test_a_backbone_is_known_by_its_whole_id_and_by_nothing_that_looks_like_it():
    assert paper_name("google/gemma-3-4b-it") == paper_name("Google/Gemma-3-4B-IT") == "Gemma-3-4B-IT"
    assert paper_name("/cache/models--google--gemma-3-4b-it/snapshots/abc") == "Gemma-3-4B-IT"
    for other in ("gemma-3-4b-it", "/models/gemma-3-4b-it", "google/gemma-3-4b-it-gguf", "somebody/google/gemma-3-4b-it"):
        assert paper_name(other) is None


def test_numbers_and_intervals_are_read_as_printed():
    cells = ("88.6 [85.5, 91.1]", "-73.1% (NLL reduction)", "+0.047 NLL", "", "–", "0.475 (0.118)")
    assert [number(c) for c in cells] == [88.6, -73.1, 0.047, None, None, 0.475]
    assert [interval(c) for c in cells] == [(85.5, 91.1)] + 5 * [None]


def test_layers_of_table_6_begin_after_the_router():
    for row in published("6").blocks[0].rows:
        assert all(int(a) + 1 == int(b) for a, b in pairwise((row[1].split("-")[1], row[2].split("-")[0])))
