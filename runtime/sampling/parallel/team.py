"""Several devices that make clips together, and the leader's hold of the others: threads of this process, or processes.

The first device leads: it has the texts, the latents and the solver, tells the others when an evaluation begins, and
takes part in it. When one of them stops, the clip fails with what it says, and so does everything after.
"""

import itertools
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Call
from stiv_deploy.runtime.backends.pieces import PieceCoder
from stiv_deploy.runtime.bundle.manifest import HALVES_REMEDY, Manifest
from stiv_deploy.runtime.bundle.verified import Machine
from stiv_deploy.runtime.errors import BackendError, DeviceError, StivError, one_line
from stiv_deploy.runtime.sampling.parallel.clock import Spent
from stiv_deploy.runtime.sampling.parallel.messages import Message
from stiv_deploy.runtime.sampling.parallel.placement import Placement
from stiv_deploy.runtime.sampling.parallel.rank import GIVEN, Rank, Work
from stiv_deploy.runtime.sampling.parallel.transport import AGAIN, STALL_SECONDS, Transport

CODED, SETTLED = "coded", "settled"
"""Answers."""


class Worker:
    """Does what the leader says, on one device: the works that it has a share in, and their bound calls."""

    def __init__(self, backend: Backend, manifest: Manifest, transport: Transport) -> None:
        self._backend, self._manifest, self._transport = backend, manifest, transport
        self._ranks: dict[int, Rank] = {}
        self._calls: dict[tuple[int, int], Mapping[str, Call]] = {}
        self._coders: dict[int, PieceCoder] = {}

    def __call__(self, message: Message) -> Message | None:
        """Carry out ``message``, and return the answer that it wants, if any; raises what goes wrong in it."""
        values = dict(message.values)
        key = int(values.pop("key"))
        if message.command == "size":
            self._ranks[key] = self._rank(key, {name: int(value) for name, value in values.items()})
        elif message.command == "row":
            self._ranks[key].set_row(int(values["row"]), {name: message.arrays[name] for name in GIVEN})
        elif message.command == "bind":
            rows = int(values["rows"])
            self._calls[key, rows] = self._ranks[key].calls(rows, capture=bool(values["capture"]))
        elif message.command == "run":
            self._ranks[key].run(self._calls[key, int(values["rows"])])
        elif message.command == "coder":
            names = str(values.pop("graphs")).split(",")
            self._coders[key] = self._coder(names, {name: int(value) for name, value in values.items()})
        elif message.command == "code":
            return Message(CODED, arrays={"result": self._coded(self._coders[key], message.arrays["piece"])})
        elif message.command == "settle":
            self._backend.synchronize()
            return Message(SETTLED, self._transport.clock.spent._asdict())
        elif message.command == "forget":
            self._forget(key)
        return None

    def _coder(self, names: Sequence[str], dims: Mapping[str, int]) -> PieceCoder:
        graphs = [(self._manifest.specs[name], partial(self._backend.bind, name)) for name in names]
        return PieceCoder(self._backend, graphs, dims)

    def _coded(self, coder: PieceCoder, raw: np.ndarray) -> np.ndarray:
        return coder(raw.view(np.float32).reshape(coder.given))

    def _rank(self, key: int, values: dict[str, int]) -> Rank:
        placement = Placement(
            devices=tuple(str(rank) for rank in range(values.pop("devices"))),
            guidance=values.pop("guidance"),
            sequence=values.pop("sequence"),
        )
        return Rank(self._backend, self._manifest, Work(key, values, placement), self._transport)

    def _forget(self, key: int) -> None:
        if key in self._ranks:
            self._ranks.pop(key).free()
        self._coders.pop(key, None)
        self._calls = {which: calls for which, calls in self._calls.items() if which[0] != key}


def size_message(work: Work) -> Message:
    """That there is ``work``, for :class:`Worker`."""
    placement = work.placement
    shape = {"devices": placement.size, "guidance": placement.guidance, "sequence": placement.sequence}
    return Message("size", {"key": work.key, **work.dims, **shape})


class Member(ABC):
    """Another device than the leader's, as the leader has hold of it."""

    @abstractmethod
    def tell(self, message: Message) -> None:
        """Let it carry out ``message`` after what it was told before; does not wait for it."""

    @abstractmethod
    def answer(self) -> Message:
        """Wait for the next answer to what it was told; :class:`DeviceError` if it stops before."""

    @abstractmethod
    def stop(self) -> None:
        """End it, and wait until it has ended."""


class ThreadMember(Member):
    """A device with a thread of this process."""

    def __init__(self, rank: int, backend: Backend, manifest: Manifest, transport: Transport) -> None:
        self._answers: queue.SimpleQueue[Message | StivError] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._backend, self._transport, self._name = backend, transport, rank
        self._worker = Worker(backend, manifest, transport)
        self._thread = threading.Thread(target=self._run, name=f"stiv device {rank}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                answer = self._worker(order)
            except Exception as error:
                known = fault(self._name, error)
                self._transport.fail(known)
                self._answers.put(known)
                return
            if answer is not None:
                self._answers.put(answer)

    def tell(self, message: Message) -> None:
        """As :meth:`Member.tell` says."""
        self._orders.put(message)

    def answer(self) -> Message:
        """As :meth:`Member.answer` says."""
        try:
            answer = self._answers.get(timeout=STALL_SECONDS)
        except queue.Empty:
            raise DeviceError(f"device {self._name} has not answered for {STALL_SECONDS:g} s; {AGAIN}") from None
        if isinstance(answer, StivError):
            raise answer
        return answer

    def stop(self) -> None:
        """As :meth:`Member.stop` says."""
        self._orders.put(None)
        self._thread.join()
        self._backend.close()


def fault(rank: int, error: Exception) -> StivError:
    """What went wrong on a device, in one line that names it."""
    if isinstance(error, DeviceError):
        return error
    words = str(error) if isinstance(error, StivError) else f"{type(error).__name__}: {error}"
    return DeviceError(f"device {rank} of the clip stopped ({one_line(words, 300)}); {AGAIN}")


class Team:
    """The devices of ``placement``: the leader's ``backend``, and ``members`` by rank, from 1 on."""

    def __init__(
        self,
        placement: Placement,
        backend: Backend,
        manifest: Manifest,
        transport: Transport,
        members: Sequence[Member],
    ) -> None:
        self.placement = placement
        self.backend = backend
        self.manifest = manifest
        self.transport = transport
        self._members = dict(enumerate(members, 1))
        self._keys = itertools.count()
        self._failed: StivError | None = None

    def new_key(self) -> int:
        """A key that no work of this team has."""
        return next(self._keys)

    def tell(self, ranks: Sequence[int], message: Message) -> None:
        """Tell ``ranks``; the leader is told nothing."""
        for rank in ranks:
            if rank:
                self.guarded(partial(self._members[rank].tell, message))()

    def coders(self, graphs: Sequence[str], dims: Mapping[str, int]) -> list["RemoteCoder"]:
        """One for each device but the leader: ``graphs`` one after another, over pieces of ``dims``."""
        key = self.new_key()
        ranks = range(1, self.placement.size)
        self.tell(ranks, Message("coder", {"key": key, **dims, "graphs": ",".join(graphs)}))
        spec = self.manifest.specs[graphs[-1]].outputs[0]
        coders = [RemoteCoder(self, rank, key, spec.sized(dict(dims)), spec.dtype) for rank in ranks]
        for coder in coders:
            weakref.finalize(coder, self.forget, [coder.rank], key).atexit = False
        return coders

    def settle(self) -> list[Spent]:
        """Wait until every device has done all that it was told; then its backend is another's to use.

        Returns what each has spent in exchanges up to now, by rank.
        """
        self.backend.synchronize()
        ranks = list(self._members)
        self.tell(ranks, Message("settle", {"key": self.new_key()}))
        told = [self.answer(rank).values for rank in ranks]
        others = [Spent(float(each["waiting"]), float(each["copying"])) for each in told]
        return [self.transport.clock.spent, *others]

    def answer(self, rank: int) -> Message:
        """The answer of ``rank``."""
        heard: list[Message] = []
        self.guarded(lambda: heard.append(self._members[rank].answer()))()
        return heard[0]

    def forget(self, ranks: Sequence[int], key: int) -> None:
        """Let ``ranks`` free the work ``key``, as far as they are there."""
        for rank in ranks:
            if rank in self._members and self._failed is None:
                with suppress(StivError):
                    self._members[rank].tell(Message("forget", {"key": key}))

    def guarded(self, call: Call) -> Call:
        """``call``, after whose failure nobody waits for this device, and nothing more is begun."""

        def guarded() -> None:
            if self._failed is not None:
                raise self._failed
            try:
                call()
            except BaseException as error:
                known = error if isinstance(error, StivError) else DeviceError("the leading device was interrupted")
                self._failed = known
                self.transport.fail(known)
                raise

        return guarded

    def close(self) -> None:
        """End the other devices; the leader's backend stays open. May be called twice."""
        members, self._members = self._members, {}
        self._failed = self._failed or BackendError("the devices of this pipeline are closed")
        self.transport.fail(self._failed)
        for member in members.values():
            member.stop()


class RemoteCoder:
    """Codes pieces on another device: called with one it begins, and returns what waits for the result."""

    def __init__(self, team: Team, rank: int, key: int, shape: tuple[int, ...], dtype: str) -> None:
        self.rank = rank
        self._team, self._key, self._shape, self._dtype = team, key, shape, dtype

    def __call__(self, piece: np.ndarray) -> Callable[[], np.ndarray]:
        """Begin with ``piece``."""
        raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        self._team.tell([self.rank], Message("code", {"key": self._key}, {"piece": raw}))
        return self._wait

    def _wait(self) -> np.ndarray:
        raw = self._team.answer(self.rank).arrays["result"]
        return raw.reshape(-1).view(self._dtype).reshape(self._shape)


def check_halves(manifest: Manifest, placement: Placement, where: object) -> None:
    """:class:`BackendError` where devices are to share frames and the bundle ``where`` has whole blocks only."""
    if placement.sequence > 1 and not manifest.halves:
        raise BackendError(f"{where}: its blocks are whole, which devices cannot share; {HALVES_REMEDY}")


def check_alike(machines: Sequence[Machine], placement: Placement) -> None:
    """:class:`BackendError` where the devices are not of one kind, with one library and the same engines."""
    first, names = machines[0], placement.devices
    for name, machine in zip(names, machines, strict=True):
        if _kind(machine) != _kind(first):
            raise BackendError(
                f"--devices {','.join(names)}: {names[0]} is {first.device} with {first.library}, {name} is "
                f"{machine.device} with {machine.library}; name devices that are alike"
            )


def _kind(machine: Machine) -> Machine:
    """``machine`` whatever its device's index."""
    return machine.model_copy(update={"device": machine.device.rstrip("0123456789")})
