"""Running statistics of one operand: largest magnitude by timestep band and channel, and a histogram of magnitudes.

Both are independent of the order in which values come, in every bit, so that a run that was stopped and resumed gives
the very same ranges. Nothing else of the activations is kept.
"""

from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor

BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Timestep bands [t_i, t_i+1): narrow at noise, where a caption decides; the last one includes 1."""
BANDS = len(BAND_EDGES) - 1
REQUEST = BANDS
"""Row of what runs once a request, outside the loop: the text projections."""
MANTISSA_BITS = 6
"""Histogram bins per octave are 2 ** MANTISSA_BITS: a bin is at most 1.6 % wide."""
ROWS = 4096
"""Rows that are binned at once, to bound the memory."""
SHIFT = 23 - MANTISSA_BITS
BINS = 255 << MANTISSA_BITS  # all finite fp32 magnitudes


def band_of(time: float) -> int:
    """Index of the band of ``time`` in [0, 1]."""
    return bisect_right(BAND_EDGES[1:-1], time)


def band_names() -> tuple[str, ...]:
    """Names of the rows of :attr:`Statistic.amax`."""
    edges = zip(BAND_EDGES, BAND_EDGES[1:], strict=False)
    return (*(f"{low:g}-{high:g}" for low, high in edges), "request")


@dataclass
class Clock:
    """The row that values are counted in at the moment."""

    row: int = REQUEST


@dataclass
class Statistic:
    """Statistics of one operand. ``amax`` fp32 [BANDS + 1, C] (empty before the first value), ``counts`` int64 [BINS].

    ``counts`` is empty unless ``histogram``: only percentile calibration needs it.
    """

    clock: Clock
    histogram: bool
    amax: Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __call__(self, values: Tensor) -> None:
        """Count ``values`` [..., C] in the clock's row."""
        rows = values.flatten(0, -2)
        low, high = rows.aminmax(dim=0)  # not of abs(): that would be one more copy of the activations
        if not self.amax.numel():
            self.amax = torch.zeros(BANDS + 1, rows.shape[1])
            self.counts = torch.zeros(BINS if self.histogram else 0, dtype=torch.int64)
        row = self.amax[self.clock.row]
        row.copy_(torch.maximum(row, torch.maximum(high, -low)))
        for part in rows.split(ROWS) if self.histogram else ():
            self.counts += bin_counts(part.float().abs())

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each channel over all timesteps, fp32 [C]."""
        return self.amax.amax(0)


def bin_counts(magnitudes: Tensor) -> Tensor:
    """Histogram int64 [BINS] of fp32 ``magnitudes``: bins are the numbers with the same exponent and leading bits."""
    bins = magnitudes.contiguous().view(torch.int32).flatten() >> SHIFT
    return torch.bincount(bins.clamp_max(BINS - 1), minlength=BINS)


def upper_edge(index: int) -> float:
    """The smallest magnitude above bin ``index``."""
    return float(torch.tensor((index + 1) << SHIFT, dtype=torch.int32).view(torch.float32))


def percentile(statistic: Statistic, percent: float) -> float:
    """A range that at least ``percent`` of all values lie in: the upper edge of a bin, at most the largest value."""
    cumulative = statistic.counts.cumsum(0)
    wanted = percent / 100 * int(cumulative[-1])
    index = int(torch.searchsorted(cumulative.double(), torch.tensor(wanted, dtype=torch.float64)))
    return min(upper_edge(min(index, BINS - 1)), float(statistic.amax.max()))


def share_beyond(statistic: Statistic, limit: float) -> float:
    """Share of values of larger magnitude than ``limit``, by bins: exact where ``limit`` is the edge of one."""
    if limit >= float(statistic.amax.max()):
        return 0.0
    first = int(torch.tensor(limit, dtype=torch.float32).view(torch.int32)) >> SHIFT
    return int(statistic.counts[first:].sum()) / int(statistic.counts.sum())
