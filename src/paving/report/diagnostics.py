"""What the page says and draws of `paving diagnose`: sentences, figures and tables of the parts that were measured."""

from __future__ import annotations

from markupsafe import Markup

from paving.evaluation.diagnostics.records import CellBlock, Diagnostics, Spread, Usefulness
from paving.prompts.types import Bucket
from paving.report import diagnostic_figures as figures
from paving.report import diagnostic_tables, tables


def diagnostics_section(found: Diagnostics) -> dict[str, object]:
    """Part -> its sentence, figure and table; None for a part that was not measured, which the page then leaves out."""
    return {
        "corruption": found.corruption
        and {"says": found.corruption.conclusion, "figure": Markup(figures.corrupted_router(found.corruption))},
        "trajectory": found.trajectory
        and {
            "says": trajectory_sentence(found),
            "figure": Markup(figures.trajectory(found.trajectory)),
            "table": diagnostic_tables.base_path(found.trajectory),
        },
        "probes": found.probes and {"figure": Markup(figures.separability(found.probes))},
        "norms": found.norms and {"figure": Markup(figures.norms(found.norms))},
        "route": found.route
        and {
            "figure": Markup(figures.veto(found.route)) if found.route.curve else None,
            "routes": diagnostic_tables.routes(found.route),
            "vetoes": diagnostic_tables.vetoes(found.route),
        },
        "experts": found.experts
        and {
            "says": experts_sentence(found.experts),
            "table": diagnostic_tables.cells(found.experts, mixtures_only=True),
            "prompts": diagnostic_tables.prompts_of(found.experts),
        },
        "grid": found.grid
        and {
            "figure": Markup(figures.grid(found.grid)),
            "table": diagnostic_tables.cells(found.grid),
            "prompts": diagnostic_tables.prompts_of(found.grid),
        },
        "usefulness": found.usefulness
        and {
            "says": usefulness_sentence(found.usefulness),
            "table": diagnostic_tables.usefulness(found.usefulness),
            "notes": found.usefulness.notes,
        },
        "late": tables.late_refusals(found) if found.late is not None else None,
        "skipped": found.skipped,
    }


def diagnosis_lines(found: Diagnostics) -> list[str]:
    """The diagnosis in a few sentences, for a terminal: one a part that has one, then what was skipped."""
    lines = []
    if found.corruption is not None:
        lines.append(found.corruption.conclusion)
    if found.trajectory is not None:
        lines.append(trajectory_sentence(found))
    if found.experts is not None:
        lines.append(experts_sentence(found.experts))
    if found.usefulness is not None:
        lines.append(usefulness_sentence(found.usefulness))
    lines += [f"not measured: {part} ({why})" for part, why in found.skipped.items()]
    return lines


def trajectory_sentence(found: Diagnostics) -> str:
    """Table 4 of the paper in one sentence, whichever way it points."""
    t = found.trajectory
    if t is None:
        return "Trajectories were not measured: paving diagnose RUN --only trajectory"
    if t.gap.mean is None:
        return f"No edit prompt had an open gate ({t.n_closed} closed), so there is no trajectory to look at: n/a (n=0)."
    reduction = tables.missing() if t.nll_reduction is None else f"{100 * t.nll_reduction:.1f}%"
    towards = (
        "more towards the edit target than towards" if t.gap.mean > 0 else "no more towards the edit target than towards"
    )
    return (
        f"On the {t.edit.n} edit prompts with an open gate ({t.n_closed} closed) the edit moves the residual stream "
        f"{towards} a refusal: mean cosine {spread_text(t.edit)} against {spread_text(t.refusal)}, "
        f"paired gap {spread_text(t.gap)}. The edit target's NLL falls by {reduction}."
    )


def experts_sentence(block: CellBlock) -> str:
    """Whether the mixture is needed: what the best single expert does, and which expert is missed most."""
    cells = {c.mixture: c for c in block.cells}
    whole = cells.get("router")
    if whole is None or whole.safe_answers.rate is None:
        return "There are no edit prompts to answer: n/a (n=0)."
    says = f"With the router's mixture {_safe(whole)} of the edit prompts get a safe answer"
    single = {m: c for m, c in cells.items() if m.startswith("expert:")}
    without = {m: c for m, c in cells.items() if m.startswith("without:")}
    if not single or not without:
        return f"{says}; there is one expert, and no mixture to take apart."
    best = max(single, key=lambda m: single[m].safe_answers.rate)
    missed = min(without, key=lambda m: without[m].safe_answers.rate)
    uniform = f", with a uniform one {_safe(cells['uniform'])}" if "uniform" in cells else ""
    return (
        f"{says}{uniform}. The best single expert is {best.split(':')[1]}, with {_safe(single[best])}; "
        f"taking away expert {missed.split(':')[1]} leaves fewest, {_safe(without[missed])}."
    )


def _safe(cell) -> str:
    return f"{cell.safe_answers.k}/{cell.safe_answers.n}"


def usefulness_sentence(found: Usefulness) -> str:
    """Edited answers beside the base's ordinary ones: loops and implausible text are the usual price of an edit."""
    yardstick = next((a for a in found.answers if a.row == "base" and a.bucket == Bucket.BENIGN_KEEP), None)
    edited = next((a for a in found.answers if a.what == "edited" and a.n), None)
    if edited is None or edited.broken is None:
        return "No edited answer was saved: n/a (n=0)."
    says = f"Of {edited.n} answers edited by {edited.row}, {edited.broken.k} are broken"
    if edited.repeated_4 is not None and yardstick is not None and yardstick.repeated_4 is not None:
        says += (
            f"; {100 * edited.repeated_4:.1f}% of their 4-grams stood in the same answer before, against "
            f"{100 * yardstick.repeated_4:.1f}% in the base's answers to benign keeps"
        )
    return says + "."


def spread_text(s: Spread) -> str:
    if s.mean is None:
        return tables.missing()
    return f"{s.mean:.3f}" + (f" ± {s.sd:.3f}" if s.sd is not None else "")
