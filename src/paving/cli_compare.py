"""`paving compare`: other methods on a run's own prompts, splits, decoding and judge, beside Residual Paving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paving.terminal import AsJson, err, one_line_errors, out, say


@one_line_errors
def compare(
    folder: Annotated[Path, typer.Argument(help="Evaluated run folder.")],
    method: Annotated[
        list[str] | None,
        typer.Option(help="A comparator, may be repeated; residual-paving asks for none. Default: all."),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="global, probe, probe+veto, oracle, own (the method's own condition: cast). Default: all."),
    ] = None,
    objective: Annotated[
        list[str] | None,
        typer.Option(
            help="What scales are chosen by: two (edit, benign keeps) or three (and harmful keeps). Default: three."
        ),
    ] = None,
    min_benign: Annotated[float, typer.Option(help="Strict rule: least benign preservation.", min=0, max=1)] = 0.95,
    min_harmful: Annotated[float, typer.Option(help="Strict rule: least harmful preservation.", min=0, max=1)] = 0.85,
    max_lost: Annotated[float, typer.Option(help="Strict rule: most points of harmful refusal lost.", min=0)] = 3.0,
    bert_score: Annotated[str | None, typer.Option(help="Encoder for BERTScore (extra: bertscore).")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:1, mps, ...; offload:20GiB")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Where base traces are kept. Default: the user cache.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a model repository run its own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Comparators beside Residual Paving: fitted, swept, chosen by rules, measured held out. Killed, it goes on."""
    from paving import compare as comparing
    from paving.evaluation.comparison import Limits
    from paving.progress import live_progress
    from paving.report import comparison_table, nothing_passes
    from paving.run import Means

    limits = Limits(benign_preservation=min_benign, harmful_preservation=min_harmful, harmful_drift=-max_lost / 100)
    with live_progress(err, quiet=as_json) as (stage, watch, note):
        places = {"cache": cache} if cache is not None else {}
        means = Means.default(
            **places, device=device, trust_remote_code=trust_remote_code, stage=stage, watch=watch, say=note
        )
        found = comparing.compare(
            folder, means,
            methods=method or (), variants=variant or (), objectives=objective or (), limits=limits, bert_model=bert_score,
        )  # fmt: skip
    if as_json:
        print(found.model_dump_json(indent=1))
        return
    out.print(comparison_table(found))
    for line in (*nothing_passes(found), *found.notes):
        say(line)
    say(f"comparison: {folder / 'comparison' / 'comparison.json'}")
    say(f"report: {folder / 'report.html'}")
