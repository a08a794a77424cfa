"""Who is next: jobs by priority, deadline and age; sizes by turns, each for an equal share of the device's time."""

import math
from collections.abc import Collection, Hashable
from typing import Generic, TypeVar

from stiv_deploy.serving.store.jobs import Job

AGEING = 60.0
"""Seconds of waiting that count as much as one step of priority: nobody waits for ever."""
Lane = TypeVar("Lane", bound=Hashable)


def rank(job: Job, now: float) -> tuple[float, float, float]:
    """Sorts jobs, the most urgent first: by priority with age, then by deadline, then by when they came."""
    aged = job.priority + math.floor(max(0.0, now - job.created) / AGEING)
    return -aged, math.inf if job.due is None else job.due, job.created


class Turns(Generic[Lane]):
    """Deficit round robin: lanes take turns, and a turn ends when it has cost its share.

    What a piece of work costs is known when it is done: a lane goes on while it has credit left, and owes what it took
    too much. ``quantum`` is a turn's share in seconds.
    """

    def __init__(self, quantum: float) -> None:
        self._quantum = quantum
        self._credit: dict[Lane, float] = {}
        self._current: Lane | None = None

    def next(self, lanes: Collection[Lane]) -> Lane:
        """The one of ``lanes``, which have work, that is to work now; who has none loses its credit, and its debt."""
        self._credit = {lane: credit for lane, credit in self._credit.items() if lane in lanes}
        self._credit |= {lane: 0.0 for lane in lanes if lane not in self._credit}
        if self._current is not None and self._current in self._credit:
            if self._credit[self._current] > 0:
                return self._current
            self._to_the_end(self._current)
        self._pay_rounds()
        while True:
            lane = next(iter(self._credit))
            self._credit[lane] += self._quantum
            if self._credit[lane] > 0:
                self._current = lane
                return lane
            self._to_the_end(lane)

    def _to_the_end(self, lane: Lane) -> None:
        self._credit[lane] = self._credit.pop(lane)

    def _pay_rounds(self) -> None:
        """Whole rounds at once in which nobody would have paid its debt."""
        rounds = max(0, math.floor(-max(self._credit.values()) / self._quantum))
        self._credit = {lane: credit + rounds * self._quantum for lane, credit in self._credit.items()}

    def spend(self, lane: Lane, seconds: float) -> None:
        """``lane`` has worked for so long."""
        self._credit[lane] -= seconds
