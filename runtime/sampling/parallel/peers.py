"""Exchange between GPUs of one process, each with a thread and a stream: copies from GPU to GPU, ordered by events.

A rank records an event behind what it has made, the threads meet, so that every event is recorded before it is waited
for, and then each queues, behind the events of those it takes from, one strided copy for each of them. The host waits
for no device. Copy engines do the work, whatever else computes.

One event an exchange is enough. What a rank gives is written again behind a later exchange with those that read it,
whose events then stand behind their copies.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from stiv_deploy.runtime.backends.base import Buffer, Call
from stiv_deploy.runtime.backends.cuda import Event, Region
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.sampling.parallel.shards import Move, Place
from stiv_deploy.runtime.sampling.parallel.transport import Hub, Part, Transport, ranks_of, taken


class Offer(NamedTuple):
    """What a rank gives in an exchange, by part: buffers of its GPU, and the event behind which all are there."""

    device: int
    buffers: tuple[Buffer | None, ...]
    event: Event


class PeerTransport(Transport):
    """The way of engines that run in threads of one process."""

    def __init__(self, rank: int, backend: TensorRTBackend, hub: Hub[Offer]) -> None:
        super().__init__(rank, backend)
        self._stream = backend.stream
        self._cuda = backend.cuda
        self._hub = hub

    def bind(self, name: str, parts: Sequence[Part]) -> Call:
        """As :meth:`Transport.bind` says; the call queues copies."""
        sources = tuple(part.source for part in parts)
        offer = Offer(self._cuda.device.index, sources, self._cuda.event()) if any(sources) else None
        if offer is not None:
            self._hub.given[name, self.rank] = offer
        return partial(self._run, ranks_of(parts), offer, partial(self._pulls, name, parts), [])

    def _run(
        self, ranks: frozenset[int], offer: Offer | None, pulls: Callable[[], list[Call]], known: list[Call]
    ) -> None:
        with self.clock.exchange():
            if offer is not None:
                self._stream.record(offer.event)
            with self.clock.waiting():
                self._hub.meet(ranks)
            known += [] if known else pulls()  # by now the others have bound theirs
            for pull in known:
                pull()

    def _pulls(self, name: str, parts: Sequence[Part]) -> list[Call]:
        """Waits for the others that this rank takes from, each followed by the copies from there."""
        queued: list[Call] = []
        mine = [(index, part, move) for index, part in enumerate(parts) for move in taken(part.moves, self.rank)]
        for source in dict.fromkeys(move.source for _, _, move in mine):
            offer = self._hub.given[name, source]
            if source != self.rank:
                queued.append(partial(self._stream.wait, offer.event))
            for index, part, move in mine:
                origin = offer.buffers[index]
                if move.source == source and origin is not None and part.target is not None:
                    queued.append(partial(self._pull, move, offer.device, origin, part.target))
        return queued

    def _pull(self, move: Move, device: int, origin: Buffer, target: Buffer) -> None:
        self.received += move.nbytes if move.source != self.rank else 0
        ends = region(self._cuda.device.index, target, move.goal), region(device, origin, move.origin)
        self._stream.copy_across(*ends, move.width, move.height, move.depth)

    def forget(self, prefix: str) -> None:
        """As :meth:`Transport.forget` says."""
        self._hub.forget(prefix, self.rank)

    def fail(self, error: StivError) -> None:
        """As :meth:`Transport.fail` says."""
        self._hub.fail(error)


def region(device: int, buffer: Buffer, place: Place) -> Region:
    """``place`` in ``buffer``."""
    return Region(device, buffer.address + place.start, place.pitch, place.plane // place.pitch)
