"""`paving contrast`: drafts of contrast pairs for your own edit prompts, and a person's decision on each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from paving.terminal import AsJson, fail, one_line_errors, plain, say

app = typer.Typer(help="Contrast pairs: a safe and an unsafe prompt about one thing.", no_args_is_help=True)
ASKED = "[a]ccept, [r]eject, [w]rite another unsafe side, [s]kip, [q]uit"


@app.command()
@one_line_errors
def draft(
    edit: Annotated[str, typer.Option(help="Your edit prompts: a file or dataset, as for `paving train`.")],
    path: Annotated[Path, typer.Option("--out", help="File of drafts; it must not exist.")],
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many prompts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Draft unsafe counterparts in the words of your edit prompts. Nothing learns from a draft before it is accepted."""
    from paving.prompts import Bucket, read_prompts
    from paving.prompts.drafts import draft_contrasts, write_drafts

    prompts = read_prompts(edit, Bucket.EDIT, limit=limit)
    drafts = draft_contrasts(prompts)
    try:
        write_drafts(drafts, path)
    except FileExistsError:
        fail(f"{path} exists already; give another --out. Nothing was overwritten.")
    if as_json:
        print(json.dumps({"prompts": len(prompts), "drafts": len(drafts), "out": str(path)}))
        return
    say(f"{len(drafts)} drafts of {len(prompts)} prompts in {path}.")
    say(f"next: paving contrast review {path} --out pairs.jsonl")


@app.command()
@one_line_errors
def review(
    drafts: Annotated[Path, typer.Argument(help="File of `paving contrast draft`.")],
    path: Annotated[Path, typer.Option("--out", help="Pairs with your decisions; a second run goes on in it.")],
) -> None:
    """Accept, reject or reword draft after draft. Every decision is on disk at once; those made are not asked again."""
    from paving.prompts.drafts import decide, undecided

    left = undecided(drafts, path)
    taken = 0
    for i, one in enumerate(left, 1):
        say(f"\n{i} of {len(left)}, {plain(one.focus, 60)}")
        say(f"  safe    {plain(one.safe, 500)}\n  unsafe  {plain(one.unsafe, 500)}")
        answer, unsafe = _asked()
        if answer == "q":
            break
        if answer == "s":
            continue
        decide(one, "rejected" if answer == "r" else "accepted", path, unsafe=unsafe)
        taken += answer != "r"
    say(f"{taken} accepted now; {len(undecided(drafts, path))} of the drafts are left.")
    say(f"next: paving router search RUN --out NEW --contrast {path}")


def _asked() -> tuple[str, str | None]:
    """(letter, the person's own unsafe side). An end of input is the end of the review, as Ctrl-C is."""
    try:
        while True:
            answer = typer.prompt(ASKED, prompt_suffix=": ").strip().lower()[:1]
            if answer == "w":
                text = typer.prompt("unsafe side (empty: back)", default="", show_default=False).strip()
                if text:
                    return "w", text
            elif answer in ("a", "r", "s", "q"):
                return answer, None
    except typer.Abort:
        raise KeyboardInterrupt from None
