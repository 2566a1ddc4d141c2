"""`paving router`: another gate for a finished run's controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from paving.terminal import AsJson, err, layers, one_line_errors, out, say

app = typer.Typer(
    help="Gates: search one that opens on edit prompts and leaves keeps alone; see where it holds.", no_args_is_help=True
)


@app.command()
@one_line_errors
def search(
    run: Annotated[Path, typer.Argument(help="Run folder with a finished controller.")],
    folder: Annotated[Path, typer.Option("--out", help="Run folder of the same experts with the new gate.")],
    read: Annotated[
        list[str] | None, typer.Option("--layers", help="Blocks to read, as 8,12,16; repeat for more candidates.")
    ] = None,
    contrast: Annotated[str, typer.Option(help="Contrast pairs: starter, a .jsonl file, or none.")] = "starter",
    harmful: Annotated[
        float, typer.Option("--harmful-open", help="Highest share of harmful keeps that may open, out of fold.")
    ] = 0.02,
    benign: Annotated[float, typer.Option("--benign-open", help="The same for benign keeps.")] = 0.03,
    unlike: Annotated[float, typer.Option(help="Share of edit prompts taken for unlike the rest; 0: no such check.")] = 0.02,
    clothes: Annotated[
        int, typer.Option(help="Learn from so many copies of each prompt, too: in capitals, behind a system prompt, ...")
    ] = 0,
    promise: Annotated[
        str | None,
        typer.Option(
            help="Keep calibration prompts out and promise by them, as `paving train --promise` (docs/promise.md)."
        ),
    ] = None,
    folds: Annotated[int, typer.Option(min=2)] = 5,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:1, mps, ...; offload:20GiB")] = "auto",
    cache: Annotated[Path | None, typer.Option(help="Where base traces are kept. Default: the user cache.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Let a model repository run its own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Choose layers, pooling, machine and contrast pairs by prompts left out; evaluate the new folder as any run."""
    from paving.progress import live_progress
    from paving.router_search import search_router
    from paving.run import Means
    from paving.training.gate_search import GateSearch
    from paving.training.promise import PromiseConfig, read_promise

    asked = None if promise is None else PromiseConfig(**read_promise(promise))
    sets = tuple(layers(text) for text in read) if read else None
    settings = GateSearch(
        layers=sets,
        contrast=contrast,
        harmful=harmful,
        benign=benign,
        unlike=unlike or None,
        clothes=clothes,
        folds=folds,
        seed=seed,
    )
    with live_progress(err, quiet=as_json) as (stage, watch, note):
        places = {"cache": cache} if cache is not None else {}
        means = Means.default(
            **places, device=device, trust_remote_code=trust_remote_code, stage=stage, watch=watch, say=note
        )
        record = search_router(run, folder, settings, means, asked)
    if as_json:
        print(json.dumps(record, indent=1))
        return
    out.print(table_of(record["tried"][:12]))
    say(f"chosen: {record['why']}")
    shares = record["opened"].items()
    opened = ", ".join(f"{bucket} {100 * share:.1f} % of {record['prompts'][bucket]}" for bucket, share in shares)
    say(f"opens out of fold: {opened}")
    if worn := record.get("clothes"):
        opened = ", ".join(f"{bucket} {100 * share:.1f} %" for bucket, share in worn["opened"].items())
        say(f"and of {worn['copies']} copies in other clothes: {opened}")
        if worn["unsaid"]:
            say(f"this model's chat template cannot say {' nor '.join(worn['unsaid'])}; no copies have it")
    say("Candidate and thresholds were chosen by these prompts: on new ones expect more. paving eval says how much.")
    if record["pairs_dropped"]:
        left = ", ".join(f"{name} {n}" for name, n in record["pairs"].items())
        say(f"contrast pairs: {left}; {record['pairs_dropped']} left out, which stand for words or prompts kept apart")
    for sentence in record["promises"]:
        say(f"{sentence} Its threshold is {record['threshold']:.3f}; the shares above are at 0.")
    say(f"next: paving eval {folder}")


def table_of(tried: list[dict]) -> Table:
    table = Table("reads", "machine", "contrast pairs", "partial AUC", "AUC", "edit open")
    for row in tried:
        reads = f"{row['pooling']}, blocks {', '.join(map(str, row['layers']))}"
        figures = (f"{row['partial_auc']:.3f}", f"{row['auc']:.3f}", f"{100 * row['opened']:.0f} %")
        table.add_row(reads, row["kernel"], row["contrast"], *figures)
    return table


@app.command()
@one_line_errors
def shift(
    run: Annotated[Path, typer.Argument(help="Run folder with a finished controller.")],
    edit: Annotated[list[str] | None, typer.Option(help="Further prompts that should be edited, as `paving train`.")] = None,
    benign: Annotated[list[str] | None, typer.Option(help="Further ordinary prompts; repeat for more sources.")] = None,
    harmful: Annotated[list[str] | None, typer.Option(help="Further harmful prompts.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most prompts read of a source.")] = 200,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:1, mps, ...; offload:20GiB")] = "auto",
    trust_remote_code: Annotated[bool, typer.Option(help="Let a model repository run its own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Where the gate opens when prompts are said otherwise: in capitals, behind a system prompt, in a second turn."""
    from paving.evaluation.shift import SHIFT
    from paving.progress import live_progress
    from paving.prompts.types import Bucket
    from paving.report.shift import remarks, shift_terminal_table
    from paving.router_shift import read_source
    from paving.router_shift import shift as shifted
    from paving.run import Means

    asked = {Bucket.EDIT: edit, Bucket.BENIGN_KEEP: benign, Bucket.HARMFUL_KEEP: harmful}
    sources = [read_source(place, bucket, limit) for bucket, places in asked.items() for place in places or ()]
    with live_progress(err, quiet=as_json) as (stage, watch, note):
        means = Means.default(device=device, trust_remote_code=trust_remote_code, stage=stage, watch=watch, say=note)
        found = shifted(run, means, sources)
    if as_json:
        print(json.dumps([one.model_dump(mode="json") for one in found], indent=1))
        return
    out.print(shift_terminal_table(found))
    for sentence in remarks(found):
        say(sentence)
    say(f"saved: {run / SHIFT}" + (f"; shown in {run / 'report.html'}" if (run / "metrics.json").exists() else ""))
