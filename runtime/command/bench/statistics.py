"""Percentiles and ratios of measured times, with intervals that assume no distribution.

The interval of a percentile lies between two of the samples: of n independent ones, the number below the true
percentile is binomial (David and Nagaraja, Order Statistics, 3rd edition, section 7.1). The interval of a ratio is
Efron's percentile bootstrap, of blocks of samples where neighbours are alike (Kuensch, Ann. Statist. 17, 1989).
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.bundle.contract import Frozen

CONFIDENCE = 0.95
ROUNDS = 10_000
"""Resamples of a bootstrap."""
STUDENT = (
    12.706205,
    4.302653,
    3.182446,
    2.776445,
    2.570582,
    2.446912,
    2.364624,
    2.306004,
    2.262157,
    2.228139,
    2.200985,
)
"""Quantiles 97.5 % of Student's t for 1 to 11 degrees of freedom."""


class Estimate(Frozen):
    """A value, and the ends of its interval at :data:`CONFIDENCE`."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half of the interval, as a share of the value."""
        return (self.high - self.low) / 2 / self.value if self.value else math.inf


class Ranks(NamedTuple):
    """Order statistics, 1 the smallest, that an interval lies between."""

    low: int
    high: int


def nearest_rank(count: int, share: float) -> int:
    """The rank, from 1, of the percentile ``share`` (0 to 1) among ``count`` samples."""
    return min(count, max(1, math.ceil(round(share * count, 9))))


def _below(count: int, share: float) -> np.ndarray:
    """P(at most k of ``count`` samples lie below the percentile ``share``) for k from 0 to ``count``."""
    ks = range(count + 1)
    logs = [
        math.lgamma(count + 1)
        - math.lgamma(k + 1)
        - math.lgamma(count - k + 1)
        + k * math.log(share)
        + (count - k) * math.log1p(-share)
        for k in ks
    ]
    return np.cumsum(np.exp(logs))


def interval_ranks(count: int, share: float, confidence: float = CONFIDENCE) -> Ranks | None:
    """Between which samples the percentile ``share`` lies, at least half of the rest on either side; None: too few."""
    if count < 1:
        return None
    tail, below = (1 - confidence) / 2, _below(count, share)
    lows = [rank for rank in range(1, count + 1) if below[rank - 1] <= tail]
    highs = [rank for rank in range(1, count + 1) if 1 - below[rank - 1] <= tail]
    return Ranks(lows[-1], highs[0]) if lows and highs else None


def least_samples(share: float, confidence: float = CONFIDENCE) -> int:
    """How few samples still give the percentile ``share`` an interval: the extremes must lie outside."""
    tail = (1 - confidence) / 2
    return math.ceil(round(math.log(tail) / math.log(max(share, 1 - share)), 9))


def percentile(samples: Sequence[float], share: float, confidence: float = CONFIDENCE) -> Estimate | None:
    """The percentile ``share`` of ``samples`` by nearest rank, with its interval; None if they are too few for one."""
    ranks = interval_ranks(len(samples), share, confidence)
    if ranks is None:
        return None
    ordered = sorted(samples)
    value = ordered[nearest_rank(len(ordered), share) - 1]
    return Estimate(value=value, low=ordered[ranks.low - 1], high=ordered[ranks.high - 1])


def ratio(
    ours: Sequence[float], base: Sequence[float], share: float = 0.5, confidence: float = CONFIDENCE, seed: int = 0
) -> Estimate:
    """The percentile ``share`` of ``ours`` over that of ``base``, each in the order in which it was measured."""
    random = np.random.default_rng(seed)
    drawn = _resampled(np.asarray(ours), share, random) / _resampled(np.asarray(base), share, random)
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = _percentiles(np.asarray(ours)[None], share)[0] / _percentiles(np.asarray(base)[None], share)[0]
    return Estimate(value=float(value), low=float(min(low, value)), high=float(max(high, value)))


def ratio_of_turns(ours: Sequence[float], base: Sequence[float]) -> float:
    """The median over turns of the seconds of ``ours`` over those of ``base`` in the same turn.

    What slows the machine for minutes is in both.
    """
    return statistics.median(one / other for one, other in zip(ours, base, strict=True))


def mean_of_rounds(ratios: Sequence[float]) -> Estimate | None:
    """The geometric mean of the ``ratios`` of 2 to 12 rounds, each of new processes; None of one round.

    Where a process lies in memory makes it faster or slower by a percent for as long as it lives, however often it is
    asked; so the interval is over rounds, by Student's t of the logarithms (Kalibera and Jones, ISMM 2013).
    """
    logs = [math.log(each) for each in ratios]
    if len(logs) < 2:  # noqa: PLR2004
        return None
    middle = statistics.fmean(logs)
    half = STUDENT[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    return Estimate(value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half))


def block_length(samples: np.ndarray) -> int:
    """So many ``samples`` in a row tell as much as one: 1 where they are independent, at most a quarter of all.

    1 and twice each correlation at 1, 2 and more samples' distance, up to the first that independent ones may have.
    """
    count, centred = len(samples), samples - samples.mean()
    power, length = float(centred @ centred), 1.0
    for distance in range(1, count // 4 + 1):
        correlation = float(centred[:-distance] @ centred[distance:]) / power if power else 0.0
        if correlation <= 2 / math.sqrt(count):
            break
        length += 2 * correlation
    return max(1, min(math.ceil(length), count // 4))


def _resampled(samples: np.ndarray, share: float, random: np.random.Generator) -> np.ndarray:
    """The percentile ``share`` of resamples, made of blocks of samples in a row, the first behind the last."""
    count, length = len(samples), block_length(samples)
    starts = random.integers(0, count, (ROUNDS, -(-count // length)))
    index = (starts[:, :, None] + np.arange(length)).reshape(ROUNDS, -1)[:, :count] % count
    return _percentiles(samples[index], share)


def _percentiles(rows: np.ndarray, share: float) -> np.ndarray:
    """The percentile of each row: the median as the mean of both middle samples, others by nearest rank."""
    if share == 0.5:
        return np.median(rows, axis=1)
    return np.sort(rows, axis=1)[:, nearest_rank(rows.shape[1], share) - 1]
