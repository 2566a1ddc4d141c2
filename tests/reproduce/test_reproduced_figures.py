"""Figures 2 to 4 as files: self-contained, drawn from the run, and refused with the mend where it lacks something."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from made_up_runs import LOGITS, changed
from matplotlib import rc_context

from paving.prompts.types import Bucket
from paving.report.svg import STYLE
from paving.reproduce import FIGURES, draw_figure, figure_name, load_run
from paving.reproduce.figures import draw_movement, draw_operation, draw_policies
from paving.run_folder import RunConfig, RunError

GEMMA = RunConfig(model="google/gemma-3-4b-it")


@pytest.fixture
def run(make_run):
    return load_run(make_run("a", diagnosed=True))


def texts(figure) -> str:
    """Everything written in a figure, once it was laid out."""
    figure.canvas.draw()
    return "\n".join(t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")))


@pytest.mark.parametrize("name", FIGURES)
def test_an_svg_stands_alone_and_is_the_same_every_time(run, name):
    svg = draw_figure(name, [run], "svg")
    assert svg == draw_figure(name, [run], "svg")
    text = svg.decode()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "<text" not in text  # letters are paths: no font of the reader's machine decides how it looks
    fetched = re.findall(r'(?:href|src)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', text)
    assert not fetched and "creativecommons" not in text


@pytest.mark.parametrize("name", FIGURES)
def test_a_png_is_a_png(run, name):
    assert draw_figure(name, [run], "png").startswith(b"\x89PNG")


def test_figure_2_shows_the_runs_own_layers_and_operating_point(run, make_run):
    with rc_context(STYLE):
        shown = texts(draw_operation(run))
        assert "blocks 1-4; last token" in shown and "thresholded, τ = 0.5" in shown and "v(x) ≤ 0.25" in shown
        assert "s = 2" in shown and "expert 2" in shown
        config = changed(run.config, controller__n_experts=1, controller__centres=[0.5], controller__widths=[0.4])
        alone = texts(draw_operation(load_run(make_run("b", config, evaluated=False))))
        assert "expert 1" not in alone and "not evaluated yet" in alone


def test_figure_3_counts_the_prompts_above_the_threshold(run):
    with rc_context(STYLE):
        shown = texts(draw_policies(run))
    for bucket, name in zip(Bucket, ("Edit", "Benign keep", "Harmful keep"), strict=True):
        above = sum(a > 0.5 for a in LOGITS[bucket])
        assert f"{name}: {above} of {len(LOGITS[bucket])} above τ" in shown


def test_figure_4_draws_the_recorded_cosines_and_the_papers_means_on_its_backbone_only(run, make_run):
    gemma = load_run(make_run("g", GEMMA, diagnosed=True))
    with rc_context(STYLE):
        panels = draw_movement([run, gemma]).axes
    values = [[line.get_ydata() for line in ax.lines] for ax in panels]
    assert [len(v) for v in values] == [3, 5]  # two curves and zero; two means more
    assert set(values[0][0]) == {0.5} and set(values[0][1]) == {0.2}
    assert [values[1][i][0] for i in (2, 3)] == [0.475, 0.219]


def test_what_a_figure_lacks_is_named_with_its_mend(make_run):
    bare = load_run(make_run("a", evaluated=False))
    with pytest.raises(RunError, match="Make it: paving eval"):
        draw_figure("figure-3", [bare], "svg")
    with pytest.raises(RunError, match="Make it: paving diagnose"):
        draw_figure("figure-4", [bare], "svg")
    (bare.folder / "controller" / "controller.json").unlink()
    with pytest.raises(RunError, match="Make it: paving train"):
        draw_figure("figure-2", [load_run(bare.folder)], "svg")


def test_a_figure_of_one_run_takes_one(run):
    with pytest.raises(ValueError, match="shows one run, 2 were given"):
        draw_figure("figure-2", [run, run], "svg")
    with pytest.raises(ValueError, match="0 were given"):
        draw_figure("figure-4", [], "svg")
    with pytest.raises(ValueError, match="svg or png"):
        draw_figure("figure-4", [run], "pdf")
    with pytest.raises(ValueError, match="allowed: figure-2"):
        draw_figure("figure-9", [run], "svg")


def test_figures_may_be_called_as_people_call_them():
    assert [figure_name(n) for n in ("figure-2", "Figure 3", "fig. 4", "fig4")] == [
        "figure-2", "figure-3", "figure-4", "figure-4",
    ]  # fmt: skip
    assert figure_name("figure-1") is None and figure_name("2") is None
