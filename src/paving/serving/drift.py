"""A drift watch: whether the prompts that are served are still like those which the gate was calibrated on.

What calibration promises is about prompts like its own. No label comes with a served prompt, so what is watched is where it
lies: the size of its standardised boundary feature, which the router reads, against that of calibration prompts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from scipy.stats import betabinom

LEVEL, ALARM, WINDOW = 0.05, 1e-6, 1000
LEAST = 30  # prompts before any alarm: a handful may be one user's


class Drift:
    """The last `window` prompts beside calibration's. A prompt is far where fewer than `level` of calibration's lie as far.

    If served prompts were drawn like calibration's n, the number of far ones among N would be beta-binomial
    (N, k, n + 1 − k) with k = ⌊level · (n + 1)⌋: the calibration's own chance is in it. `drifted` where a number as high has
    a probability under `alarm`, and at least thirty were seen; it is looked at with every prompt, hence so low. Prompts
    are taken for drawn one by one: a repeated one is not to be handed in again.

    raises ValueError where calibration has too few prompts for any to count as far
    """

    def __init__(self, calibration: Sequence[float], *, window: int = WINDOW, level: float = LEVEL, alarm: float = ALARM):
        n = len(calibration)
        self._k = math.floor(level * (n + 1) + 1e-9)
        if self._k < 1:
            raise ValueError(
                f"{n} calibration prompts cannot show which {level:.0%} lie farthest; it takes {math.ceil(1 / level) - 1}."
            )
        self._beyond = sorted(calibration)[n - self._k]
        self._rest = n + 1 - self._k
        self._alarm = alarm
        self._seen: deque[bool] = deque(maxlen=window)
        self.far = 0

    @property
    def n(self) -> int:
        return len(self._seen)

    def seen(self, boundary: float) -> bool:
        """Takes one served prompt in; whether it is far."""
        if self.n == self._seen.maxlen:
            self.far -= self._seen[0]
        is_far = not boundary < self._beyond  # what is not finite is far
        self._seen.append(is_far)
        self.far += is_far
        return is_far

    @property
    def chance(self) -> float:
        """Of as many far prompts, or more, if nothing had changed."""
        return float(betabinom.sf(self.far - 1, self.n, self._k, self._rest)) if self.n else 1.0

    @property
    def drifted(self) -> bool:
        return self.n >= LEAST and self.chance < self._alarm
