"""What jobs cost, in seconds of a device, from times that workers measured: for waits, admission and batches."""

from collections.abc import Callable, Iterable, Mapping

from stiv_deploy.serving.store.jobs import Job, Measured, Size

WORTH = 1.9
"""A batch twice as large is worth it while it costs less than this many times as much."""
Fits = Callable[[Size], bool]
"""Whether devices can share clips of a size."""


class Costs:
    """Times that were measured; what was not is told from the nearest that was, in proportion to pixels and rows.

    With several ``devices`` these make clips of sizes that ``fits`` together, too.
    """

    def __init__(self, measured: Iterable[Measured] = (), devices: int = 1, fits: Fits = lambda _: True) -> None:
        self._devices, self._fits = devices, fits
        self._calls: dict[Size, dict[int, float]] = {}
        self._shares: dict[Size, dict[int, float]] = {}
        self._decodes: dict[Size, float] = {}
        for each in measured:
            if not each.rows:
                self._decodes[each.size] = each.seconds
            elif each.devices == 1:
                self._calls.setdefault(each.size, {})[each.rows] = each.seconds
            elif each.devices == devices:
                self._shares.setdefault(each.size, {})[each.rows] = each.seconds

    def call(self, size: Size, rows: int, *, together: bool = False) -> float | None:
        """Seconds of one call of the model over at least ``rows`` rows; ``None`` if nothing was measured."""
        calls = self._shares if together else self._calls
        near, factor = _nearest(calls, size)
        if near is None:
            return None
        known = calls[near]
        enough = [each for each in known if each >= rows]
        rung = min(enough) if enough else max(known)
        return known[rung] * factor * max(1.0, rows / rung)

    def decode(self, size: Size) -> float:
        """Seconds from latents to frames; 0 if nothing was measured."""
        near, factor = _nearest(self._decodes, size)
        return 0.0 if near is None else self._decodes[near] * factor

    def alone(self, job: Job) -> float | None:
        """Seconds that the rest of ``job`` takes if it runs by itself."""
        call = self.call(job.size, job.rows)
        return None if call is None else _left(job) * call + self.decode(job.size)

    def together(self, job: Job) -> float | None:
        """Seconds that all devices take for the rest of ``job``, but to decode it; ``None`` where they do not share.

        They share no clip that skips blocks.
        """
        shared = self._fits(job.size) and not job.skips
        call = self.call(job.size, job.rows, together=True) if shared else None
        return None if call is None else _left(job) * call

    def soonest(self, job: Job) -> float | None:
        """Seconds that the rest of ``job`` takes at the best: on one device by itself, or on all of them."""
        alone, together = self.alone(job), self.together(job)
        return alone if alone is None or together is None else min(alone, together + self.decode(job.size))

    def width(self, job: Job) -> int:
        """How many clips such as ``job`` a device makes at a time."""
        near, _ = _nearest(self._calls, job.size)
        return 1 if near is None else max(1, worthwhile_rows(self._calls[near]) // job.rows)

    def shared(self, job: Job) -> float | None:
        """Seconds of a device that the rest of ``job`` takes in a full batch."""
        near, factor = _nearest(self._calls, job.size)
        if near is None:
            return None
        row = min(seconds / rows for rows, seconds in self._calls[near].items())
        return _left(job) * job.rows * row * factor + self.decode(job.size)

    def backlog(self, jobs: Iterable[Job], workers: int) -> float | None:
        """Seconds until ``workers`` workers have made ``jobs``; ``None`` if nothing was measured."""
        costs = [self.shared(job) for job in jobs]
        known = [cost for cost in costs if cost is not None]
        return sum(known) / max(1, workers) if len(known) == len(costs) else None


def worthwhile_rows(seconds: Mapping[int, float]) -> int:
    """The most rows of a batch, from the ``seconds`` of a call by rows.

    More rows are taken as long as twice as many cost less than ``WORTH`` times as much. Clips that share a batch which
    is not worth it end no sooner, and most of them later, than one after another.
    """
    rungs = sorted(seconds)
    best = rungs[0]
    for rung in rungs[1:]:
        if seconds[rung] >= seconds[best] * WORTH ** ((rung / best) - 1):
            break
        best = rung
    return best


def _nearest(known: Mapping[Size, object], size: Size) -> tuple[Size | None, float]:
    """The size in ``known`` whose volume is nearest to that of ``size``, and how many times larger this is."""
    if not known:
        return None, 1.0
    near = min(known, key=lambda each: abs(each.volume - size.volume))
    return near, size.volume / near.volume


def _left(job: Job) -> float:
    """Evaluations that are not done."""
    return job.evaluations * (1 - job.step / job.steps)
