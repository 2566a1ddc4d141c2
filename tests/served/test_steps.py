"""Which rows of a step are prompt, decide the gate, or are edited: the same tokens however a request is cut into steps."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paving.serving.steps import Span, spans_of

REQUEST = st.tuples(st.integers(1, 30), st.integers(0, 12))  # prompt, generated


def cut(total: int, cuts: list[int]) -> list[tuple[int, int]]:
    """(position, length) of consecutive chunks."""
    edges = [0, *sorted({c for c in cuts if 0 < c < total}), total]
    return [(a, b - a) for a, b in pairwise(edges)]


@given(REQUEST, st.lists(st.integers(1, 42), max_size=8), st.integers(0, 9))
def test_however_a_request_is_cut_its_tokens_are_the_same(request_, cuts, start):
    prompt, generated = request_
    read, edited, decided = [], [], []
    for position, length in cut(prompt + generated, cuts):
        span = Span("r", start, length, position, prompt)
        token = {row: position + row - start for row in range(start, span.end)}
        read += [token[row] for row in span.prompt_rows]
        edited += [token[row] for row in span.edited_rows]
        decided += [] if span.last_prompt_row is None else [token[span.last_prompt_row]]
    assert read == list(range(prompt))
    assert edited == list(range(prompt - 1, prompt + generated))
    assert decided == [prompt - 1]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 9)), max_size=6))
def test_spans_cover_the_batch_in_order(rows):
    spans = spans_of([f"r{i}" for i in range(len(rows))], *map(list, zip(*rows, strict=True)) if rows else ([], [], []))
    assert [row for s in spans for row in range(s.start, s.end)] == list(range(sum(length for length, *_ in rows)))
    assert [(s.length, s.position, s.prompt) for s in spans] == rows
