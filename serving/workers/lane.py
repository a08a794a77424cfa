"""Clips of one size in one engine: who is in, who has to wait, and what a tick brings."""

from collections.abc import Callable, Iterator

import numpy as np

from stiv_deploy.runtime.sampling.engine import StepEngine, Tick
from stiv_deploy.serving.store.jobs import Job, Size
from stiv_deploy.serving.workers.clips import Clip
from stiv_deploy.serving.workers.order import Urgency


class Lane:
    """An ``engine`` for clips of ``size``, of which as many run at once as have at most ``rows`` rows together.

    Its calls of the model are shared by so many ``devices``.
    """

    def __init__(self, size: Size, engine: StepEngine, rows: int, devices: int = 1) -> None:
        self.size, self._engine, self._rows, self.devices = size, engine, rows, devices
        self._running: dict[int, Clip] = {}
        self.paused: list[Clip] = []
        self.closing = False
        """Whether it lets in no more new clips, so that another size has its turn."""

    @property
    def running(self) -> list[Clip]:
        """Clips in the engine."""
        return list(self._running.values())

    @property
    def empty(self) -> bool:
        """Whether nobody is in, nor waits to go on."""
        return not (self._running or self.paused)

    @property
    def rung(self) -> int:
        """Rows of the next call."""
        return self._engine.rung

    @property
    def used_rows(self) -> int:
        """Rows of it that are some clip's."""
        return self._engine.used_rows

    def room(self, rows: int) -> bool:
        """Whether a clip of so many rows may come in now; one always may."""
        used = self._engine.reserved_rows
        return not self._running or (len(self._running) < self._engine.slots and used + rows <= self._rows)

    def admit(self, clip: Clip) -> None:
        """Let ``clip`` begin, or go on; there must be room."""
        self._running[self._engine.admit(clip.sample, clip.pause)] = clip
        clip.pause = None

    def tick(self) -> tuple[list[Clip], Tick]:
        """One evaluation of all; the clips that completed a step, and the tick by slot, see :meth:`leave`."""
        tick = self._engine.tick()
        moved = [self._running[slot] for slot in tick.moved]
        for clip in moved:
            clip.step += 1
        return moved, tick

    def leave(self, slot: int) -> Clip:
        """Take note that the engine has let go of ``slot``."""
        return self._running.pop(slot)

    def last(self, urgency: Callable[[Job], Urgency]) -> Clip | None:
        """The clip to pause first, the least urgent of those between two steps; ``None`` if none is."""
        found = [clip for slot, clip in self._running.items() if self._engine.between_steps(slot)]
        return max(found, key=lambda clip: urgency(clip.job), default=None)

    def between_steps(self) -> bool:
        """Whether all clips are between two steps."""
        return all(self._engine.between_steps(slot) for slot in self._running)

    def keep(self, clip: Clip) -> None:
        """Note in ``clip`` where it is, if it is between two steps; it runs on."""
        slot = self._slot(clip)
        if self._engine.between_steps(slot):
            clip.pause = self._engine.pause(slot)

    def estimate(self, clip: Clip) -> np.ndarray | None:
        """What ``clip`` looks like becoming, see :meth:`StepEngine.estimate`."""
        return self._engine.estimate(self._slot(clip)) if clip in self.running else None

    def pause(self, clip: Clip) -> None:
        """Take ``clip`` out, to go on later; it must be between two steps."""
        self.keep(clip)
        self._evict(clip)
        self.paused.append(clip)

    def drop(self, clip: Clip) -> None:
        """Give up ``clip``, running or paused."""
        if clip in self.paused:
            self.paused.remove(clip)
        else:
            self._evict(clip)

    def __iter__(self) -> Iterator[Clip]:
        yield from (*self.running, *self.paused)

    def _slot(self, clip: Clip) -> int:
        return next(slot for slot, each in self._running.items() if each is clip)

    def _evict(self, clip: Clip) -> None:
        slot = self._slot(clip)
        self._engine.evict(slot)
        del self._running[slot]
