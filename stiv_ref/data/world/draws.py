"""Random numbers of one clip: a hash of words, by integer arithmetic alone, so that they are the same everywhere."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

ItemT = TypeVar("ItemT")
STATES = 64
"""Numbers of one clip; a clip takes fewer."""


class Draws:
    """Uniform numbers, one after the other, seeded by non-negative integers ``words``."""

    def __init__(self, *words: int) -> None:
        states = np.random.SeedSequence(words).generate_state(STATES, np.uint64)
        self._left = iter((states >> np.uint64(11)).tolist())

    def unit(self) -> float:
        """In [0, 1)."""
        return float(next(self._left) * 2.0**-53)

    def between(self, low: float, high: float) -> float:
        """Between ``low`` and ``high``; ``low`` if ``high`` is below."""
        return low + max(0.0, high - low) * self.unit()

    def below(self, count: int) -> int:
        """An integer in 0 .. ``count`` - 1."""
        return int(self.unit() * count)

    def choice(self, items: Sequence[ItemT]) -> ItemT:
        """One of ``items``."""
        return items[self.below(len(items))]
