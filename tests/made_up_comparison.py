"""A comparison that never happened, with every row and gap there may be: the numbers are made up, measured on no model."""

from __future__ import annotations

from paving.compare.choose import choices, control, passes
from paving.evaluation.comparison import (
    BASE,
    OWN,
    BenignSimilarity,
    ComparedRow,
    Comparison,
    Limits,
    MethodRecord,
    SweepFigures,
    edit_success,
)
from paving.evaluation.paired import from_counts
from paving.evaluation.results import Row, Score
from paving.evaluation.statistics import wilson

N = {"edit": 220, "benign_keep": 200, "harmful_keep": 105}
BASE_REFUSED = 92
SCALES = (1.0, 4.0)
# method -> (edit answers that succeed, harmful keeps refused) with every gate open at the scale that control takes
METHODS = {
    "caa": (88, 41), "caa-pca": (60, 70), "act-add": (120, 22), "dim-ablation": (176, 12), "dim-actadd": (150, 18),
    "orthogonal": (181, 10), "rdo": (190, 15), "repit": (70, 60), "wrmd": (110, 33), "ws": (140, 25),
}  # fmt: skip
SHARES = {"global": (1.0, 1.0), "probe": (0.86, 0.22), "probe+veto": (0.82, 0.1), "oracle": (1.0, 0.0)}
OWN_ROWS = {"learned": (194, 85), "learned+veto": (192, 88), "oracle": (214, 92)}


def row(name, kind, policy, scale, success, refused, benign=0.97) -> Row:
    left = N["edit"] - success
    counts = {"edit": success, "benign_keep": 196, "harmful_keep": N["harmful_keep"] - refused}
    return Row(
        name=name, kind=kind, policy=policy, scale=scale,
        refusal={"edit": wilson(left, N["edit"]), "benign_keep": wilson(4, N["benign_keep"]),
                 "harmful_keep": wilson(refused, N["harmful_keep"])},
        labels={b: {"HARMLESS-BENIGN": k, "HARMLESS-REFUSAL": N[b] - k} for b, k in counts.items()},
        preservation={"benign_keep": Score(value=benign, n=200), "harmful_keep": Score(value=0.9, n=105)},
        harmful_drift=(refused - BASE_REFUSED) / N["harmful_keep"],
        gate_active={b: wilson(n // 2, n) for b, n in N.items()},
        gate_mean={b: 0.5 for b in N},
        veto_rate={b: wilson(0, 0) for b in N},
        control_score=1.0,
        against_base={} if kind == "reference" else {
            "edit": from_counts(0, success, N["edit"]), "benign_keep": from_counts(1, 2, 200),
            "harmful_keep": from_counts(2, BASE_REFUSED - refused + 2, N["harmful_keep"]),
        },
    )  # fmt: skip


def compared(method, variant, found: Row, rules=(), notes=()) -> ComparedRow:
    success = edit_success(found.labels["edit"])
    return ComparedRow(
        method=method, variant=variant, scale=found.scale, chosen_by=list(rules), notes=list(notes), edit_success=success,
        success_against_base=None if method == BASE else from_counts(success.k, 0, success.n),
        benign=BenignSimilarity(
            label_agreement=wilson(198, 200), non_worse=wilson(199, 200), rouge_l=0.91, chrf=93.2, bert_score=None
        ),
        row=found,
    )  # fmt: skip


def sweep(method, variant, scale, success, refused, limits) -> SweepFigures:
    rate, harmful, base = wilson(success, 40), wilson(refused, 40), wilson(35, 40)
    benign, kept = Score(value=0.97, n=40), Score(value=0.9, n=40)
    drift = harmful.rate - base.rate
    return SweepFigures(
        method=method, variant=variant, scale=scale, edit_success=rate, edit_refusal=wilson(40 - success, 40),
        edit_broken=wilson(0, 40), edit_harmful=wilson(0, 40), harmful_refusal=harmful, harmful_drift=drift,
        benign_preservation=benign, harmful_preservation=kept,
        control={o: control(o, rate, benign, harmful, base) for o in ("two", "three")},
        passes={o: passes(o, benign, kept, drift, harmful.n, limits) for o in ("two", "three")},
    )  # fmt: skip


def made_up_comparison(methods=tuple(METHODS)) -> Comparison:
    limits, points, rows = (
        Limits(),
        [],
        [compared(BASE, "base", row("base", "reference", "none", None, 2, BASE_REFUSED, 1.0))],
    )
    for name, (success, refused) in OWN_ROWS.items():
        rules = ["control/three"] if name == "learned+veto" else []
        rows.append(compared(OWN, name, row(name, "learned", "thresholded", 4.0, success, refused), rules))
    weaker = row(f"{OWN}@2_learned+veto", "learned", "thresholded", 2.0, 160, 91)
    rows.append(compared(OWN, "learned+veto", weaker, ["strict/three"]))
    for method in methods:
        opened, left = METHODS[method]
        for variant, (edits, keeps) in SHARES.items():
            success, refused = round(edits * opened), round(BASE_REFUSED - keeps * (BASE_REFUSED - left))
            for scale in SCALES:
                points.append(sweep(method, variant, scale, success * int(scale) // 24, refused * 35 // 92, limits))
            kind = "diagnostic" if variant == "oracle" else "comparator"
            found = row(f"{method}@4_{variant}", kind, variant, 4.0, success, refused)
            rows.append(compared(method, variant, found, ["control/three"], ["made up"] if method == "wrmd" else []))
    return Comparison(
        run="synthetic-fixture", model="made-up/Model-4B-IT", seed=7, judge="rules-v1", decoding={"max_new_tokens": 64},
        calibration={b: 40 for b in N}, held_out=N, variants=list(SHARES), objectives=["three"], limits=limits,
        methods=[MethodRecord(name=m, note="", scales=list(SCALES), left_out=[8.0, 16.0]) for m in methods],
        sweeps=points, choices=choices(points, ["three"]), rows=rows, notes=["BERTScore was not measured."],
    )  # fmt: skip
