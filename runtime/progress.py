"""How a stage tells what it is doing."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many pieces of work are done, and how many there are."""


def unheard(_what: str, _done: int, _total: int) -> None:
    """Progress that nobody looks at."""


FIRST_LINE, LONGEST_PAUSE = 10.0, 60.0
"""Seconds before the first line of :class:`Lines`, and between two at most."""


class Lines:
    """Progress of ``stage`` as lines on standard error, for logs: none in a short run, ever fewer in a long one."""

    def __init__(self, stage: str) -> None:
        self._stage, self._pause = stage, FIRST_LINE
        self._started: float | None = None
        self._due = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        """Write a line if the last one, or the first news, is long enough ago."""
        now = time.monotonic()
        if self._started is None:
            self._started, self._due = now, now + self._pause
        if now < self._due:
            return
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._due = now + self._pause
        sys.stderr.write(f"{self._stage} {done}/{total} after {now - self._started:.0f} s {what}".rstrip() + "\n")
        sys.stderr.flush()
