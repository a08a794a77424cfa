"""Seconds of a generation by phase."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stiv_deploy.runtime.sampling.hooks import Mark, unmarked

PHASES = ("load", "text", "encode", "denoise", "decode")


class PhaseClock:
    """Adds up the seconds of each phase until the device is done with it, in ``seconds``.

    Each is a range of ``mark``.
    """

    def __init__(self, synchronize: Callable[[], None], mark: Mark = unmarked) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._start = time.perf_counter()
        self._synchronize = synchronize
        self._mark = mark

    @property
    def total(self) -> float:
        """Seconds since this was made."""
        return time.perf_counter() - self._start

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the block to ``phase``."""
        start = time.perf_counter()
        with self._mark(phase):
            yield
            self._synchronize()
        self.seconds[phase] += time.perf_counter() - start
