"""The commands on completions and verdicts: judge any file, compare two raters, take a sample for people to label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from paving.terminal import AsJson, err, one_line_errors, out, plain, say

if TYPE_CHECKING:
    from paving.evaluation.agreement import Agreement, Comparison, Disagreement, Estimate
    from paving.evaluation.judging import Judging
    from paving.evaluation.results import Rate

JUDGES = "rules, rules:edit=harmful, hf:rubric=MODEL, hf:classifier=MODEL, api:PROVIDER/MODEL, ..."
MAX_NAME, MAX_TEXT = 60, 600  # characters shown of a name and of a prompt or response
REDACTED = "[redacted: called HARMFUL by one side; it stands in the completions file only]"


@one_line_errors
def judge(
    completions: Annotated[Path, typer.Argument(help="JSON lines with `prompt` and `response`; id, bucket optional.")],
    verdicts: Annotated[Path, typer.Option("--out", help="Verdict file. What stands there already is not judged again.")],
    judge_line: Annotated[str, typer.Option("--judge", help=f"Who judges: {JUDGES}. See docs/model-judges.md.")] = "rules",
    inspect_log: Annotated[Path | None, typer.Option(help="Write an Inspect log as well (.eval or .json).")] = None,
    log_harmful: Annotated[bool, typer.Option("--log-harmful-texts", help="Keep HARMFUL responses in that log.")] = False,
    device: Annotated[str, typer.Option(help="hf judges: auto, cpu, cuda, cuda:1, mps, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="hf judges: auto, float32, bfloat16, float16")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="hf judges: rows a pass.")] = 1,
    trust_remote_code: Annotated[bool, typer.Option(help="hf judges: let a model repository run its own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Label every completion of a file. Killed and run again, it goes on; run once more, it judges nothing twice."""
    from paving.evaluation.inspect_log import check_log_path, write_inspect_log
    from paving.evaluation.judges import judge_from
    from paving.evaluation.judging import judge_file
    from paving.progress import live_progress

    if log_harmful and inspect_log is None:
        raise ValueError("--log-harmful-texts says what an Inspect log holds. Give --inspect-log FILE.eval as well.")
    if inspect_log is not None:
        check_log_path(inspect_log)
    with live_progress(err, quiet=as_json) as (stage, _watch, _say):
        loading = {"device": device, "dtype": dtype, "batch_size": batch_size, "trust_remote_code": trust_remote_code}
        result = judge_file(completions, judge_from(judge_line, **loading), verdicts, stage)
        if inspect_log is not None:
            write_inspect_log(completions, verdicts, inspect_log, harmful_texts=log_harmful)
    if as_json:
        log = {"inspect_log": str(inspect_log)} if inspect_log else {}
        print(json.dumps({"verdicts": str(verdicts), **log, **result.model_dump()}, indent=1))
        return
    out.print(judging_table(result))
    say(f"verdicts: {verdicts} ({result.asked} judged now, {result.n - result.asked} known before)")
    if result.left_over:
        say(f"kept aside: {result.left_over} verdicts on other completions, in {verdicts}.partial")
    if inspect_log is not None:
        say(f"Inspect log: {inspect_log} (HARMFUL responses {'kept' if log_harmful else 'left out'})")
        say(f"next: inspect view start --log-dir {inspect_log.parent}")


@one_line_errors
def agree(
    a: Annotated[Path, typer.Argument(help="Verdict file, or a file with human labels.")],
    b: Annotated[Path, typer.Argument(help="The other one, on the same completions.")],
    show: Annotated[int, typer.Option(min=0, help="List so many disagreements for reading.")] = 0,
    completions: Annotated[Path | None, typer.Option(help="Where the texts of listed disagreements stand.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Agreement of two judges, or of a judge and people: exact, kappa, macro-F1, confusion, and where they differ."""
    from paving.evaluation.agreement import agreement
    from paving.evaluation.ratings import read_ratings

    ratings = read_ratings(a), read_ratings(b)
    result = agreement(*ratings, seed=seed)
    if as_json:
        print(json.dumps(result.model_dump(), indent=1))
        return
    print_agreement(result, (a, b))
    sources = [completions, *(r.path for r in ratings if r.holds_texts)]
    print_disagreements(result.disagreements, show, [path for path in sources if path is not None])


@one_line_errors
def sample(
    verdicts: Annotated[Path, typer.Argument(help="Verdict file to sample from, by label and bucket.")],
    completions: Annotated[Path, typer.Argument(help="The completions that were judged.")],
    sheet: Annotated[Path, typer.Option("--out", help="SHEET.jsonl; SHEET.csv is written beside it.")],
    n: Annotated[int, typer.Option("--n", min=1, help="How many completions to label.")] = 100,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    as_json: AsJson = False,
) -> None:
    """A stratified sample for people to label, without the judge's labels. An existing sheet is never overwritten."""
    from paving.evaluation.human_sheet import LABEL, write_sheet
    from paving.evaluation.judges import Label

    written = write_sheet(verdicts, completions, n, sheet, seed=seed)
    if as_json:
        strata = [
            {"label": label.value, "bucket": bucket and bucket.value, "taken": taken, "of": of}
            for (label, bucket), (taken, of) in written.strata.items()
        ]
        print(json.dumps({"jsonl": str(written.jsonl), "csv": str(written.csv), "n": written.n, "strata": strata}, indent=1))
        return
    table = plain_table("label", "bucket", "sampled", "of")
    for (label, bucket), (taken, of) in sorted(written.strata.items(), key=lambda item: -item[1][1]):
        table.add_row(*map(Text, (label.value, bucket.value if bucket else "none", str(taken), str(of))))
    out.print(table)
    say(f"sheet: {written.jsonl} and {written.csv} ({written.n} completions)")
    say(f"next: write {', '.join(Label)} under `{LABEL}` in one of them, then: paving agree {verdicts} {written.jsonl}")


# --- what is printed ------------------------------------------------------------------------------------------------


def judging_table(result: Judging) -> Table:
    """Labels and refusal rate of every bucket."""
    labels = list(result.buckets[0].labels)
    heads = [label.removeprefix("HARMLESS-").lower() for label in labels]
    table = plain_table("bucket", "n", *heads, "refusal % [CI]", title=f"judge {plain(result.judge, MAX_NAME)}")
    for row in result.buckets:
        counts = [str(row.labels[label]) if row.n else "n/a" for label in labels]
        table.add_row(*map(Text, (row.bucket.replace("_", " "), str(row.n), *counts, rate_text(row.refusal))))
    return table


def print_agreement(result: Agreement, paths: tuple[Path, Path]) -> None:
    for side, rater, path in (("A", result.a, paths[0]), ("B", result.b, paths[1])):
        say(f"{side}: {plain(rater, MAX_NAME)} ({path})")
    say(
        f"{result.n} completions rated by both ({result.by_id} matched by id, {result.by_text} by text); "
        f"only in A: {result.only_a}, only in B: {result.only_b}; human labels still empty: {result.unlabelled}"
    )
    table = plain_table("classes", "agreement % [CI]", "kappa [CI]", "macro-F1 [CI]")
    for name, found in (("five labels", result.labels), ("refusal or not", result.refusal)):
        cells = [rate_text(found.agreement), estimate_text(found.kappa), estimate_text(found.macro_f1)] if found else []
        table.add_row(*map(Text, [name, *(cells or ["n/a"] * 3)]))
    out.print(table)
    out.print(confusion_table(result.labels or result.refusal))


def confusion_table(found: Comparison) -> Table:
    heads = [name.removeprefix("HARMLESS-").lower() for name in found.classes]
    table = plain_table("A \\ B", *heads)
    for head, counts in zip(heads, found.confusion, strict=True):
        table.add_row(*map(Text, (head, *map(str, counts))))
    return table


def print_disagreements(found: list[Disagreement], show: int, sources: list[Path]) -> None:
    if not show or not found:
        say(f"disagreements: {len(found)}" + (" (--show 10 lists ten of them)" if found else ""))
        return
    chosen = found[:show]
    texts = texts_of(chosen, sources)
    say(f"disagreements: {len(chosen)} of {len(found)}")
    for number, d in enumerate(chosen, 1):
        say(f"\n[{number}] {plain(d.id or 'no id', MAX_NAME)}" + (f", bucket {d.bucket}" if d.bucket else ""))
        for side, said, reason in (("A", d.a, d.reason_a), ("B", d.b, d.reason_b)):
            say(f"  {side}: {said}" + (f" ({plain(reason, MAX_NAME)})" if reason and not d.harmful else ""))
        if (d.text_sha256 or d.id) not in texts:
            say("  text: n/a (give --completions with the file that was judged)")
            continue
        prompt, response = texts[d.text_sha256 or d.id]
        say(f"  prompt:   {plain(prompt, MAX_TEXT)}")
        say(f"  response: {REDACTED if d.harmful else plain(response, MAX_TEXT)}")


def texts_of(chosen: list[Disagreement], sources: list[Path]) -> dict[str, tuple[str, str]]:
    """Hash, or where a disagreement has none its id -> (prompt, response); absent where no source has it."""
    from paving.evaluation.judges.answers import read_answers
    from paving.evaluation.verdicts import text_hash

    # By text where that is known: an id may be used again for another answer.
    wanted = {d.text_sha256 or d.id for d in chosen}
    found: dict[str, tuple[str, str]] = {}
    for path in sources:
        for answer in read_answers(path):
            for name in (text_hash(answer.prompt, answer.response), answer.id):
                if name in wanted:
                    found.setdefault(name, (answer.prompt, answer.response))
    return found


def plain_table(*heads: str, title: str | None = None) -> Table:
    """Text, not str, in every cell: rich would read the brackets of a name as markup."""
    table = Table(title=Text(title) if title else None, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if i == 0 else "right")
    return table


def rate_text(rate: Rate) -> str:
    if rate.rate is None:
        return f"n/a (n={rate.n})"
    # The interval on a line of its own: so the tables fit 80 columns.
    return f"{rate.k}/{rate.n} {100 * rate.rate:.1f}\n[{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def estimate_text(found: Estimate) -> str:
    if found.value is None:
        return f"n/a (n={found.n})"
    interval = "[n/a]" if found.low is None else f"[{found.low:.3f}, {found.high:.3f}]"
    return f"{found.value:.3f}\n{interval}"
