"""What a service has counted and timed: by whichever process, added up in the store, and kept when processes end."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from threading import Lock
from typing import NamedTuple

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0)
"""Seconds up to which times are counted together."""
PARTS = (*(f"{bound:g}" for bound in BOUNDS), "+Inf")
COUNT, SUM = "count", "sum"
REQUESTS, HITS, TAKEN_BACK = "requests", "result_cache_hits", "taken_back"
"""Metrics that the store itself counts, in the transaction that makes them so."""


class Key(NamedTuple):
    """What a number is of: a ``metric``, one of its labels, and which ``part``: of times, one of ``PARTS`` or a sum."""

    metric: str
    label: str = ""
    part: str = COUNT


class Tallies:
    """Counts and times since they were last taken; for threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: Counter[Key] = Counter()

    def count(self, metric: str, label: str = "", amount: float = 1) -> None:
        """``amount`` more of ``metric``."""
        with self._lock:
            self._found[Key(metric, label)] += amount  # type: ignore[assignment]  # a Counter adds floats too

    def time(self, metric: str, seconds: float, label: str = "") -> None:
        """One more time of ``metric``."""
        with self._lock:
            self._found[Key(metric, label, PARTS[bisect_left(BOUNDS, seconds)])] += 1
            self._found[Key(metric, label, SUM)] += seconds  # type: ignore[assignment]

    def take(self) -> Mapping[Key, float]:
        """All of them; they begin again at nothing."""
        with self._lock:
            found, self._found = self._found, Counter()
        return found
