"""How bytes get from one device to another: what every way of it is, and the one through the host's memory.

A rank binds each exchange once and calls it again and again; every rank that the moves name does so in the same order.
A buffer that others read from is written again after a later exchange with them at the earliest: so meeting once an
exchange is enough.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.errors import DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel.clock import ExchangeClock
from stiv_deploy.runtime.sampling.parallel.shards import Move, Moves, Place

STALL_SECONDS = 600.0
"""How long a device is waited for, at most."""
AGAIN = "run it again, or name fewer --devices"


class Part(NamedTuple):
    """One tensor of an exchange: all of its ``moves``, what this rank gives parts of, and what it gets, whole.

    ``source`` and ``target`` are None where it gives or gets nothing.
    """

    moves: Moves
    source: Buffer | None
    target: Buffer | None


class Transport(ABC):
    """The way between the devices of a placement, as one of them, ``rank``, has it."""

    def __init__(self, rank: int, backend: Backend) -> None:
        self.rank = rank
        self.backend = backend
        self.received = 0
        """Bytes that have come here from other devices, counted where they are copied."""
        self.clock = ExchangeClock()
        """Counts the seconds in exchanges, from when what this rank gives is computed."""

    @abstractmethod
    def bind(self, name: str, parts: Sequence[Part]) -> Call:
        """This rank's share in the exchange ``name`` of ``parts``, each the same for all but for the buffers.

        The call raises :class:`~stiv_deploy.runtime.errors.DeviceError` when another device has stopped.
        """

    @abstractmethod
    def forget(self, prefix: str) -> None:
        """Exchanges whose names begin with ``prefix`` will not be called again."""

    @abstractmethod
    def fail(self, error: StivError) -> None:
        """This rank stops for ``error``: let the others know, as far as this way can."""


Given = TypeVar("Given")


def given(moves: Iterable[Move], rank: int) -> list[Move]:
    """Those that ``rank`` is the source of."""
    return [move for move in moves if move.source == rank]


def taken(moves: Iterable[Move], rank: int) -> list[Move]:
    """Those that ``rank`` is the target of."""
    return [move for move in moves if move.target == rank]


def ranks_of(parts: Iterable[Part]) -> frozenset[int]:
    """All that take part in an exchange."""
    return frozenset(rank for part in parts for move in part.moves for rank in (move.source, move.target))


class HostBytes:
    """A buffer's bytes on the host: the buffer itself where the host can reach it, else a copy."""

    def __init__(self, backend: Backend, buffer: Buffer) -> None:
        self._backend = backend
        self._buffer = buffer.raw
        view = backend.host_view(self._buffer)
        self._direct = view is not None
        self.array = np.empty(buffer.nbytes, np.uint8) if view is None else view

    def fetch(self) -> None:
        """Bring the buffer here, after all work that is queued."""
        if not self._direct:
            self.array[...] = self._backend.read(self._buffer)

    def put(self) -> None:
        """Bring what is here into the buffer."""
        if not self._direct:
            self._backend.write(self._buffer, self.array)


def block(raw: np.ndarray, place: Place, move: Move) -> np.ndarray:
    """The bytes of ``move`` at ``place`` in ``raw``, uint8 [depth, height, width], as a view."""
    shape, strides = (move.depth, move.height, move.width), (place.plane, place.pitch, 1)
    last = place.start + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    assert 0 <= place.start <= last < len(raw)
    return np.lib.stride_tricks.as_strided(raw[place.start :], shape, strides)


class Meeting:
    """Where the threads of one process wait for each other, and learn that one has stopped."""

    def __init__(self, stall: float = STALL_SECONDS) -> None:
        self.error: StivError | None = None
        self._stall = stall
        self._lock = threading.Lock()
        self._barriers: dict[frozenset[int], threading.Barrier] = {}

    def meet(self, ranks: frozenset[int]) -> None:
        """Wait for all ``ranks``; :class:`DeviceError` where one of them has stopped or does not come."""
        with self._lock:
            barrier = self._barriers.setdefault(ranks, threading.Barrier(len(ranks)))
            if self.error is not None:
                barrier.abort()
        try:
            barrier.wait(self._stall)
        except threading.BrokenBarrierError:
            waited = f"a device has not answered for {self._stall:g} s; {AGAIN}"
            raise self.error or DeviceError(waited) from None

    def fail(self, error: StivError) -> None:
        """Let nobody wait any more; the first error is the one that all get."""
        with self._lock:
            self.error = self.error or error
            for barrier in self._barriers.values():
                barrier.abort()


class Hub(Meeting, Generic[Given]):
    """A meeting where each also finds what the others give: by exchange and rank."""

    def __init__(self, stall: float = STALL_SECONDS) -> None:
        super().__init__(stall)
        self.given: dict[tuple[str, int], Given] = {}

    def forget(self, prefix: str, rank: int) -> None:
        """Drop what ``rank`` gives in exchanges whose names begin with ``prefix``."""
        for name, whose in list(self.given):
            if whose == rank and name.startswith(prefix):
                self.given.pop((name, whose), None)


HostOffers = list[HostBytes | None]
"""What a rank gives in an exchange, by part."""


class HostTransport(Transport):
    """Threads of one process: each takes what it needs out of the others' memory, through the host's where need be."""

    def __init__(self, rank: int, backend: Backend, hub: Hub[HostOffers]) -> None:
        super().__init__(rank, backend)
        self._hub = hub

    def bind(self, name: str, parts: Sequence[Part]) -> Call:
        """As :meth:`Transport.bind` says."""
        own, goals = (
            [None if buffer is None else HostBytes(self.backend, buffer) for buffer in buffers]
            for buffers in ([part.source for part in parts], [part.target for part in parts])
        )
        self._hub.given[name, self.rank] = own
        mine = [taken(part.moves, self.rank) for part in parts]
        pulls = partial(self._pulls, name, mine, goals)
        fetched, put = ([each for each in ends if each is not None] for ends in (own, goals))
        return partial(self._run, ranks_of(parts), fetched, put, pulls, [])

    def _run(
        self,
        ranks: frozenset[int],
        own: list[HostBytes],
        goals: list[HostBytes],
        pulls: Callable[[], list[Call]],
        known: list[Call],
    ) -> None:
        self.backend.synchronize()
        with self.clock.exchange():
            for each in own:
                each.fetch()
            with self.clock.waiting():
                self._hub.meet(ranks)
            known += [] if known else pulls()  # by now the others have bound theirs
            for pull in known:
                pull()
            for each in goals:
                each.put()

    def _pulls(self, name: str, mine: list[list[Move]], goals: list[HostBytes | None]) -> list[Call]:
        """The copies of an exchange, from where the others' bytes lie."""
        found: list[Call] = []
        for index, (moves, goal) in enumerate(zip(mine, goals, strict=True)):
            for move in moves:
                origin = self._hub.given[name, move.source][index]
                assert origin is not None
                assert goal is not None
                ends = block(origin.array, move.origin, move), block(goal.array, move.goal, move)
                found.append(partial(self._pull, *ends, move.source))
        return found

    def _pull(self, origin: np.ndarray, goal: np.ndarray, source: int) -> None:
        goal[...] = origin
        self.received += goal.size if source != self.rank else 0

    def forget(self, prefix: str) -> None:
        """As :meth:`Transport.forget` says."""
        self._hub.forget(prefix, self.rank)

    def fail(self, error: StivError) -> None:
        """As :meth:`Transport.fail` says."""
        self._hub.fail(error)
