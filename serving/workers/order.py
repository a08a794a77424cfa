"""Who is next: jobs by priority, deadline and length; sizes by turns, each for an equal share of the device's time."""

import math
from collections.abc import Callable, Collection, Hashable, Iterable
from typing import Generic, TypeVar

from stiv_deploy.serving.store.jobs import Job

AGEING = 60.0
"""Seconds of waiting that count as much as one step of priority: nobody waits for ever."""
STRETCH = 10.0
"""A job without a deadline is best done within so many times what it takes alone: short ones need not wait for long."""
Lane = TypeVar("Lane", bound=Hashable)
Urgency = tuple[float, float, float]
"""Sorts jobs, the most urgent first."""


class Order:
    """Which of the jobs that were seen is more urgent: by priority, by deadline, by when each is best done.

    That is told once, when a job is first seen: what it is thought to take may change, its place does not.
    """

    def __init__(self) -> None:
        self._best: dict[str, float] = {}

    def see(self, jobs: Iterable[Job], alone: Callable[[Job], float | None]) -> None:
        """These ``jobs`` are there now, and no others; ``alone`` tells the seconds that one takes, if it is known."""
        told = self._best
        self._best = {
            job.id: told[job.id] if job.id in told else job.created + STRETCH * (alone(job) or 0.0) for job in jobs
        }

    def urgency(self, job: Job) -> Urgency:
        """By its priority as it came: whom it may take the place of."""
        return -float(job.priority), math.inf if job.due is None else job.due, self._best[job.id]

    def rank(self, job: Job, now: float) -> Urgency:
        """By its priority with age: who is let in first."""
        priority, due, best = self.urgency(job)
        return priority - math.floor(max(0.0, now - job.created) / AGEING), due, best


def order_of(jobs: Iterable[Job], alone: Callable[[Job], float | None]) -> Order:
    """The order of ``jobs``, see :meth:`Order.see`."""
    order = Order()
    order.see(jobs, alone)
    return order


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
