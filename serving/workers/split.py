"""Which form pays: the next clip on all devices together, or each clip on one of them; decided between two steps.

A pure function of times that were measured. Together a clip is done sooner, but its devices do less in all: what moves
between them takes time, and nobody shares its calls of the model. So it depends on who waits, and until when.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

MOST = 64
"""Clips that wait and need be looked at: those behind them are delayed as these are."""
PAYS = 0.9
"""A plan is better where it takes at most this part of the time: devices that share a clip have less for who comes."""


@dataclass(frozen=True, kw_only=True)
class Prospect:
    """What a clip takes from here on, in seconds.

    ``alone`` on a device of its own, ``shared`` of a device in a full batch, both with ``decode``, from latents to
    frames, which one device does; ``together`` of all devices without that, ``None`` where they cannot share it.
    ``due`` is so many seconds from now. ``device`` is the one that it runs on, ``None`` while it waits.
    """

    alone: float
    shared: float
    together: float | None = None
    decode: float = 0.0
    due: float | None = None
    device: int | None = None


class Outcome(NamedTuple):
    """How many deadlines are missed, and the sum of all seconds until a clip is done: the smaller, the better."""

    late: int
    seconds: float


def together_pays(clips: Sequence[Prospect], devices: int, width: int, *, rested: bool = True) -> bool:
    """Whether the first of ``clips`` that waits, the most urgent ones first, is to be made by all ``devices`` now.

    Plans are compared in which the first few that wait are made together, one after another, and all others then on
    one device each, up to ``width`` at a time: the best one misses the fewest deadlines, and of those takes the least
    time until each clip is done. Running clips stand still meanwhile, unless they have done so just now: ``rested`` is
    whether they have since had the devices for as long.
    """
    running = [clip for clip in clips if clip.device is not None]
    waiting = [clip for clip in clips if clip.device is None]
    if running and not rested:
        return False
    able = next((at for at, clip in enumerate(waiting) if clip.together is None), len(waiting))
    apart = plan(running, waiting, 0, devices, width)
    return any(_better(plan(running, waiting, first, devices, width), apart) for first in _counts(able))


def _better(one: Outcome, apart: Outcome) -> bool:
    return one.late < apart.late or (one.late == apart.late and one.seconds <= PAYS * apart.seconds)


def _counts(most: int) -> Iterator[int]:
    """1, 2, 4 and so on below ``most``, and that."""
    count = 1
    while count < most:
        yield count
        count *= 2
    if most:
        yield most


def plan(running: Sequence[Prospect], waiting: Sequence[Prospect], first: int, devices: int, width: int) -> Outcome:
    """What comes of it if the ``first`` of those that wait are made together, and then all others apart."""
    held, done = 0.0, []
    for clip in waiting[:first]:
        assert clip.together is not None
        held += clip.together
        done.append((clip, held + clip.decode))
    for queue in _dealt(running, waiting[first:], devices):
        done += _made(queue, width, held)
    late = sum(clip.due is not None and seconds > clip.due for clip, seconds in done)
    return Outcome(late, sum(seconds for _, seconds in done))


def _dealt(running: Sequence[Prospect], waiting: Sequence[Prospect], devices: int) -> list[list[Prospect]]:
    """The clips of each device: those that it runs, and of the others those that find it the least busy."""
    queues = [[clip for clip in running if clip.device == device] for device in range(devices)]
    loads = [sum(clip.shared for clip in queue) for queue in queues]
    for clip in waiting:
        device = loads.index(min(loads))
        queues[device].append(clip)
        loads[device] += clip.shared
    return queues


def _made(queue: Sequence[Prospect], width: int, now: float) -> Iterator[tuple[Prospect, float]]:
    """When a device that begins at ``now`` has made each of ``queue``: ``width`` at a time share it equally."""
    coming = iter(queue)
    there = [(clip.shared, now, clip) for clip in islice(coming, width)]
    while there:
        least = min(left for left, _, _ in there)
        now += least * len(there)
        done = [(since, clip) for left, since, clip in there if left <= least]
        yield from ((clip, max(now, since + clip.alone)) for since, clip in done)
        there = [(left - least, since, clip) for left, since, clip in there if left > least]
        there += [(clip.shared, now, clip) for clip in islice(coming, len(done))]
