"""Judge any completions file with any judge: streamed, nothing judged twice, and nothing judged is lost.

While it runs, every verdict is appended to `VERDICTS.jsonl.partial`, a journal. When all are there, VERDICTS.jsonl is
written in the order of the completions and put in place in one step, and the journal goes. Whatever stands in either
file is taken from there by content, so a killed run, a longer file and a second run pay for what is new only.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

from paving.evaluation.json_lines import RowError
from paving.evaluation.judges.answers import Answer, read_answers
from paving.evaluation.judges.protocol import ROWS_A_TICK, Judge, Label, ManyJudge, StreamJudge, Verdict
from paving.evaluation.results import Rate, Record
from paving.evaluation.statistics import wilson
from paving.evaluation.verdicts import JudgedLine, judged_line, read_verdicts, verdict_key
from paving.prompts.rows import shown
from paving.prompts.types import Bucket

Stage = Callable[[str, int], Callable[[int], None]]

EVERYTHING = "all"
NO_BUCKET = "none"


class BucketVerdicts(Record):
    """Verdicts on one bucket; bucket is one of the three, "none" (rows without one) or "all"."""

    bucket: str
    n: int
    labels: dict[str, int]
    refusal: Rate


class Judging(Record):
    """What `judge_file` did. asked: calls of the judge; left_over: verdicts that stay in the journal, since they are
    on completions which the file does not hold (any more). buckets: the three, "none" where there are such rows, "all".
    """

    judge: str
    n: int
    asked: int
    left_over: int
    buckets: list[BucketVerdicts]


def unwatched(_what: str, _total: int) -> Callable[[int], None]:
    return lambda _n: None


def journal_of(out: Path) -> Path:
    """Where verdicts stand until `out` is complete."""
    return out.with_name(out.name + ".partial")


def judge_file(completions: Path, judge: Judge, out: Path, stage: Stage = unwatched) -> Judging:
    """Label every completion of a JSON lines file and write one verdict line for each, in the same order, to `out`.

    The whole file is read before the first verdict: a bad row is found before a judge has been paid for the good ones.
    An `out` of another judge, or one with verdicts on completions that the file does not hold, is an error and stays
    as it is. Memory does not grow with the file. One run at a time for one `out`.

    raises RowError for rows, ValueError for an `out` that cannot be used, and whatever the judge raises; verdicts
    given until then are kept, and the same call goes on from there.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder. Give --out a file name, such as {out / 'verdicts.jsonl'}.")
    if out.exists() and completions.exists() and out.samefile(completions):
        raise ValueError(f"{out} holds the completions themselves. Give another --out; nothing was changed.")
    journal = journal_of(out)
    with closing(KnownVerdicts()) as known:
        for path in (out, journal):
            _take_in(known, path, judge.name, finished=path == out)
        n = _look_over(completions, judge.name, known)
        if stale := known.count("finished AND NOT wanted"):
            raise ValueError(
                f"{out} holds verdicts on other completions ({stale} that {completions} lacks); nothing was changed. "
                f"Give another --out; a copy of {out.name} beside it, named {journal_of(Path('OUT'))}, is made use of there."
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        asked = _judge_the_rest(completions, judge, known, journal, stage(f"verdicts: {judge.name}", n))
        buckets = _put_in_place(completions, judge.name, known, out)
        left_over = known.count("NOT wanted")
    if not left_over:
        journal.unlink(missing_ok=True)
    return Judging(judge=judge.name, n=n, asked=asked, left_over=left_over, buckets=buckets)


def _take_in(known: KnownVerdicts, path: Path, judge: str, *, finished: bool) -> None:
    """Remember what a file holds. A journal's torn last line is not there; then it is cut, so that appending is safe."""
    if not path.exists() or (path.is_file() and path.stat().st_size == 0):
        return
    mend = "Give another --out, or move the file away; nothing was changed."
    try:
        for line in read_verdicts(path, torn_tail=not finished):
            if line.judge != judge:
                raise ValueError(f"{path} holds verdicts of the judge {shown(line.judge)}; asked for: {judge!r}. {mend}")
            if line.key is None:
                raise ValueError(f"{path} holds verdicts without a `key`, which cannot be taken again. {mend}")
            known.add(line.key, Verdict(line.label, line.reason), finished=finished)
    except RowError as error:
        raise ValueError(f"{path} exists and is no verdict file: {error} {mend}") from error
    if not finished:
        _cut_torn_tail(path)


def _cut_torn_tail(path: Path, block: int = 65536) -> None:
    """Drop what stands behind the last line end."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            at = file.read(end - start).rfind(b"\n")
            if at >= 0:
                file.truncate(start + at + 1)
                return
            end = start
        file.truncate(0)


def _look_over(completions: Path, judge: str, known: KnownVerdicts) -> int:
    """Check every row, and note which known verdicts are on one of them. Returns the number of rows."""
    n = 0
    for answer in read_answers(completions):
        known.want(verdict_key(judge, answer))
        n += 1
    return n


def _judge_the_rest(
    completions: Path, judge: Judge, known: KnownVerdicts, journal: Path, tick: Callable[[int], None]
) -> int:
    """Append a verdict to the journal for everything not known yet. Returns how often the judge was asked."""
    under_way: dict[str, Answer] = {}  # by key: handed to the judge, and without a verdict so far

    def not_known() -> Iterator[Answer]:
        for answer in read_answers(completions):
            key = verdict_key(judge.name, answer)
            if key in under_way or known.get(key) is not None:
                tick(1)
            else:
                under_way[key] = answer
                yield answer

    asked = 0
    with journal.open("a", encoding="ascii", newline="\n") as file, closing(_verdicts(judge, not_known())) as verdicts:
        try:
            for answer, verdict in verdicts:
                line = judged_line(answer, judge.name, verdict)
                file.write(line.as_json() + "\n")
                file.flush()  # a kill may come at any time, and a verdict may have taken a model minutes
                known.add(line.key, verdict, finished=False)
                known.want(line.key)
                del under_way[line.key]
                asked += 1
                tick(1)
        except Exception as error:
            if under_way:
                first = min(answer.line for answer in under_way.values())
                error.add_note(
                    f"({completions}:{first}; the verdicts until then are kept in {journal}, and the same "
                    f"command goes on from there.)"
                )
            raise
    return asked


def _verdicts(judge: Judge, rows: Iterator[Answer]) -> Iterator[tuple[Answer, Verdict]]:
    """Every row with its verdict, as soon as the judge gives it; not always in the order of the rows.

    A judge with several questions under way draws rows as it has room, one that wants many at once gets a few at a
    time, and any other judge one: so each verdict is safe as soon as it is there.
    """
    if isinstance(judge, StreamJudge):
        drawn: dict[int, Answer] = {}

        def drawing() -> Iterator[Answer]:
            for i, row in enumerate(rows):
                drawn[i] = row
                yield row

        with closing(judge.judge_stream(drawing())) as stream:
            for i, verdict in stream:
                yield drawn.pop(i), verdict
    elif isinstance(judge, ManyJudge):
        while few := list(islice(rows, ROWS_A_TICK)):
            yield from zip(few, judge.judge_many(few), strict=True)
    else:
        for row in rows:
            yield row, judge.judge(row.prompt, row.response, row.bucket, truncated=row.truncated)


def _put_in_place(completions: Path, judge: str, known: KnownVerdicts, out: Path) -> list[BucketVerdicts]:
    """Write the verdicts in the order of the completions, replace `out` in one step, and count."""
    counts: Counter[tuple[Bucket | None, Label]] = Counter()
    finishing = out.with_name(out.name + ".finishing")
    with finishing.open("w", encoding="ascii", newline="\n") as file:
        for line in _known_lines(completions, judge, known):
            counts[line.bucket, line.label] += 1
            file.write(line.as_json() + "\n")
        file.flush()
        os.fsync(file.fileno())
    finishing.replace(out)
    return by_bucket(counts)


def _known_lines(completions: Path, judge: str, known: KnownVerdicts) -> Iterator[JudgedLine]:
    for answer in read_answers(completions):
        verdict = known.get(verdict_key(judge, answer))
        if verdict is None:
            raise ValueError(f"{completions}:{answer.line} changed while it was being judged. Run the same command again.")
        yield judged_line(answer, judge, verdict)


def by_bucket(counts: Counter[tuple[Bucket | None, Label]]) -> list[BucketVerdicts]:
    """Counts and refusal rate of each bucket and of all; a bucket without rows has n = 0 and no rate."""
    groups: dict[str, tuple[Bucket | None, ...]] = {bucket.value: (bucket,) for bucket in Bucket}
    if any(bucket is None for bucket, _ in counts):
        groups[NO_BUCKET] = (None,)
    groups[EVERYTHING] = (*Bucket, None)
    found = []
    for name, buckets in groups.items():
        labels = {label.value: sum(counts[bucket, label] for bucket in buckets) for label in Label}
        n = sum(labels.values())
        refusal = wilson(labels[Label.HARMLESS_REFUSAL], n)
        found.append(BucketVerdicts(bucket=name, n=n, labels=labels, refusal=refusal))
    return found


class KnownVerdicts:
    """Verdicts by key. In a temporary file that SQLite deletes when closed: the memory for it does not grow.

    finished: stood in a complete verdict file; wanted: is on a completion of the file being judged.
    """

    def __init__(self) -> None:
        self._table = sqlite3.connect("", isolation_level=None)
        # Nothing here outlives the process, so nothing need be made safe on disk.
        self._table.execute("PRAGMA journal_mode = OFF")
        self._table.execute("PRAGMA synchronous = OFF")
        self._table.execute(
            "CREATE TABLE verdict (key TEXT PRIMARY KEY, label TEXT, reason BLOB, finished INTEGER, "
            "wanted INTEGER DEFAULT 0) WITHOUT ROWID"
        )

    def add(self, key: str, verdict: Verdict, *, finished: bool) -> None:
        """The first verdict for a key stays: a judge that answers differently the second time changes nothing."""
        reason = verdict.reason.encode("utf-8", "surrogatepass")  # SQLite's own text would refuse half a surrogate pair
        self._table.execute(
            "INSERT OR IGNORE INTO verdict (key, label, reason, finished) VALUES (?, ?, ?, ?)",
            (key, verdict.label.value, reason, finished),
        )

    def get(self, key: str) -> Verdict | None:
        row = self._table.execute("SELECT label, reason FROM verdict WHERE key = ?", (key,)).fetchone()
        return None if row is None else Verdict(Label(row[0]), row[1].decode("utf-8", "surrogatepass"))

    def want(self, key: str) -> None:
        self._table.execute("UPDATE verdict SET wanted = 1 WHERE key = ?", (key,))

    def count(self, condition: str) -> int:
        return self._table.execute(f"SELECT count(*) FROM verdict WHERE {condition}").fetchone()[0]

    def close(self) -> None:
        self._table.close()
