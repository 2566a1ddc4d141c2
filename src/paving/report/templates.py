"""How a page becomes a file: templates beside this module, one self-contained HTML file, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def fill(template: str, **content: object) -> str:
    """The source of a page, from one of the templates `report/*.html.j2`."""
    # Autoescape by hand: the suffix .j2 would not switch it on, and prompts are written by strangers.
    environment = Environment(
        loader=PackageLoader("paving", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Global, because imported macros do not see what a page was given.
    environment.globals["folded"] = folded
    return environment.get_template(template).render(**content)


def folded(text: str) -> Markup:
    """A figure, and its interval and n on a line below, so that a table of many figures fits a page."""
    figure, bracket, rest = text.partition(" [")
    return escape(figure) + (Markup(" <br>") + escape(bracket.strip() + rest) if bracket else Markup(""))


def write_page(source: str, path: Path) -> Path:
    """Write a page to `path`, which holds either the old page or the whole new one, never a part of it."""
    # A model may emit half a surrogate pair, which UTF-8 cannot hold.
    return write_atomically(Path(path), source.encode("utf-8", errors="replace"))


def write_atomically(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
