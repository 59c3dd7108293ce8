"""How many times as long: a ratio of two medians with its 95% interval, and the word for it. No torch here."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

Verdict = Literal["FASTER", "SLOWER", "SAME", "UNSURE"]
# What a ratio's interval was made from, as people are told it.
Basis = Literal["rounds", "samples", "intervals", "medians"]

# All of their ratios, from the smallest to the largest, then hold the median with 97%; of five it is 94%.
FEWEST_ROUNDS = 6
_RESAMPLES = 1000
_LEVEL = (2.5, 97.5)
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Ratio:
    """The time after over the time before: 1.1 takes 10% longer. `low` and `high` are None where nothing was recorded
    that an interval could be made from (basis "medians").
    """

    value: float
    low: float | None
    high: float | None
    basis: Basis

    def verdict(self, margin: float) -> Verdict:
        """SAME: the whole interval is nearer to 1 than `margin` (0.02: 2%). FASTER, SLOWER: it is not, and lies on one
        side of 1. UNSURE: it holds 1, and more than the margin beside it.
        """
        if self.low is None or self.high is None:
            return "UNSURE"
        if self.low >= 1 / (1 + margin) and self.high <= 1 + margin:
            return "SAME"
        return "SLOWER" if self.low > 1 else "FASTER" if self.high < 1 else "UNSURE"

    def is_above(self, limit: float) -> bool:
        """Whether all of the interval says that it takes longer by more than `limit` (0.05: 5%)."""
        return self.low is not None and self.low > 1 + limit


@dataclass(frozen=True)
class Times:
    """One side: the median in seconds, and what its record keeps of the samples behind it."""

    median: float
    samples: Sequence[float] = ()
    interval: tuple[float, float] | None = None


def ratio(before: Times, after: Times) -> Ratio:
    """The ratio of two medians that were measured apart from one another.

    Its interval is a bootstrap: of the samples where a side has two or more, else of medians drawn from its recorded
    95% interval. Deterministic: drawn from a fixed seed.
    """
    value = after.median / before.median
    random = np.random.default_rng(0)
    drawn = [_medians(side, random) for side in (before, after)]
    if drawn[0] is None or drawn[1] is None:
        return Ratio(value, None, None, "medians")
    low, high = np.percentile(drawn[1] / drawn[0], _LEVEL)
    both = all(len(side.samples) > 1 for side in (before, after))
    return Ratio(value, float(low), float(high), "samples" if both else "intervals")


def ratio_of_rounds(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Ratio:
    """The ratio of two sides that were measured in turn, a few samples of each a round.

    The median of the rounds' own ratios: what slows a round down, slows both of its sides, and cancels. Samples of a
    round share its luck, so that a round counts as one observation. The interval lies between two of the rounds' ratios
    and holds the median with at least 95% whatever their distribution; of so few, a bootstrap holds it less often than
    it says (87% of the time for seven rounds, by simulation).

    Raises:
        ValueError: fewer than `FEWEST_ROUNDS` rounds, or not as many on one side as on the other.
    """
    if len(before) != len(after) or len(before) < FEWEST_ROUNDS:
        raise ValueError(
            f"expected as many rounds of both sides, and {FEWEST_ROUNDS} at least, got {len(before)} and {len(after)}"
        )
    found = sorted(np.median(b) / np.median(a) for a, b in zip(before, after, strict=True))
    cut = _outside(len(found))
    return Ratio(float(np.median(found)), float(found[cut]), float(found[-1 - cut]), "rounds")


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95% bootstrap interval of the median of a row of samples, in the order that they were measured in."""
    low, high = np.percentile(np.median(_resampled(np.asarray(samples), np.random.default_rng(0)), axis=1), _LEVEL)
    return float(low), float(high)


def _outside(count: int) -> int:
    """How many of the smallest of `count` observations, and of the largest, may be left out of an interval that still
    holds the median with 95%: fewer than that lie on one side of it with a probability of 2.5% at most.
    """
    ways, cut = 1, 0  # of 2**count, those with at most `cut` on one side
    while 40 * (ways + math.comb(count, cut + 1)) <= 2**count:
        cut += 1
        ways += math.comb(count, cut)
    return cut


def _medians(side: Times, random: np.random.Generator) -> np.ndarray | None:
    """What the median might as well have been, many times."""
    if len(side.samples) > 1:
        return np.median(_resampled(np.asarray(side.samples), random), axis=1)
    if side.interval is not None and 0 < side.interval[0] < side.interval[1]:
        low, high = (np.log(end) for end in side.interval)
        middle = np.log(side.median)
        # An interval need not be symmetric about its median: each half has its own width.
        noise = random.standard_normal(_RESAMPLES) / _NORMAL_95
        return np.exp(middle + np.where(noise < 0, noise * max(middle - low, 0.0), noise * max(high - middle, 0.0)))
    return None


def _resampled(samples: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Bootstrap samples, [resamples, samples], in blocks of neighbours: on a busy machine slow calls come in spells,
    and samples drawn one by one would promise more than was measured.
    """
    length = round(samples.size ** (1 / 3))
    starts = random.integers(0, samples.size, (_RESAMPLES, -(-samples.size // length), 1))
    picks = (starts + np.arange(length)).reshape(_RESAMPLES, -1)[:, : samples.size]
    return samples[picks % samples.size]
