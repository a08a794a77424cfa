"""The exchanges of a clip without anything computed between them: what of its time they are by themselves."""

import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import combinations, count
from pathlib import Path
from typing import Any, Self

from stiv_deploy.runtime.backends.base import Buffer, Call, run_in_order
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.parallel.messages import Message
from stiv_deploy.runtime.sampling.parallel.placement import Placement
from stiv_deploy.runtime.sampling.parallel.rank import Rank, Work
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport, Wires
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.runtime.sampling.parallel.transport import HostTransport, Hub

_OWN = threading.local()
"""Of a worker: its transport, the bundle's manifest, and the barrier at which all of them meet."""
STALL_SECONDS = 600
Lines = list[dict[int, socket.socket]]
"""Sockets of each rank to every other."""


class Told:
    """Hears what ``team`` tells its devices: the last ``work``, and of each evaluation its rows."""

    def __init__(self, team: Team) -> None:
        self.work: Work | None = None
        self.rows: list[int] = []
        self._tell = team.tell
        team.tell = self  # type: ignore[method-assign]

    def __call__(self, ranks: Sequence[int], message: Message) -> None:
        """As :meth:`~stiv_deploy.runtime.sampling.parallel.team.Team.tell`."""
        values = {name: int(value) for name, value in message.values.items() if name != "graphs"}
        if message.command == "size":
            shape = {name: values.pop(name) for name in ("guidance", "sequence")}
            devices = tuple(map(str, range(values.pop("devices"))))
            self.work = Work(values.pop("key"), values, Placement(devices=devices, **shape))
        elif message.command == "run":
            self.rows.append(values["rows"])
        self._tell(ranks, message)


class Alone:
    """Ranks that only exchange, in processes or in threads of this one; closed as a context."""

    def __init__(self, folder: Path, size: int, *, processes: bool) -> None:
        self._size = size
        self._lines = pairs(size) if processes else None
        self._pool: Executor
        if processes:
            context = multiprocessing.get_context("spawn")
            given = (folder, context.Barrier(size), self._lines, context.Value("i", 0))
            self._pool = ProcessPoolExecutor(size, context, _open_process, given)
        else:
            begin, hub, ranks = threading.Barrier(size), Hub[Any](), count()
            self._pool = ThreadPoolExecutor(size, initializer=_open_thread, initargs=(folder, begin, hub, ranks))

    def __call__(self, work: Work, rows: Sequence[int]) -> float:
        """Seconds until the last rank has made the exchanges of one evaluation after another, of so many rows each."""
        made = [self._pool.submit(_exchange, work, tuple(rows)) for _ in range(self._size)]
        return max(each.result() for each in made)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        for line in (line for lines in self._lines or () for line in lines.values()):
            line.close()


class Idle(OnnxRuntimeBackend):
    """Memory as ever, and graphs that compute nothing."""

    def bind(self, graph: str, inputs: Any, outputs: Any) -> Call:
        """A call that does nothing."""
        del graph, inputs, outputs
        return partial(run_in_order, ())


def pairs(size: int) -> Lines:
    """A socket for each two ranks, over this machine's network as processes of a clip have them."""
    lines: Lines = [{} for _ in range(size)]
    for low, high in combinations(range(size), 2):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            lines[low][high] = socket.create_connection(listening.getsockname())
            lines[high][low] = listening.accept()[0]
        for line in (lines[low][high], lines[high][low]):
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return lines


def _open_process(folder: Path, begin: Any, lines: Lines, taken: Any) -> None:
    with taken.get_lock():
        rank, taken.value = taken.value, taken.value + 1
    bundle = Bundle.open(folder)
    _OWN.transport = SocketTransport(rank, Idle(bundle, threads=1), Wires(lines[rank]))
    _OWN.manifest, _OWN.begin = bundle.manifest, begin


def _open_thread(folder: Path, begin: Any, hub: Hub[Any], ranks: "count[int]") -> None:
    bundle = Bundle.open(folder)
    _OWN.transport = HostTransport(next(ranks), Idle(bundle, threads=1), hub)
    _OWN.manifest, _OWN.begin = bundle.manifest, begin


def _exchange(work: Work, rows: tuple[int, ...]) -> float:
    """Seconds of this worker's part, once all have bound and tried theirs; each takes one."""
    transport = _OWN.transport
    rank = Rank(transport.backend, _OWN.manifest, work, transport)
    calls = {each: rank.calls(each, _leader(rank) if not transport.rank else None) for each in dict.fromkeys(rows)}
    _OWN.begin.wait(STALL_SECONDS)
    for each in calls.values():
        rank.run(each)
    _OWN.begin.wait(STALL_SECONDS)
    started = time.perf_counter()
    for each in rows:
        rank.run(calls[each])
    seconds = time.perf_counter() - started
    _OWN.begin.wait(STALL_SECONDS)
    rank.free()
    return seconds


def _leader(rank: Rank) -> dict[str, Buffer]:
    """Buffers of all of the work's rows, as the leader has them."""
    dims, backend = rank.work.dims, rank.backend
    latents = next(each for each in rank.specs["head"].inputs if each.name == "model_input").sized(dict(dims))
    timed = {name: backend.empty((dims["model_batch"],), "float32") for name in rank.timed}
    return {name: backend.empty(latents, "float32") for name in ("model_input", "velocity")} | timed
