"""Stay below an endpoint's limits: so many requests, and so many tokens, within any minute."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

WINDOW = 60.0  # seconds, the minute of RPM and TPM


@dataclass
class Booking:
    """One request's place in time. start: when it may go out, on the pace's clock; tokens: what it is taken to use."""

    start: float
    tokens: int


@dataclass
class Pace:
    """Hands out starting times such that no minute holds more than `rpm` requests or `tpm` tokens. None: no limit.

    A request that needs more tokens than a minute holds goes out in a minute of its own: the endpoint has the last word.
    Only what is booked is counted, so what else uses the same key must be left room for.
    """

    rpm: int | None = None
    tpm: int | None = None
    clock: Callable[[], float] = time.monotonic
    _booked: deque[Booking] = field(default_factory=deque, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def book(self, tokens: int) -> Booking:
        """The next free place, first come, first served. Whoever books waits until its `start`."""
        with self._lock:
            # Never before the one that came last: a small request must not pass a large one for ever.
            start = max(self.clock(), self._booked[-1].start if self._booked else 0.0)
            while not self._fits(start, tokens):
                start = self._booked[0].start + WINDOW
            booking = Booking(start, tokens)
            self._booked.append(booking)
            return booking

    def wait(self, booking: Booking) -> float:
        """Seconds until a booking's start; 0 once it is reached."""
        return max(0.0, booking.start - self.clock())

    def settle(self, booking: Booking, tokens: int) -> None:
        """Replace the estimate by what the endpoint counted."""
        with self._lock:
            booking.tokens = tokens

    def _fits(self, start: float, tokens: int) -> bool:
        while self._booked and self._booked[0].start + WINDOW <= start:
            self._booked.popleft()
        if not self._booked:
            return True
        few_enough = self.rpm is None or len(self._booked) < self.rpm
        return few_enough and (self.tpm is None or sum(b.tokens for b in self._booked) + tokens <= self.tpm)
