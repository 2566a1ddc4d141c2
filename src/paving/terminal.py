"""What every command shares: where it prints, how it fails, and how it shows text that somebody else wrote."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial, wraps
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on stdout.")]


def one_line_errors(command: Callable | None = None, *, divided: bool = False) -> Callable:
    """A bad input is one clear line and exit code 1; Ctrl-C says what is kept and is exit code 130.

    divided: whether several processes work on this command together; others would each do the whole of it, in one folder
    """
    if command is None:
        return partial(one_line_errors, divided=divided)

    @wraps(command)
    def wrapped(*args, **kwargs):
        from pydantic import ValidationError

        if not divided and os.environ.get("WORLD_SIZE", "1") != "1":
            fail("only train and eval are divided over processes; run this command without a launcher.")
        try:
            return command(*args, **kwargs)
        except typer.Exit:  # a RuntimeError, raised by `fail` with its line printed already
            raise
        except KeyboardInterrupt:
            err.print("[yellow]Interrupted.[/] What was finished is kept; the same command goes on from there.")
            raise typer.Exit(130) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            fail(f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}")
        except (ValueError, RuntimeError, OSError) as error:
            if type(error) is RuntimeError:  # a bug or the framework's own: its traceback is the report
                raise
            # Notes say what stands already: the judge of a long run may fail after hours.
            fail(" ".join([str(error), *getattr(error, "__notes__", ())]))

    return wrapped


def fail(message: str) -> NoReturn:
    """One line on stderr, whatever the width of the terminal, and exit code 1."""
    err.print("[red]Error:[/]", end=" ")
    err.print(message, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1) from None


def json_object(text: str, option: str) -> dict:
    """raises ValueError for what is no JSON object, naming the option it was given to"""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{option} takes a JSON object; {text!r} is none: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{option} takes a JSON object; {text!r} is none.")
    return found


def say(text: str) -> None:
    """One line on stdout as it stands: no markup, no colours for numbers, no wrapping."""
    out.print(Text(text), highlight=False, soft_wrap=True)


def plain(text: str, limit: int) -> str:
    """Text from a file as one harmless line: no control or direction characters, cut at `limit` characters."""
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text[:limit])
    return shown if len(text) <= limit else f"{shown} [{len(text) - limit} more characters]"


def layers(text: str) -> tuple[int, ...]:
    """`1-4` or `8,12,16` or `1-4,9`. raises ValueError naming the part that is no layer."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is no layer or range of layers. Write for example 1-4 or 8,12,16.")
        if dash and int(last) < int(first):
            raise ValueError(f"{part.strip()!r} runs backwards. Write the lower layer first, for example 1-4.")
        found += range(int(first), int(last if dash else first) + 1)
    return tuple(sorted(set(found)))
