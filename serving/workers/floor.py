"""What the schedulers of one process share: whose the devices are, what calls have taken, and which form pays.

Each scheduler has a device of its own. The first one leads: it may have all of them, for a clip that they make
together, and then the others stand still between two of their steps.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from threading import Condition
from typing import NamedTuple

from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.serving.costs import Costs, Fits
from stiv_deploy.serving.store.jobs import Job, Measured, Size
from stiv_deploy.serving.workers.order import order_of
from stiv_deploy.serving.workers.split import MOST, Prospect, together_pays

STANDING = 0.02
"""Seconds that a scheduler waits for its device before it looks around."""
SMOOTH = 0.2
"""Weight of the newest time in a mean of times."""


class There(NamedTuple):
    """Clips of a scheduler, as far as they are: those that run on its own device, and those that have paused."""

    running: list[Job]
    paused: list[Job]


def names_of(name: str, devices: int) -> tuple[str, ...]:
    """Names of the schedulers of the worker ``name``, one for each device; the first has its name."""
    return (name, *(f"{name}.{place}" for place in range(1, devices)))


class Floor:
    """The devices of the schedulers ``names``; with a ``team`` they make clips of sizes that ``fits`` together, too."""

    def __init__(
        self,
        names: Sequence[str] = ("",),
        team: Team | None = None,
        fits: Fits = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names, self.team = tuple(names), team
        self._fits, self._clock = cache(fits), clock
        self._unfit: set[Size] = set()
        self._free = Condition()
        self._busy: set[int] = set()
        self._since: float | None = None
        self._rested = 0.0
        self._seconds: dict[tuple[Size, int, int], float] = {}
        self.wanted: str | None = None
        """The job that another than the leader has found to be the next for all devices."""
        self.there: dict[int, Callable[[], There]] = {}
        """What tells which clips a scheduler has, by its rank."""

    @property
    def devices(self) -> int:
        """How many make a clip together, as much as it lets them."""
        return len(self.names)

    @property
    def held(self) -> bool:
        """Whether all devices are the leader's."""
        return self._since is not None

    @contextmanager
    def device(self, place: int) -> Iterator[bool]:
        """Have the device of rank ``place`` for a piece of work, unless all are the leader's; whether one has it."""
        with self._free:
            mine = place == 0 or self._free.wait_for(lambda: not self.held, STANDING)
            if mine:
                self._busy.add(place)
        try:
            yield mine
        finally:
            with self._free:
                self._busy.discard(place)
                self._free.notify_all()

    @contextmanager
    def own(self, place: int) -> Iterator[None]:
        """Have the device of rank ``place``, however long that takes."""
        while True:
            with self.device(place) as mine:
                if mine:
                    yield
                    return

    def take(self) -> None:
        """Give the leader all devices, as soon as the others are between two pieces of work."""
        with self._free:
            self._since = self._clock() if self._since is None else self._since
            self._free.wait_for(lambda: not self._busy - {0})
            self.wanted = None

    def give_back(self) -> None:
        """Give each its own again, and as much time as all were the leader's; nothing if they were not."""
        with self._free:
            if self._since is not None:
                now = self._clock()
                self._rested, self._since = 2 * now - self._since, None
            self._free.notify_all()

    def measure(self, size: Size, rows: int, seconds: float, devices: int = 1) -> None:
        """One more time of a call over ``rows`` rows, or of decoding (0)."""
        mean = self._seconds.get((size, rows, devices), seconds)
        self._seconds[size, rows, devices] = mean + SMOOTH * (seconds - mean)

    def measured(self) -> list[Measured]:
        """Means of all times."""
        return [Measured(size, rows, seconds, by) for (size, rows, by), seconds in self._seconds.copy().items()]

    def costs(self) -> Costs:
        """What clips take, by these."""
        return Costs(self.measured(), self.devices, self._able)

    def _able(self, size: Size) -> bool:
        return size not in self._unfit and self._fits(size)

    def refuse(self, size: Size) -> None:
        """Clips of ``size`` cannot be made together here, as has turned out."""
        self._unfit.add(size)

    def left_to_others(self, place: int, size: Size) -> bool:
        """Whether a clip of ``size`` is another's than that of rank ``place``: one has fewer, and of no other size."""
        if self.devices == 1:
            return False
        own = len(self.there[place]().running)
        others = [there().running for other, there in self.there.items() if other != place]
        return any(len(jobs) < own and all(job.size == size for job in jobs) for jobs in others)

    def chosen(self, waiting: Sequence[Job], now: float) -> str | None:
        """The job that all devices are to make together next: the most urgent one that waits, if that pays.

        It is of ``waiting``, or has paused; all schedulers that ask are told the same. One that has paused with another
        than the leader goes on there.
        """
        if self.team is None:
            return None
        there = {place: tell() for place, tell in self.there.items()}
        paused = {job.id: place for place, each in there.items() for job in each.paused}
        line = [*waiting, *(job for each in there.values() for job in each.paused)]
        costs = self.costs()
        order = order_of(line, costs.alone)
        line = sorted(line, key=lambda job: order.rank(job, now))[:MOST]
        if not line or paused.get(line[0].id, 0):
            return None
        first = line[0]
        clips = [_prospect(costs, job, now, place) for place, each in there.items() for job in each.running]
        clips += [_prospect(costs, job, now, None) for job in line]
        known = [clip for clip in clips if clip is not None]
        if len(known) < len(clips) or costs.together(first) is None:
            return None
        rested = self._clock() >= self._rested
        return first.id if together_pays(known, self.devices, costs.width(first), rested=rested) else None


def _prospect(costs: Costs, job: Job, now: float, device: int | None) -> Prospect | None:
    alone, shared = costs.alone(job), costs.shared(job)
    if alone is None or shared is None:
        return None
    due = None if job.due is None else job.due - now
    decode = costs.decode(job.size)
    return Prospect(alone=alone, shared=shared, together=costs.together(job), decode=decode, due=due, device=device)
