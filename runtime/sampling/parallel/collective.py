"""Exchange between GPUs of several processes by NCCL: grouped sends and receives, on the stream of the engines.

What NCCL sends lies in one piece, so a rank packs its part for each other one, and unpacks theirs, by copies within
its GPU; all exchanges take turns in the same memory for it, as they do on the stream. The host waits for no device:
only until NCCL has queued an exchange, which takes longest where two ranks meet for the first time.

A kernel of NCCL waits for the other rank's, for ever if that has gone, and with it whatever waits for the stream. So a
thread watches the sockets to the other processes, on which nothing is sent, NCCL's own reports, and an event behind the
last exchange: when one of them says that there is no more to come, it aborts, and whoever waits learns why.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from stiv_deploy.runtime.backends.base import Buffer, Call, aligned
from stiv_deploy.runtime.backends.cuda import Region
from stiv_deploy.runtime.backends.nccl import Bytes, Communicator
from stiv_deploy.runtime.backends.tensorrt import Arena, TensorRTBackend
from stiv_deploy.runtime.errors import DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel.peers import region
from stiv_deploy.runtime.sampling.parallel.shards import Move
from stiv_deploy.runtime.sampling.parallel.sockets import Wires
from stiv_deploy.runtime.sampling.parallel.transport import AGAIN, STALL_SECONDS, Part, Transport, given, taken

LOOK_SECONDS = 0.05
"""How often the thread looks."""
POLL_SECONDS = 0.00005


class Packed(NamedTuple):
    """A move to or from another rank: this rank's buffer, and where in the memory for it its bytes lie in one piece."""

    move: Move
    buffer: Buffer
    start: int


class NcclTransport(Transport):
    """The way of engines in processes with a GPU each."""

    def __init__(
        self,
        rank: int,
        backend: TensorRTBackend,
        wires: Wires,
        api: Any,
        unique_id: bytes,
        stall: float = STALL_SECONDS,
    ) -> None:
        """Meet the others, who have the same ``unique_id``; :class:`DeviceError` where one does not come."""
        super().__init__(rank, backend)
        self._cuda, self._stream = backend.cuda, backend.stream
        self._wires, self._stall = wires, stall
        self._packed = Arena(backend.cuda)
        self._last, self._queued = backend.cuda.event(), 0.0
        self._why: Callable[[], StivError] | None = None
        self._ended = threading.Event()
        self._comm = Communicator(api, backend.cuda, unique_id, len(wires.peers) + 1, rank)
        backend.stream.waited = self._check
        threading.Thread(target=self._watch, name=f"stiv watch {rank}", daemon=True).start()
        self._settle()

    def bind(self, name: str, parts: Sequence[Part]) -> Call:
        """As :meth:`Transport.bind` says; the call queues copies and NCCL's kernels."""
        del name
        own: list[Call] = []
        out: list[tuple[Move, Buffer]] = []
        back: list[tuple[Move, Buffer]] = []
        for moves, source, target in parts:
            for move in given(moves, self.rank):
                assert source is not None
                if move.target != self.rank:
                    out.append((move, source))
                    continue
                assert target is not None
                own.append(partial(self._copy, move, self._at(target, move), self._at(source, move, origin=True)))
            for move in taken(moves, self.rank):
                assert target is not None
                back += [(move, target)] if move.source != self.rank else []
        leaving, coming = self._places(out, back)
        return partial(self._run, own, leaving, coming)

    def _at(self, buffer: Buffer, move: Move, *, origin: bool = False) -> Region:
        return region(self._cuda.device.index, buffer, move.origin if origin else move.goal)

    def _places(
        self, out: Sequence[tuple[Move, Buffer]], back: Sequence[tuple[Move, Buffer]]
    ) -> tuple[list[Packed], list[Packed]]:
        """Memory for what leaves and what comes, side by side."""
        *starts, total = accumulate((aligned(move.nbytes) for move, _ in (*out, *back)), initial=0)
        if total:
            self._packed.reserve(total)
        places = [Packed(move, buffer, start) for (move, buffer), start in zip((*out, *back), starts, strict=True)]
        return places[: len(out)], places[len(out) :]

    def _run(self, own: Sequence[Call], leaving: Sequence[Packed], coming: Sequence[Packed]) -> None:
        with self.clock.exchange():
            self._check()
            for copy in own:
                copy()
            if not leaving and not coming:
                return
            memory = self._packed.memory
            assert memory is not None
            for move, buffer, start in leaving:
                self._copy(move, self._whole(memory.address + start, move), self._at(buffer, move, origin=True))
            sends, receives = (
                [Bytes(peer(each.move), memory.address + each.start, each.move.nbytes) for each in ends]
                for ends, peer in ((leaving, _target), (coming, _source))
            )
            self._exchange(sends, receives)
            for move, buffer, start in coming:
                self._copy(move, self._at(buffer, move), self._whole(memory.address + start, move))
            self.received += sum(each.move.nbytes for each in coming)

    def _exchange(self, sends: Iterable[Bytes], receives: Iterable[Bytes]) -> None:
        self._cuda.use()
        self._comm.exchange(sends, receives, self._stream.handle)
        self._settle()
        self._stream.record(self._last)
        self._queued = time.monotonic()

    def _whole(self, address: int, move: Move) -> Region:
        """The bytes of ``move`` in one piece."""
        return Region(self._cuda.device.index, address, move.width, move.height)

    def _copy(self, move: Move, target: Region, source: Region) -> None:
        self._stream.copy_across(target, source, move.width, move.height, move.depth)

    def _settle(self) -> None:
        """Wait until NCCL has queued what was begun."""
        end = time.monotonic() + self._stall
        with self.clock.waiting():
            while not self._comm.settled():
                if time.monotonic() > end:
                    self._stop(partial(DeviceError, self._silent))
                self._check()
                time.sleep(POLL_SECONDS)
        self._check()

    @property
    def _silent(self) -> str:
        return f"the other devices have not answered for {self._stall:g} s; {AGAIN}"

    def _check(self) -> None:
        """Raise why exchanges have ended, if they have."""
        if self._why is not None:
            error = self._why()
            self._why = partial(_same, error)
            raise error

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            try:
                why = self._trouble()
            except StivError as error:
                why = partial(_same, error)
            if why is not None:
                self._stop(why)

    def _trouble(self) -> Callable[[], StivError] | None:
        """What says that no more is to come; None where all is well. The thread that needs the words asks for them."""
        rank = self._wires.gone()
        if rank is not None:
            return partial(self._wires.lost, rank)
        self._comm.settled()
        late = self._queued and time.monotonic() - self._queued > self._stall
        return partial(DeviceError, self._silent) if late and not self._last.done else None

    def _stop(self, why: Callable[[], StivError]) -> None:
        self._why = self._why or why
        self._ended.set()
        self._wires.close()
        self._comm.abort()

    def forget(self, prefix: str) -> None:
        """As :meth:`Transport.forget` says: nothing is kept."""
        del prefix

    def fail(self, error: StivError) -> None:
        """As :meth:`Transport.fail` says: the others see the sockets close."""
        self._stop(partial(_same, error))


def _same(error: StivError) -> StivError:
    return error


def _target(move: Move) -> int:
    return move.target


def _source(move: Move) -> int:
    return move.source
