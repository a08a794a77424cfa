"""A stand-in for ``nccl.bindings.nccl``: ranks in threads of one process, GPU memory that is the host's.

As NCCL does without blocking, calls only begin: what a group sends lies ready at once, and is received when the rank is
asked whether it has settled. What a rank sends to another is paired with what that receives from it, in order.
"""

import ctypes
import itertools
import threading
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

UNDER_WAY, DONE, REMOTE = 7, 0, 6


class NCCLError(Exception):
    """As the real one: from nothing but ``Exception``."""


class FakeNccl:
    """The names and signatures of the real module; ``log`` has every group of each rank, as (sends, receives)."""

    NCCLError = NCCLError

    def __init__(self) -> None:
        self.mine = threading.local()
        self.lock = threading.Lock()
        self.posted: dict[tuple[int, int], list[bytes]] = defaultdict(list)
        self.comms: dict[int, SimpleNamespace] = {}
        self.log: dict[int, list[tuple[list[tuple[int, int]], list[tuple[int, int]]]]] = defaultdict(list)
        self.aborted: list[int] = []
        self.handles = itertools.count(1)
        self.silent = False
        """Whether NCCL reports nothing of a stream that has stopped: what is begun then counts as queued."""
        self.faults: dict[int, int] = {}

    def get_version(self) -> int:
        return 23203

    def get_unique_id(self) -> Any:
        return bytes(range(128))

    def Config(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(blocking=None, ptr=next(self.handles))

    def get_error_string(self, result: int) -> str:
        return {6: "remote process exited or there was a network error"}[result]

    def comm_init_rank_scalable(self, nranks: int, myrank: int, n_id: int, comm_ids: bytearray, config: int) -> Any:
        assert n_id == 1
        assert bytes(comm_ids) == self.get_unique_id()
        comm = SimpleNamespace(rank=myrank, size=nranks, due=[], aborted=False)
        with self.lock:
            assert myrank not in self.comms
            self.comms[myrank] = comm
        return comm

    def comm_get_async_error(self, comm: Any) -> int:
        assert not comm.aborted, "a communicator is not used after its end"
        with self.lock:
            if comm.rank in self.faults:
                return self.faults[comm.rank]
            if len(self.comms) < comm.size:
                return UNDER_WAY
            while comm.due and self.posted[comm.due[0][0], comm.rank]:
                peer, address, size = comm.due.pop(0)
                raw = self.posted[peer, comm.rank].pop(0)
                assert len(raw) == size, f"rank {peer} sends {len(raw)} bytes, rank {comm.rank} receives {size}"
                ctypes.memmove(address, raw, size)
            return UNDER_WAY if comm.due and not self.silent else DONE

    def group_start(self) -> None:
        assert getattr(self.mine, "group", None) is None, "groups are not within each other here"
        self.mine.group = SimpleNamespace(sends=[], receives=[], comm=None)

    def _in_group(self, comm: Any) -> SimpleNamespace:
        group = getattr(self.mine, "group", None)
        assert group is not None, "alone, a send would wait for a receive, and the other rank for it"
        assert group.comm in (None, comm)
        assert not comm.aborted
        assert not comm.due, "nothing is begun before what was begun has settled"
        group.comm = comm
        return group

    def send(self, sendbuff: int, count: int, datatype: int, peer: int, comm: Any, stream: int) -> None:
        self._in_group(comm).sends.append((peer, ctypes.string_at(sendbuff, count)))
        self._checked(datatype, peer, comm)

    def recv(self, recvbuff: int, count: int, datatype: int, peer: int, comm: Any, stream: int) -> None:
        self._in_group(comm).receives.append((peer, recvbuff, count))
        self._checked(datatype, peer, comm)

    def _checked(self, datatype: int, peer: int, comm: Any) -> None:
        assert datatype == 1
        assert 0 <= peer < comm.size
        assert peer != comm.rank

    def group_end(self) -> None:
        group, self.mine.group = self.mine.group, None
        if group.comm is None:
            return
        rank = group.comm.rank
        with self.lock:
            for peer, raw in group.sends:
                self.posted[rank, peer].append(raw)
            group.comm.due = list(group.receives)
            sizes = [(peer, len(raw)) for peer, raw in group.sends], [(peer, size) for peer, _, size in group.receives]
            self.log[rank].append(sizes)

    def comm_abort(self, comm: Any) -> None:
        assert not comm.aborted
        comm.aborted, comm.due = True, []
        self.aborted.append(comm.rank)
