"""What the circuit benchmark makes of its runs: pooled rates, intervals, curves, and what has no figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest


def circuit_run(circuits, category, seed, refused, curve, *, n=20):
    """A run with the rows base and c-delta-theta; refused: (category, benign) counts of the latter, of n each."""
    sets = {category: "category", "benign": "benign", "other one": "other", "other two": "other"}

    def row(name, counts):
        rates = {s: circuits.wilson(k, n) for s, k in zip(sets, (*(counts or (0, 0)), 1, 3), strict=True)}
        kept = {s: SimpleNamespace(side=side, refused=rates[s]) for s, side in sets.items()}
        return SimpleNamespace(name=name, sets=kept)

    points = [
        SimpleNamespace(
            strength=i / 2, benign_refused=circuits.wilson(b, 100), category_refused=circuits.wilson(c, 100)
        )
        for i, (b, c) in enumerate(curve)
    ]  # fmt: skip
    metrics = SimpleNamespace(rows=[row("base", (0, 0)), row(circuits.EDIT, refused)], touched=0.03)
    return circuits.Run(category, seed, "selective", refused and metrics, {circuits.EDIT: points})


def test_a_circuit_summary_pools_seeds_and_keeps_one_seeds_interval(script):
    circuits = script("circuits")
    curve = [(0, 10), (2, 40), (6, 80)]
    runs = [circuit_run(circuits, c, seed, (k, 1), curve) for c, k in (("a", 10), ("b", 14)) for seed in (0, 1, 2)]
    row = circuits.summarise(runs)["c-delta-theta, selective"]
    one = row["sides"]["category"]["a"]
    assert (one["rate"], one["n"], one["answers"]) == (0.5, 20, 60)
    assert one["low"] == circuits.wilson(10, 20).low  # not that of 60 prompts
    assert (
        row["mean"]["category"]["rate"] == pytest.approx(0.6)
        and row["mean"]["category"]["n"] == 40
        and row["mean"]["benign"]["n"] == 20
    )
    assert row["sides"]["other"]["a"]["n"] == 40 and row["sides"]["other"]["a"]["rate"] == 0.1
    assert row["at_limit"]["rate"] == pytest.approx(0.4 + 0.4 * (circuits.LIMIT - 0.02) / 0.04)
    assert row["at_limit"]["runs"] == 6 and list(row["at_limit"]["by_seed"]) == [0, 1, 2]
    assert row["by_seed"][2] == pytest.approx({"category": 0.6, "benign": 0.05})
    assert row["curve"][1] == pytest.approx({"strength": 0.5, "benign": 0.02, "category": 0.4})


def test_a_circuit_run_without_a_strength_has_a_curve_and_no_row(script, tmp_path):
    circuits = script("circuits")
    runs = [
        circuit_run(circuits, "a", 0, (10, 1), [(0, 0), (2, 30)]),
        circuit_run(circuits, "b", 0, None, [(0, 0), (50, 50)]),
    ]
    summary = circuits.summarise(runs)
    row = summary["c-delta-theta, selective"]
    assert row["runs"] == 2 and row["without_strength"] == 1 and list(row["sides"]["category"]) == ["a"]
    assert row["curve"][1]["category"] == pytest.approx(0.4)
    text = circuits.markdown(summary)
    assert "c-delta-theta, selective | 2 (1 without α) | 50.0 [" in text and "| base | 1 | 0.0 [" in text
    circuits.draw_frontier(summary, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(0, 2), (2, 50), (3, 70), (0, 0)], 0.7),  # a row that comes to nothing again: its best, and not its end
        ([(0, 2), (2, 50), (10, 90), (2, 10)], 0.61),  # over the limit and back: where it crosses going up
        ([(0, 2), (10, 10), (3, 80)], 0.8),  # ... and coming back
        ([(9, 2), (20, 50)], None),  # the base itself is over it
    ],
)
def test_a_curve_is_worth_the_most_it_refuses_within_the_limit(script, curve, expected):
    circuits = script("circuits")
    points = circuit_run(circuits, "a", 0, None, curve).curves[circuits.EDIT]
    found = circuits.reached(points, 0.042)
    assert found == (expected if expected is None else pytest.approx(expected))


def test_a_seed_without_all_categories_has_no_mean_of_its_own(script):
    circuits = script("circuits")
    runs = [circuit_run(circuits, c, seed, (10, 1), [(0, 0)]) for c, seed in (("a", 0), ("b", 0), ("a", 1))]
    row = circuits.summarise(runs)["c-delta-theta, selective"]
    assert list(row["by_seed"]) == [0] and row["runs"] == 3


def test_a_kept_run_is_not_measured_again_wherever_its_data_lie_and_never_under_other_settings(script, tmp_path):
    circuits = script("circuits")
    asked = SimpleNamespace(
        data=tmp_path / "here", held_out=5, others=5, calibration=30, tokens=4, published_pairs=60, also_benign=None
    )
    config = circuits.configuration(asked, "legal_opinion", 1, "selective")
    rate = circuits.Rate(k=1, n=4, rate=0.25, low=0.0, high=0.7)
    point = circuits.FrontierPoint(
        strength=0.5, category_refused=rate, benign_refused=rate, benign_broken=rate, chosen=False
    )
    path = tmp_path / "legal_opinion-seed1-selective.json"
    assert not circuits.finished(path, config, ())
    kept = circuits.Kept(config=circuits.portable(config), metrics=None, curve=[point])
    path.write_text(kept.model_dump_json(), encoding="utf-8")
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    asked.data = tmp_path / "elsewhere"
    assert circuits.finished(path, circuits.configuration(asked, "legal_opinion", 1, "selective"), ("inverse",))
    (run,) = circuits.measured(tmp_path, ["legal_opinion", "hate_speech"], [0, 1])
    assert run.metrics is None and run.curves == {circuits.EDIT: [point]}
    asked.calibration = 31
    with pytest.raises(SystemExit, match="measured with other settings"):
        circuits.finished(path, circuits.configuration(asked, "legal_opinion", 1, "selective"), ())
