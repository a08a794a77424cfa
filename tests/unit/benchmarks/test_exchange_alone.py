"""``benchmarks/exchange_alone.py``: exchanges as a clip has them, with nothing computed."""

import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from engine_clips import finish, sample_of, settings_of
from mixing_toys import mixing_graphs
from teams import cpus, engine_over, evaluation_bytes
from toys import Toy, make_bundle

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.parallel.sockets import SocketTransport, Wires
from stiv_deploy.runtime.sampling.parallel.transport import HostTransport


@pytest.fixture
def module(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("exchange_alone")


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("alone") / "bundle", Toy(), mixing_graphs())


@pytest.mark.parametrize(("count", "form"), [(2, "dsp2"), (3, "cfg3"), (4, "cfg2xdsp2")])
def test_as_many_bytes_move_as_in_the_clip(
    module: ModuleType, halved: Path, monkeypatch: pytest.MonkeyPatch, count: int, form: str
) -> None:
    bundle = Bundle.open(halved)
    team = cpus(bundle, count, form)
    told = module.Told(team)
    engine = engine_over(team, bundle)
    engine.admit(sample_of(settings_of("sit", steps=2)))
    finish(engine)
    placement = team.placement
    team.close()
    assert told.work is not None
    assert told.work.placement.groups == placement.groups
    assert told.rows == [3, 3]
    made: list[HostTransport] = []
    monkeypatch.setattr(module, "HostTransport", lambda *given: made.append(HostTransport(*given)) or made[-1])
    with module.Alone(halved, count, processes=False) as alone:
        assert alone(told.work, told.rows) > 0
        assert alone(told.work, told.rows[:1]) > 0
    tried, second = 1, 1 + 1  # each call tries every number of rows once before it counts
    wanted = (tried + 2 + second) * evaluation_bytes(3, placement.guidance, placement.sequence)
    assert sum(each.received for each in made) == wanted


def test_sockets_join_each_two_ranks(module: ModuleType) -> None:
    lines = module.pairs(3)
    for low, high in ((0, 1), (0, 2), (1, 2)):
        lines[low][high].sendall(bytes([low, high]))
        assert lines[high][low].recv(2) == bytes([low, high])
        assert lines[low][high].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for each in lines:
        Wires(each).close()


def test_a_worker_of_another_process_takes_the_next_rank(
    module: ModuleType, halved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As spawned processes do, here one after another."""
    taken = module.multiprocessing.get_context("spawn").Value("i", 0)
    lines, ranks = module.pairs(2), []
    for _ in range(2):
        module._open_process(halved, None, lines, taken)
        assert isinstance(module._OWN.transport, SocketTransport)
        ranks.append(module._OWN.transport.rank)
    assert ranks == [0, 1]
    for each in lines:
        Wires(each).close()
