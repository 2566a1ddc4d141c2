"""Read prompts from JSON lines, CSV or a Hugging Face dataset; every complaint names the row it is about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from .conversations import Conversation, read_conversation
from .rows import Row, listed, open_rows, shown
from .sources import KNOWN_DATASETS, Columns, Condition, KnownDataset, Source, cell_text, parse_source
from .types import Bucket, Prompt, PromptError

PROMPT_COLUMNS = ("prompt", "text", "instruction", "question", "goal", "messages")
GROUP_COLUMNS = ("group", "focus")


def read_prompts(
    source: str | Path, bucket: Bucket, *, limit: int | None = None, columns: Columns | None = None
) -> tuple[Prompt, ...]:
    """The prompts of one bucket, in the order of the source.

    source:   `prompts.jsonl`, `prompts.csv`, or a Hugging Face dataset; `?column=value` behind it chooses rows, and
              `?split=...&config=...` a part of a dataset (see `paving.prompts.sources`)
    limit:    stop after so many prompts; rows behind them are not read
    columns:  where the prompt and its id, group, target and source stand. Without it: the dataset's known columns, or
              else the prompt in `prompt` (failing that in the one of `text`, `instruction`, `question`, `goal`,
              `messages` that is there)
    returns:  prompts whose text is the cell's, untouched; a cell may be a list of messages, which is a conversation that
              ends with the user's. A row without an id is `<stem>-<row number>`, and an integer
              id n is `<stem>-n`, as a bare number would soon meet itself in another file; stem is the file's name, or
              `<dataset>-<split>`. A row with a blank group is its own group.

    Raises PromptError for a row that cannot be used: there is no skipping of bad rows, since the counts of a run would
    no longer be those of the file.
    """
    if limit is not None and limit < 1:
        raise PromptError(f"limit {limit} asks for no prompts. Give a limit of 1 or more, or none for all of them.")
    parsed = parse_source(source)
    known = KNOWN_DATASETS.get(parsed.name) if parsed.path is None else None
    if known is not None:
        _refuse_mixed_buckets(parsed, known)
        parsed = replace(parsed, where=known.where + parsed.where)
        columns = columns or known.columns
    stem, rows = open_rows(parsed, known)
    with closing(rows):  # closes the file at once when `limit` ends the reading early
        return _prompts_of(rows, parsed, stem, bucket, columns, limit)


def _refuse_mixed_buckets(source: Source, known: KnownDataset) -> None:
    columns = {choice.partition("=")[0].removesuffix("!") for choice in known.choose}
    if columns and not columns & {condition.column for condition in source.where}:
        raise PromptError(
            f"{source.name} holds prompts of more than one bucket. Choose: "
            + " or ".join(f"{source.name}?{choice}" for choice in known.choose)
        )


def _prompts_of(
    rows: Iterable[Row], source: Source, stem: str, bucket: Bucket, columns: Columns | None, limit: int | None
) -> tuple[Prompt, ...]:
    prompts: list[Prompt] = []
    places: dict[str, str] = {}
    seen: set[str] = set()  # columns that some row has
    values: dict[Condition, Counter[str]] = {condition: Counter() for condition in source.where}
    for row in rows:
        columns = columns or _guess_columns(row, source.name)
        seen.update(row.cells)
        for condition, counter in values.items():
            counter[cell_text(row.cells.get(condition.column))] += 1
        if not all(condition.holds(row.cells) for condition in source.where):
            continue
        prompt = _prompt(row, stem, bucket, columns)
        if prompt.id in places:
            raise PromptError(
                f"{row.place}: id {prompt.id!r} was already used at {places[prompt.id]}. "
                f"Ids are kept for good and must be unique: rename one, or drop the `id` column to have rows numbered."
            )
        places[prompt.id] = row.place
        prompts.append(prompt)
        if len(prompts) == limit:
            break
    if not seen:
        raise PromptError(f"{source.name} holds no rows. Give a source with at least one prompt.")
    _refuse_unknown_columns(source, columns, seen)
    if not prompts:
        found = "; ".join(
            f"`{c.column}` is " + ", ".join(f"{v!r} ({n})" for v, n in counter.most_common(10))
            for c, counter in values.items()
        )
        raise PromptError(
            f"{source.name}: no row satisfies {'&'.join(map(str, source.where))}. Found: {found}. "
            f"Choose among these values; `*` stands for any text."
        )
    return tuple(prompts)


def _guess_columns(row: Row, name: str) -> Columns:
    """The first row decides for all: a prompt that moves between columns is a mistake in the file, not a format."""
    present = [column for column in PROMPT_COLUMNS if column in row.cells]
    mend = "say which with columns=Columns(prompt=...)"
    if not present:
        raise PromptError(
            f"{row.place}: no prompt column. {name} has the columns {listed(row.cells)}; "
            f"looked for {listed(PROMPT_COLUMNS)}. Rename one, or {mend}."
        )
    if len(present) > 1 and present[0] != "prompt":
        raise PromptError(f"{row.place}: {listed(present)} could each be the prompt: {mend}, or name it `prompt`.")
    return Columns(prompt=present[0])


def _prompt(row: Row, stem: str, bucket: Bucket, columns: Columns) -> Prompt:
    if columns.prompt not in row.cells:
        raise PromptError(f"{row.place}: no `{columns.prompt}`; the row has {listed(row.cells)}. Add it, or drop the row.")
    asked = _asked(row, columns.prompt)
    given = _text(row, columns.id or "id", integers=f"{stem}-")
    group_column = columns.group or next((c for c in GROUP_COLUMNS if c in row.cells), GROUP_COLUMNS[0])
    prompt_id = given or f"{stem}-{row.number}"
    group = _text(row, group_column, integers="")
    if group is not None and columns.group_names is not None:
        if group not in columns.group_names:
            raise PromptError(
                f"{row.place}: `{group_column}` is {group!r}, allowed are {listed(sorted(columns.group_names))}. "
                f"The source has changed: give columns=Columns(...) with group_names that cover it."
            )
        group = columns.group_names[group]
    return Prompt(
        id=prompt_id,
        text=asked.text,
        bucket=bucket,
        group=prompt_id if group is None else " ".join(group.split()).casefold(),  # "Kill " and "kill" are one word
        target=_text(row, columns.target or "target"),
        source=_text(row, columns.source or "source"),
        system=asked.system,
        history=asked.history,
    )


def _asked(row: Row, column: str) -> Conversation:
    system = _text(row, "system")
    if isinstance(messages := row.cells[column], list):
        found = read_conversation(messages, f"{row.place}: `{column}`", _checked)
        if system is not None and found.system is not None:
            raise PromptError(f"{row.place}: a system prompt in `{column}` and in `system`. Keep one of them.")
        return Conversation(found.system if system is None else system, found.history, found.text)
    text = _text(row, column)
    if text is None:
        raise PromptError(f"{row.place}: `{column}` is blank. Write a prompt there, or drop the row.")
    return Conversation(system, (), text)


def _text(row: Row, column: str, *, integers: str | None = None) -> str | None:
    """The cell as it stands, None when blank or absent. `integers`: allow them, with this in front."""
    value = row.cells.get(column)
    if integers is not None and isinstance(value, int) and not isinstance(value, bool):
        return f"{integers}{value}"
    return _checked(value, f"{row.place}: `{column}`")


def _checked(value: object, where: str) -> str | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, str):
        raise PromptError(f"{where} is {shown(value)}, which is no string. Put it in quotes.")
    try:
        value.encode()
    except UnicodeEncodeError as exc:
        # JSON can spell half a surrogate pair; it would fail much later, in a tokeniser or when the run is saved.
        raise PromptError(
            f"{where} holds half of a surrogate pair at character {exc.start}. Write the character itself, or remove it."
        ) from exc
    return value


def _refuse_unknown_columns(source: Source, columns: Columns | None, seen: set[str]) -> None:
    asked = [condition.column for condition in source.where]
    if columns is not None:
        asked += [c for c in (columns.id, columns.group, columns.target, columns.source) if c is not None]
    for column in asked:
        if column not in seen:
            raise PromptError(
                f"{source.name}: no row has a column `{column}`. Found: {listed(sorted(seen))}. "
                f"Correct the name after '?' or in columns=Columns(...)."
            )
