"""What differs from the paper's protocol is found by comparing fields; the paper's own protocol differs in nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from made_up_runs import BASE, LEARNED, ORACLE, VETOED, changed

from paving.reproduce import load_run, settings
from paving.reproduce.protocol import COMPONENTS, differing, protocol_differences
from paving.reproduce.published import published
from paving.reproduce.variants import leaves
from paving.run_folder import RunConfig

PAPERS = RunConfig(
    model="google/gemma-3-4b-it",
    edit="OpenSafetyLab/Salad-Data",
    benign="tatsu-lab/alpaca",
    harmful="walledai/HarmBench",
    controller={"edit_layers": tuple(range(5, 34))},
)
AT_8 = tuple(replace(plan, scale=None if plan is BASE else 8.0) for plan in (BASE, LEARNED, VETOED, ORACLE))


@pytest.fixture
def told(make_run):
    """Differences from table 1's protocol of a run of this configuration."""

    def differences(config: RunConfig, table: str = "1", n_seeds: int = 1, **how) -> list[str]:
        how = {"rows": AT_8, "judge": "api:gpt-5.4-mini", **how}
        runs = [load_run(make_run(f"run{seed}", config, seed=seed, **how)) for seed in range(n_seeds)]
        (setting,) = settings(runs)
        return protocol_differences(setting, published(table))

    return differences


def counted(parts: list[str]) -> list[str]:
    """Without the sizes: the made-up runs are small."""
    return [p for p in parts if "prompts (" not in p or "from" in p]


def test_the_papers_protocol_differs_in_nothing(told):
    assert counted(told(PAPERS)) == []


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"model": "Qwen/Qwen2.5-7B-Instruct"}, "backbone Qwen2.5-7B-Instruct (Gemma-3-4B-IT)"),
        ({"model": "/models/organism"}, "backbone organism (Gemma-3-4B-IT)"),
        ({"edit": "/data/mine.jsonl?label=safe"}, "edit prompts from mine.jsonl?label=safe (SALAD-Bench)"),
        ({"harmful": "starter"}, "harmful prompts from starter (HarmBench)"),
        ({"controller__route_layers": [2, 3]}, "route layers 2-3 (1-4)"),
        ({"controller__edit_layers": list(range(16, 34))}, "edited blocks 16-33 (5-33)"),
        ({"training__horizon": 40}, "horizon 40 (12)"),
        ({"training__weights__harmful_preservation": 3.0}, "harmful preservation 3 (1.5)"),
        ({"training__targets": "own"}, "targets own (reframe)"),
        ({"targets_from": "/models/stock"}, "targets from stock (none)"),
        ({"decoding__max_new_tokens": 32}, "new tokens 32 (64)"),
        ({"decoding__do_sample": True}, "sampling yes (no)"),
        ({"calibration__use_veto": False}, "veto no (yes)"),
    ],
)
def test_a_changed_field_is_told_with_the_papers_value(told, change, expected):
    assert expected in told(changed(PAPERS, **change))


def test_every_setting_of_table_5_is_compared(told):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: 2 * v, str: lambda v: "own"}
    for i, field in enumerate(f for fields in COMPONENTS.values() for f in fields):
        value = field.value
        if isinstance(value, list) or value is None:
            continue
        if field.leaf in ("controller.n_experts",):  # its windows change with it
            continue
        config = changed(PAPERS, **{field.leaf.replace(".", "__"): other[type(value)](value)})
        assert leaves(config)[field.leaf] != value
        assert [p for p in told(config, judge=f"gpt-5.4-mini {i}") if p.startswith(f"{field.words} ")], field.leaf


def test_judge_scale_policy_sizes_and_seeds_are_compared(told):
    assert "judge rules-1 (gpt-5.4-mini)" in told(PAPERS, judge="rules-1")
    assert "judge gpt-5.4-mini-tuned (gpt-5.4-mini)" in told(PAPERS, judge="gpt-5.4-mini-tuned")
    assert "scale 2 (8)" in told(PAPERS, rows=(BASE, LEARNED, VETOED, ORACLE))
    soft = tuple(replace(plan, policy="soft") if plan.name == "learned+veto" else plan for plan in AT_8)
    assert "gate policy soft (thresholded-soft)" in told(PAPERS, rows=soft)
    assert {"120/60/90 training prompts (1000/1000/192)", "40/20/30 held-out prompts (500/500/98)"} <= set(told(PAPERS))
    assert "3 seeds (1)" in told(PAPERS, n_seeds=3)
    assert not [p for p in told(PAPERS, table="16", n_seeds=3) if "seed" in p]


def test_a_table_with_scales_of_its_own_is_compared_with_those(told):
    assert "scale 8 (1, 4)" in told(PAPERS, table="17")


def test_a_same_source_table_asks_for_one_source(told):
    own = changed(PAPERS, edit="walledai/XSTest?label=safe", harmful="walledai/XSTest?label=unsafe")
    assert [p for p in told(own, table="17") if "prompts from" in p] == [
        "benign prompts from tatsu-lab/alpaca (the source of the edit prompts)"
    ]
    assert "edit prompts from OpenSafetyLab/Salad-Data (XSTest)" in told(PAPERS, table="17")


def test_the_sentence_names_the_run_and_says_which_side_is_which(make_run):
    config = changed(PAPERS, model="/secret/organism", edit="/secret/mine.jsonl")
    (setting,) = settings([load_run(make_run("mine", config))])
    told = differing(setting, published("1"))
    assert told.startswith("mine: not the paper's protocol. Here (in the paper): backbone organism (Gemma-3-4B-IT); ")
    assert "secret" not in told
