"""Clips made by stand-in GPUs that exchange by a stand-in of NCCL, whose calls are those that the real one has."""

import inspect
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_clips import finish, sample_of, settings_of
from fake_nccl import FakeNccl
from mixing_toys import mixing_graphs
from racing_gpus import racing
from teams import assert_same, cpus, engine_over, evaluation_bytes
from toys import Toy, make_bundle

from stiv_deploy.runtime.backends import nccl
from stiv_deploy.runtime.backends.cuda import NOT_READY, Cuda, count_gpus
from stiv_deploy.runtime.backends.nccl import Bytes, Communicator
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BackendError, DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel import opening, processes, worker
from stiv_deploy.runtime.sampling.parallel.collective import NcclTransport
from stiv_deploy.runtime.sampling.parallel.messages import Message
from stiv_deploy.runtime.sampling.parallel.placement import place
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport, Wires
from stiv_deploy.runtime.sampling.parallel.team import Team, ThreadMember
from stiv_deploy.runtime.sampling.parallel.transport import Transport

CLIP = sample_of(settings_of("jit", steps=2), [0], seed=1)
Open = Callable[..., Team]


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a toy bundle with halves and stand-in engines for all of its graphs is to be."""
    return make_bundle(tmp_path_factory.mktemp("nccl") / "bundle", Toy(), mixing_graphs())


@pytest.fixture
def api() -> FakeNccl:
    return FakeNccl()


@pytest.fixture
def opened(engines: Path, stand_ins: SimpleNamespace) -> Iterator[Open]:
    """Opens a team of stand-in GPUs, a thread for each process, that exchange by ``way(rank, backend, wires)``."""
    if not Bundle.open(engines).manifest.engines:
        stand_ins.add_engines(engines)
    teams: list[Team] = []

    def make(way: Callable[..., Transport], parallel: str, count: int) -> Team:
        cudart = racing(stand_ins.cudart)(gpus=count)
        cudart.cudaEventQuery = lambda event: (0,)
        backends = [stand_ins.open(engines, cudart, device=rank)[0] for rank in range(count)]
        lines: list[dict[int, socket.socket]] = [{} for _ in range(count)]
        for low in range(count):
            for high in range(low + 1, count):
                lines[low][high], lines[high][low] = socket.socketpair()
        with ThreadPoolExecutor(count) as pool:  # all at a time, as they wait for each other
            made = list(pool.map(way, range(count), backends, map(Wires, lines)))
        manifest = Bundle.open(engines).manifest
        members = [ThreadMember(rank, backends[rank], manifest, made[rank]) for rank in range(1, count)]
        placement = place([str(rank) for rank in range(count)], parallel, manifest.model, "jit")
        teams.append(Team(placement, backends[0], manifest, made[0], members))
        return teams[-1]

    yield make
    for team in teams:
        team.close()
        team.backend.close()


def by_nccl(api: FakeNccl, **options: Any) -> Callable[..., Transport]:
    return lambda rank, backend, wires: NcclTransport(rank, backend, wires, api, api.get_unique_id(), **options)


def made(team: Team, engines: Path) -> np.ndarray:
    engine = engine_over(team, Bundle.open(engines), rungs=(1, 2))
    slot = engine.admit(CLIP)
    latents = finish(engine)[slot]
    team.close()
    return latents


@pytest.mark.parametrize(("parallel", "count"), [("cfg2", 2), ("dsp2", 2), ("dsp3", 3), ("cfg2xdsp2", 4)])
def test_clips_are_those_of_sockets_bit_by_bit(
    api: FakeNccl, opened: Open, engines: Path, parallel: str, count: int
) -> None:
    right = made(opened(SocketTransport, parallel, count), engines)
    team = opened(by_nccl(api), parallel, count)
    cudart = team.backend.cuda.api  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made(team, engines), right)
    assert cudart.races == []
    check_pairs(api, count)
    moved = sum(size for groups in api.log.values() for sends, _ in groups for _, size in sends)
    assert moved == 2 * evaluation_bytes(2, team.placement.guidance, team.placement.sequence)


def check_pairs(api: FakeNccl, count: int) -> None:
    """What each sends to each is what that receives from it, in order and in size; none is left over."""
    for source in range(count):
        for target in range(count):
            out = [size for sends, _ in api.log[source] for peer, size in sends if peer == target]
            back = [size for _, receives in api.log[target] for peer, size in receives if peer == source]
            assert out == back
    assert not any(api.posted.values())
    all_end(api, count)


def all_end(api: FakeNccl, count: int) -> None:
    """Each rank ends its communicator, once, when the leader has ended its own."""
    until = time.monotonic() + 5
    while len(api.aborted) < count and time.monotonic() < until:
        time.sleep(0.01)
    assert sorted(api.aborted) == list(range(count))


def test_several_clips_take_turns_in_the_memory_for_packing(api: FakeNccl, opened: Open, engines: Path) -> None:
    """Of a larger clip and a smaller: the memory grows while the first one's exchanges are bound."""
    team = opened(by_nccl(api), "dsp2", 2)
    small, large = engine_over(team, Bundle.open(engines), rungs=(1,)), engine_over(team, Bundle.open(engines))
    alone = engine_over(None, Bundle.open(engines))
    one = sample_of(settings_of("none", steps=2), seed=2)
    for engine, clip in ((small, one), (large, CLIP), (small, one)):
        slot, right = engine.admit(clip), alone.admit(clip)
        assert_same(finish(engine)[slot], finish(alone)[right])


def test_calls_are_those_of_nccl4py() -> None:
    """Names, parameters, and the constants that are written out here."""
    real = pytest.importorskip("nccl.bindings.nccl", reason="nccl4py is not installed; the extra 'nccl' has it")
    for name in ("get_version", "get_unique_id", "comm_init_rank_scalable", "comm_get_async_error", "comm_abort"):
        assert parameters(real, name) == parameters(FakeNccl(), name)
    for name in ("group_start", "group_end", "send", "recv", "get_error_string"):
        assert parameters(real, name) == parameters(FakeNccl(), name)
    assert (int(real.Result.Success), int(real.Result.InProgress)) == (nccl.SUCCESS, nccl.IN_PROGRESS)
    assert int(real.Result.RemoteError) == 6
    assert int(real.DataType.Uint8) == nccl.BYTES
    config = real.Config()
    config.blocking = 0
    assert config.blocking == 0
    assert config.ptr
    assert real.NCCLError.__mro__[1:] == FakeNccl.NCCLError.__mro__[1:]


def parameters(module: Any, name: str) -> list[str]:
    return list(inspect.signature(getattr(module, name)).parameters)


def test_the_real_library_without_a_gpu() -> None:
    """It makes ids, and says in one line that there is no GPU to make a communicator on."""
    try:
        real = nccl.load_nccl()
    except BackendError as error:
        pytest.skip(str(error))
    unique_id = nccl.new_id(real)
    assert len(unique_id) == 128
    if count_gpus():
        pytest.skip("there is a GPU here, and tests/gpu/test_parallel.py uses it")
    cuda = SimpleNamespace(use=lambda: None)
    with pytest.raises(BackendError, match="^NCCL's comm_init_rank_scalable failed: .*cuda error") as caught:
        Communicator(real, cuda, unique_id, 1, 0)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_a_rank_that_goes_is_one_clear_error_for_all(api: FakeNccl, opened: Open, engines: Path) -> None:
    team = opened(by_nccl(api), "cfg2xdsp2", 4)
    engine = engine_over(team, Bundle.open(engines))
    engine.admit(CLIP)
    engine.tick()
    backend = team._members[3]._backend  # type: ignore[attr-defined]
    bind = backend.bind

    def broken(graph: str, *buffers: Any) -> Callable[[], None]:
        def fail() -> None:
            raise StivError(f"graph {graph} failed: out of memory")

        return fail if graph == "mixed_01" else bind(graph, *buffers)

    backend.bind = broken
    other = engine_over(team, Bundle.open(engines))
    other.admit(CLIP)
    started = time.monotonic()
    with pytest.raises(DeviceError, match="^device . of the clip has stopped; run it again, or name fewer --devices$"):
        finish(other)
    assert time.monotonic() - started < 20
    with pytest.raises(DeviceError, match="has stopped"):
        finish(engine)
    team.close()
    all_end(api, 4)
    assert not [each for each in threading.enumerate() if each.name.startswith("stiv device")]


def test_a_rank_that_does_not_come(api: FakeNccl, opened: Open) -> None:
    def late(rank: int, backend: Any, wires: Wires) -> Transport:
        return SocketTransport(rank, backend, wires) if rank else by_nccl(api, stall=0.2)(rank, backend, wires)

    with pytest.raises(DeviceError, match="^the other devices have not answered for 0.2 s; run it again"):
        opened(late, "dsp2", 2)
    assert api.aborted == [0]


def test_a_fault_that_nccl_reports_in_the_background(api: FakeNccl, opened: Open) -> None:
    team = opened(by_nccl(api), "dsp2", 2)
    api.faults[0] = 6
    until = time.monotonic() + 5
    while 0 not in api.aborted and time.monotonic() < until:
        time.sleep(0.01)
    with pytest.raises(DeviceError, match="^NCCL reports: remote process exited or there was a network error$"):
        team.backend.synchronize()


def test_a_stream_that_stands_still_is_ended_and_whoever_waits_learns_why(
    api: FakeNccl, opened: Open, engines: Path
) -> None:
    """All is queued, the other rank never sends: CUDA's wait, which has no limit, ends with the abort."""
    team = opened(by_nccl(api), "dsp2", 2)
    engine = engine_over(team, Bundle.open(engines), rungs=(1, 2))
    engine.admit(CLIP)
    engine.tick()
    team.settle()
    leader: Any = team.transport
    leader._stall = 0.3
    cudart = leader.backend.cuda.api
    cudart.cudaEventQuery = lambda event: (NOT_READY if event == leader._last.handle and not api.aborted else 0,)
    waits: list[bool] = []

    def hanging(stream: int) -> tuple:
        started = time.monotonic()
        while 0 not in api.aborted and time.monotonic() - started < 10:
            time.sleep(0.01)
        waits.append(0 in api.aborted)
        return (0,)

    cudart.cudaStreamSynchronize = hanging
    leader._exchange([], [])
    with pytest.raises(
        DeviceError, match="^the other devices have not answered for 0.3 s; run it again, or name fewer"
    ):
        team.backend.synchronize()
    assert waits == [True]


def test_what_nccl_refuses_is_one_line(api: FakeNccl, stand_ins: SimpleNamespace) -> None:
    cuda = Cuda(stand_ins.cudart())

    def refused(*_: Any) -> None:
        raise api.NCCLError("InvalidUsage (5): invalid usage\n(run with NCCL_DEBUG=WARN for details)")

    comm = Communicator(api, cuda, api.get_unique_id(), 1, 0)
    api.send = refused  # type: ignore[method-assign]
    with pytest.raises(BackendError, match=r"^NCCL's send failed: InvalidUsage \(5\): invalid usage .run with"):
        comm.exchange([Bytes(0, 1, 1)], [], 0)
    assert api.mine.group is None, "the group is ended all the same"
    comm.abort()
    comm.abort()
    assert comm.settled()
    comm.exchange([Bytes(0, 1, 1)], [], 0)
    assert api.aborted == [0]


def test_where_nccl_is_not_installed(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'nccl'")

    monkeypatch.setattr(nccl, "import_module", absent)
    with pytest.raises(BackendError) as caught:
        opening.open_team(Bundle.open(engines), ["0", "1"], nccl=True)
    assert str(caught.value) == (
        "NCCL is not installed (No module named 'nccl'); pip install 'stiv-deploy[nccl]' nvidia-nccl-cu13"
    )


def test_what_nccl_is_not_for(engines: Path) -> None:
    bundle = Bundle.open(engines)
    with pytest.raises(BackendError, match="^--nccl is between GPUs, --devices names CPUs; leave it out, --processes"):
        cpus(bundle, 2, "dsp2", nccl=True)
    cpu = SimpleNamespace(name="onnxruntime-cuda")
    with pytest.raises(BackendError, match="^--nccl is for engines on GPUs, not for onnxruntime-cuda; leave it out"):
        worker.transport_of(0, cpu, Wires({}), bytes(128))  # type: ignore[arg-type]


class InThread:
    """A process of a device, as a thread of this one: what the leader asks of ``subprocess.Popen``."""

    def __init__(self, post: worker.Post) -> None:
        self.code: int | None = None
        self._thread = threading.Thread(
            target=self._run, args=(worker.Post(**json.loads(post.to_json())),), daemon=True
        )
        self._thread.start()

    def _run(self, post: worker.Post) -> None:
        self.code = worker.work(post)

    def poll(self) -> int | None:
        return self.code

    def wait(self, timeout: float = 20) -> int | None:
        self._thread.join(timeout)
        return self.code

    def kill(self) -> None:
        """It ends with its line to the leader."""


@pytest.fixture
def in_threads(
    api: FakeNccl, opened: Open, engines: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int, str], Team]:
    """Opens a team as ``--nccl`` does, sockets and all, but for engines, NCCL, and threads in place of processes."""

    def make(count: int, parallel: str) -> Team:
        cudart = racing(stand_ins.cudart)(gpus=count)
        cudart.cudaEventQuery = lambda event: (0,)

        def open_one(name: str | None, bundle: Bundle, threads: int | None, device: int) -> Any:
            return stand_ins.open(engines, cudart, device=device)[0]

        for module in (opening, worker):
            monkeypatch.setattr(module, "open_backend", open_one)
            monkeypatch.setattr(module, "load_nccl", lambda: api)
        monkeypatch.setattr(processes, "_started", InThread)
        names = [str(rank) for rank in range(count)]
        return opening.open_team(Bundle.open(engines), names, parallel=parallel, backend="tensorrt", nccl=True)

    return make


def test_processes_meet_exchange_by_nccl_and_end(
    api: FakeNccl, opened: Open, in_threads: Callable[[int, str], Team], engines: Path
) -> None:
    right = made(opened(SocketTransport, "cfg2xdsp2", 4), engines)
    team = in_threads(4, "cfg2xdsp2")
    assert isinstance(team.transport, NcclTransport)
    members = [member.process for member in team._members.values()]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(made(team, engines), right)
    check_pairs(api, 4)
    assert [process.wait() for process in members] == [0, 0, 0]
    team.backend.close()


def test_what_a_process_says_of_its_end_is_what_the_leader_raises(
    api: FakeNccl, in_threads: Callable[[int, str], Team], engines: Path
) -> None:
    team = in_threads(2, "dsp2")
    engine = engine_over(team, Bundle.open(engines))
    engine.admit(CLIP)
    engine.tick()
    team.tell([1], Message("run", {"key": 99, "rows": 1}))
    said = "^device 1 of the clip stopped .KeyError: 99.; run it again, or name fewer --devices$"
    with pytest.raises(DeviceError, match=said):
        finish(engine)
    with pytest.raises(DeviceError, match=said):
        engine_over(team, Bundle.open(engines))
    team.close()
    team.backend.close()
    all_end(api, 2)


def test_processes_learn_the_id() -> None:
    post = worker.Post(
        bundle="b", backend="tensorrt", device=1, threads=None, rank=1, size=2, port=1, token="ab", unique_id="00ff"
    )
    assert post.nccl_id == b"\x00\xff"
    assert worker.Post(**json.loads(post.to_json())) == post
