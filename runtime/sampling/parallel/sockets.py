"""Exchange between processes, over a socket for each pair of them."""

import selectors
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NoReturn

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call, run_in_order
from stiv_deploy.runtime.errors import DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel.clock import ExchangeClock
from stiv_deploy.runtime.sampling.parallel.shards import Move, Moves
from stiv_deploy.runtime.sampling.parallel.transport import (
    AGAIN,
    STALL_SECONDS,
    HostBytes,
    Part,
    Transport,
    block,
    given,
    taken,
)

Lost = Callable[[int], StivError]
"""Why nothing more comes from a rank."""


def stopped(rank: int) -> StivError:
    """What another rank can say of one that has gone."""
    return DeviceError(f"device {rank} of the clip has stopped; {AGAIN}")


class Wires:
    """Sockets to other ranks, all written to and read from at a time, so that nobody waits for one who waits."""

    def __init__(self, peers: Mapping[int, socket.socket], lost: Lost = stopped, stall: float = STALL_SECONDS) -> None:
        self.peers = dict(peers)
        self.lost, self._stall = lost, stall
        """``lost``: why nothing more comes from a rank."""
        self.clock = ExchangeClock()
        for peer in self.peers.values():
            peer.setblocking(False)

    def swap(self, out: Mapping[int, memoryview], back: Mapping[int, memoryview]) -> None:
        """Send ``out`` and fill ``back``, by rank; :class:`DeviceError` when one of them closes or nothing moves."""
        left = {(rank, selectors.EVENT_WRITE): view for rank, view in out.items() if len(view)}
        left |= {(rank, selectors.EVENT_READ): view for rank, view in back.items() if len(view)}
        with selectors.DefaultSelector() as selector:
            for rank in {rank for rank, _ in left}:
                selector.register(self.peers[rank], self._events(left, rank), rank)
            while left:
                self._turn(selector, left)

    def _turn(self, selector: selectors.BaseSelector, left: dict[tuple[int, int], memoryview]) -> None:
        with self.clock.waiting():
            ready = selector.select(self._stall)
        if not ready:
            raise DeviceError(f"device {min(left)[0]} has not answered for {self._stall:g} s; {AGAIN}")
        for key, events in ready:
            for event in (selectors.EVENT_WRITE, selectors.EVENT_READ):
                if events & event and (key.data, event) in left:
                    self._some(key.data, event, left)
            wanted = self._events(left, key.data)
            if not wanted:
                selector.unregister(key.fileobj)
            elif wanted != key.events:
                selector.modify(key.fileobj, wanted, key.data)

    def _events(self, left: Mapping[tuple[int, int], memoryview], rank: int) -> int:
        return sum(event for whose, event in left if whose == rank)

    def _some(self, rank: int, event: int, left: dict[tuple[int, int], memoryview]) -> None:
        """Move what goes at once."""
        view, peer = left.pop((rank, event)), self.peers[rank]
        try:
            count = peer.send(view) if event == selectors.EVENT_WRITE else peer.recv_into(view)
        except BlockingIOError:
            left[rank, event] = view
            return
        except OSError:
            self._gone(rank)
        if not count:
            self._gone(rank)
        if count < len(view):
            left[rank, event] = view[count:]

    def _gone(self, rank: int) -> NoReturn:
        raise self.lost(rank)

    def gone(self) -> int | None:
        """A rank that has closed its socket, of which nothing is to be read; None where all are there."""
        return next((rank for rank, peer in self.peers.items() if _closed(peer)), None)

    def close(self) -> None:
        """Close all; the others notice."""
        for peer in self.peers.values():
            peer.close()


def _closed(peer: socket.socket) -> bool:
    try:
        return not peer.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


class SocketTransport(Transport):
    """Processes: bytes go through the host's memory and over sockets."""

    def __init__(self, rank: int, backend: Backend, wires: Wires) -> None:
        super().__init__(rank, backend)
        self._wires, self.clock = wires, wires.clock
        self.sent = 0
        """Bytes that have been handed to sockets."""

    def bind(self, name: str, parts: Sequence[Part]) -> Call:
        """As :meth:`Transport.bind` says; parts go one after another."""
        return partial(run_in_order, [self._part(*part) for part in parts])

    def _part(self, moves: Moves, source: Buffer | None, target: Buffer | None) -> Call:
        own, goal = (None if buffer is None else HostBytes(self.backend, buffer) for buffer in (source, target))
        out = {move.target: move for move in given(moves, self.rank)}
        back = {move.source: move for move in taken(moves, self.rank)}
        return partial(self._run, own, goal, out, back)

    def _run(
        self, own: HostBytes | None, goal: HostBytes | None, out: Mapping[int, Move], back: Mapping[int, Move]
    ) -> None:
        self.backend.synchronize()
        with self.clock.exchange():
            self._swap(own, goal, out, back)

    def _swap(
        self, own: HostBytes | None, goal: HostBytes | None, out: Mapping[int, Move], back: Mapping[int, Move]
    ) -> None:
        if own is not None:
            own.fetch()
        leaving = {rank: block(own.array, move.origin, move) for rank, move in out.items() if own is not None}
        coming = {rank: np.empty((move.depth, move.height, move.width), np.uint8) for rank, move in back.items()}
        if self.rank in leaving:
            coming[self.rank] = leaving.pop(self.rank)
        packed = {rank: np.ascontiguousarray(part).data.cast("B") for rank, part in leaving.items()}
        others = {rank: part.data.cast("B") for rank, part in coming.items() if rank != self.rank}
        self._wires.swap(packed, others)
        self.sent += sum(map(len, packed.values()))
        self.received += sum(map(len, others.values()))
        for rank, move in back.items():
            assert goal is not None
            block(goal.array, move.goal, move)[...] = coming[rank]
        if goal is not None:
            goal.put()

    def forget(self, prefix: str) -> None:
        """As :meth:`Transport.forget` says: nothing is kept."""
        del prefix

    def fail(self, error: StivError) -> None:
        """As :meth:`Transport.fail` says: the others see the sockets close."""
        del error
        self._wires.close()
