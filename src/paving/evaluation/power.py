"""What a bucket of n prompts can show at all, before anybody reads a difference into it or out of it.

All powers are exact sums over binomial outcomes, for the tests that the tables use, and count a detection only where
the test points the right way. They take prompts for independent; prompts that share a group show somewhat less.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy import optimize, stats

from paving.evaluation.results import Record
from paving.prompts.types import Bucket

ALPHA = 0.05  # two-sided
POWER = 0.8
EFFECT = 0.10  # the drift that a sentence says the needed number of prompts for
MOST = 100_000  # prompts; a drift that needs more is out of reach
NOUNS = {
    Bucket.EDIT: ("edit prompt", "edit prompts"),
    Bucket.BENIGN_KEEP: ("benign keep", "benign keeps"),
    Bucket.HARMFUL_KEEP: ("harmful keep", "harmful keeps"),
}


class BucketPower(Record):
    """The least change of a rate that n prompts show with the given power; changes are fractions.

    drift        between two rows on the same prompts (McNemar's exact test); None where n prompts show none
    from_base    a fall from a rate known beforehand (exact binomial test), for that `base`; None without one, or where
                 n prompts show none
    counter      assumed for `drift`: the share of prompts that change the other way
    least        the fewest prompts on which a change of all of them is significant
    needed       the fewest prompts that show a drift of `effect`; None where more than 100 000
    """

    n: int
    alpha: float
    power: float
    counter: float
    base: float | None
    drift: float | None
    from_base: float | None
    least: int
    effect: float
    needed: int | None


def bucket_power(
    n: int,
    *,
    counter: float = 0.0,
    base: float | None = None,
    effect: float = EFFECT,
    alpha: float = ALPHA,
    power: float = POWER,
) -> BucketPower:
    """Everything this file knows about a bucket of n prompts. raises ValueError for a number out of its range."""
    return BucketPower(
        n=n,
        alpha=alpha,
        power=power,
        counter=counter,
        base=base,
        drift=detectable_drift(n, counter=counter, alpha=alpha, power=power),
        from_base=None if base is None else detectable_fall(n, base, alpha=alpha, power=power),
        least=least_discordant(alpha),
        effect=effect,
        needed=needed_for_drift(effect, counter=counter, alpha=alpha, power=power),
    )


def sentence(bucket: Bucket, found: BucketPower) -> str:
    """What a reader of the table should know about this bucket, in plain words; percentage points rounded up."""
    one, many = NOUNS[bucket]
    missed = f"{100 * (1 - found.power):.0f} %"
    other_way = f"{100 * found.counter:g} % of answers changing the other way"
    needed = f"more than {MOST}" if found.needed is None else str(found.needed)
    wanted = f"A drift of {_points(found.effect)} would take {needed}."
    if found.n == 0:
        return f"There are no {many} (n=0): nothing can be said about them. {wanted}"
    if found.n < found.least:
        return (
            f"{found.n} {one if found.n == 1 else many} can show nothing: even if every answer changed, chance could "
            f"explain it (exact test, level {found.alpha:g}). {found.least} could rule that out. {wanted}"
        )
    if found.drift is None:
        return (
            f"{found.n} {many} show no drift reliably, however large: with {other_way}, any would be missed more than "
            f"{missed} of the time. {wanted}"
        )
    assumed = f" with {other_way}" if found.counter else ""
    shown = f"{found.n} {many} can show a drift of {_points(found.drift)} or more{assumed}; "
    shown += f"a smaller one would be missed more than {missed} of the time."
    return shown if found.drift <= found.effect else f"{shown} {wanted}"


def detectable_drift(n: int, *, counter: float = 0.0, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Least difference of two paired rates that McNemar's exact test finds on n prompts with this power, or None.

    counter: share of prompts whose answer changes against the drift, so that drift + 2 counter of them disagree. 0, all
             changes one way, is the most favourable case; a judge that errs at random makes it larger
    """
    _require(n=n, counter=counter, alpha=alpha, power=power)
    largest = 1 - 2 * counter
    if drift_power(n, largest, counter=counter, alpha=alpha) < power:
        return None
    # Rises with the drift: a prompt more that changes the right way never turns a detection into a miss.
    return float(optimize.brentq(lambda x: drift_power(n, x, counter=counter, alpha=alpha) - power, 0.0, largest))


def needed_for_drift(drift: float, *, counter: float = 0.0, alpha: float = ALPHA, power: float = POWER) -> int | None:
    """Fewest prompts with this power for a paired drift; None where more than 100 000.

    Exact, but with counter > 0 the power of a discrete test goes up and down a little as n grows, so a few prompts more
    can have slightly less of it.
    """
    _require(n=0, counter=counter, alpha=alpha, power=power)
    if not 0 < drift <= 1 - 2 * counter:
        raise ValueError(f"drift={drift} with counter={counter}: it must be above 0 and at most 1 - 2 counter.")
    enough = 1
    while drift_power(enough, drift, counter=counter, alpha=alpha) < power:
        if enough == MOST:
            return None
        enough = min(2 * enough, MOST)
    too_few = enough // 2
    while enough - too_few > 1:
        middle = (enough + too_few) // 2
        if drift_power(middle, drift, counter=counter, alpha=alpha) < power:
            too_few = middle
        else:
            enough = middle
    return enough


def drift_power(n: int, drift: float, *, counter: float = 0.0, alpha: float = ALPHA) -> float:
    """Chance that McNemar's exact test is significant in the right direction, over all outcomes of n prompts.

    Of n prompts a share of drift + counter changes one way and counter the other. S. Duffy, Asymptotic and exact power
    for the McNemar test and its analogue with R controls per case, Biometrics 40 (1984) 1005-1015.
    """
    disagreeing = drift + 2 * counter
    if drift < 0 or disagreeing > 1 + 1e-9:
        raise ValueError(f"drift={drift} with counter={counter}: it must be 0 or above, and at most 1 - 2 counter.")
    if n == 0 or disagreeing <= 0:
        return 0.0
    pairs = np.arange(n + 1)
    chance = stats.binom.pmf(pairs, n, min(disagreeing, 1.0))
    found = stats.binom.sf(critical_counts(n, alpha) - 1, pairs, min((drift + counter) / disagreeing, 1.0))
    return float(chance @ found)


def critical_counts(n: int, alpha: float = ALPHA) -> np.ndarray:
    """(n + 1,) int: of m = 0..n discordant pairs, how many must go one way for McNemar's exact test to be significant.

    m + 1 where even all of them are not enough.
    """
    return stats.binom.isf(alpha / 2, np.arange(n + 1), 0.5).astype(np.int64) + 1


def least_discordant(alpha: float = ALPHA) -> int:
    """Fewest discordant pairs, all one way, that are significant; 6 at 0.05."""
    return next(m for m in itertools.count(1) if 2 * 0.5**m <= alpha)


def detectable_fall(n: int, base: float, *, alpha: float = ALPHA, power: float = POWER) -> float | None:
    """Least fall below a rate known beforehand that an exact binomial test of n prompts finds with this power, or None.

    base: the known rate, not one estimated from as few prompts: for two rows on the same prompts use `detectable_drift`.
          For a rise ask for the fall of the opposite, 1 - base.
    The test is two-sided with alpha / 2 on each side (Clopper and Pearson). Exact, so it goes up and down a little as
    n grows.
    """
    _require(n=n, counter=0.0, alpha=alpha, power=power)
    if not 0 <= base <= 1:
        raise ValueError(f"base={base} is no rate: give a fraction from 0 to 1.")
    if n == 0:
        return None
    critical = int(stats.binom.ppf(alpha / 2, n, base))
    if stats.binom.cdf(critical, n, base) > alpha / 2:
        critical -= 1
    if critical < 0:
        return None
    # P(at most `critical` of n | rate) = power, solved for the rate: a quantile of the beta distribution.
    return base - float(stats.beta.ppf(1 - power, critical + 1, n - critical))


def _require(*, n: int, counter: float, alpha: float, power: float) -> None:
    if n < 0:
        raise ValueError(f"n={n} prompts: a bucket has 0 or more.")
    if not 0 <= counter < 0.5:
        raise ValueError(f"counter={counter}: the share that changes against the drift is from 0 to below 0.5.")
    if not 0 < alpha < power < 1:
        raise ValueError(f"alpha={alpha} and power={power}: both lie between 0 and 1, and power above alpha.")


def _points(fraction: float) -> str:
    """0.171 -> "18 pp": up, so that the claim holds; the small number keeps 0.1 from becoming 11."""
    return f"{math.ceil(100 * fraction - 1e-6)} pp"
