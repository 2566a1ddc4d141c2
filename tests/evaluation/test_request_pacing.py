"""RPM and TPM: no minute holds more than it may, nobody overtakes, and the endpoint's own count replaces the guess."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paving.evaluation.judges.pacing import WINDOW, Pace


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_without_limits_nobody_waits():
    pace = Pace(clock=Clock())
    assert [pace.wait(pace.book(10**9)) for _ in range(500)] == [0.0] * 500


def test_the_request_that_is_too_many_waits_for_the_first_to_be_a_minute_old():
    clock = Clock()
    pace = Pace(rpm=3, clock=clock)
    assert [pace.wait(pace.book(1)) for _ in range(3)] == [0, 0, 0]
    clock.now += 20
    assert [pace.wait(pace.book(1)) for _ in range(4)] == [40, 40, 40, 100]


def test_tokens_fill_a_minute_as_requests_do_and_a_small_one_does_not_overtake():
    pace = Pace(tpm=100, clock=Clock())
    assert [pace.wait(pace.book(tokens)) for tokens in (60, 60, 1)] == [0, 60, 60]


def test_a_request_larger_than_a_minute_goes_out_alone():
    pace = Pace(tpm=100, clock=Clock())
    assert [pace.wait(pace.book(tokens)) for tokens in (10, 500, 10)] == [0, 60, 120]


def test_what_the_endpoint_counted_takes_the_place_of_the_guess():
    pace = Pace(tpm=100, clock=Clock())
    first = pace.book(90)
    pace.settle(first, 20)
    assert pace.wait(pace.book(80)) == 0
    pace.settle(first, 21)
    assert pace.wait(pace.book(0)) == 60


@given(
    rpm=st.none() | st.integers(1, 5),
    tpm=st.none() | st.integers(1, 50),
    asked=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 60)), max_size=40),
)
def test_no_minute_holds_more_than_it_may(rpm, tpm, asked):
    clock = Clock()
    pace = Pace(rpm=rpm, tpm=tpm, clock=clock)
    booked = []
    for later, tokens in asked:
        clock.now += later
        booked.append(pace.book(tokens))
        assert booked[-1].start >= clock.now
    assert [b.start for b in booked] == sorted(b.start for b in booked)
    for last in booked:
        minute = [b for b in booked if b.start <= last.start < b.start + WINDOW]
        assert rpm is None or len(minute) <= rpm
        assert tpm is None or sum(b.tokens for b in minute) <= max(tpm, *(b.tokens for b in minute))
