"""Clips made by several stand-in GPUs, with copies from one to another: every wait is needed, and they are enough."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine_clips import finish, sample_of, settings_of
from mixing_toys import mixing_graphs
from racing_gpus import racing
from teams import assert_same, engine_over, evaluation_bytes
from toys import Toy, make_bundle

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import BackendError, StivError
from stiv_deploy.runtime.sampling.parallel import opening
from stiv_deploy.runtime.sampling.parallel.peers import PeerTransport
from stiv_deploy.runtime.sampling.parallel.team import Team

CLIP = sample_of(settings_of("jit", steps=2), [0], seed=1)


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a toy bundle with halves and stand-in engines for all of its graphs is to be."""
    return make_bundle(tmp_path_factory.mktemp("peers") / "bundle", Toy(), mixing_graphs())


@pytest.fixture
def gpus(engines: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Team, Any]]:
    """Opens a team of stand-in GPUs; returns it with the CUDA that they are of."""
    if not Bundle.open(engines).manifest.engines:
        stand_ins.add_engines(engines)

    def make(parallel: str, count: int) -> tuple[Team, Any]:
        cudart = racing(stand_ins.cudart)(gpus=count)

        def opened(name: str | None, bundle: Bundle, threads: int | None, device: int) -> Any:
            return stand_ins.open(engines, cudart, device=device)[0]

        monkeypatch.setattr(opening, "open_backend", opened)
        names = [str(index) for index in range(count)]
        return opening.open_team(Bundle.open(engines), names, parallel=parallel, backend="tensorrt"), cudart

    return make


def made(team: Team, engines: Path) -> np.ndarray:
    engine = engine_over(team, Bundle.open(engines), rungs=(1, 2))
    slot = engine.admit(CLIP)
    latents = finish(engine)[slot]
    team.close()
    team.backend.close()
    return latents


@pytest.fixture(scope="module")
def alone(engines: Path) -> np.ndarray:
    engine = engine_over(None, Bundle.open(engines), rungs=(1, 2))
    slot = engine.admit(CLIP)
    return finish(engine)[slot]


@pytest.mark.parametrize(("parallel", "count"), [("cfg2", 2), ("dsp2", 2), ("dsp3", 3), ("cfg2xdsp2", 4)])
def test_gpus_make_the_clip_of_one_without_a_race(
    gpus: Callable[..., tuple[Team, Any]], engines: Path, alone: np.ndarray, parallel: str, count: int
) -> None:
    team, cudart = gpus(parallel, count)
    assert isinstance(team.transport, PeerTransport)
    assert len(cudart.reached) == count * (count - 1)
    assert_same(made(team, engines), alone)
    assert cudart.races == []
    placement = team.placement
    assert cudart.peer_bytes == 2 * evaluation_bytes(2, placement.guidance, placement.sequence)
    assert cudart.contexts == set(range(count))


def test_each_wait_that_is_left_out_is_a_race(gpus: Callable[..., tuple[Team, Any]], engines: Path) -> None:
    """Each of a whole evaluation: none is there for nothing."""
    team, cudart = gpus("dsp2", 2)
    engine = engine_over(team, Bundle.open(engines))
    engine.admit(dataclasses.replace(CLIP, settings=settings_of("jit", steps=30)))
    engine.tick()
    before = cudart.waits
    engine.tick()
    each = cudart.waits - before
    assert each == 2 * 2 * 2 + 1 + 1, "two switches a block, both ways; the inputs; the velocity"
    assert cudart.races == []
    for index in range(each):
        cudart.left_out = cudart.waits + index
        engine.tick()
        assert cudart.races, f"nobody missed wait {index}"
        cudart.left_out = None
        cudart.uses.clear()
        engine.tick()
        cudart.races.clear()
    engine.tick()
    assert cudart.races == []
    team.close()


def test_events_that_are_not_recorded_before_they_are_waited_for_are_races(
    gpus: Callable[..., tuple[Team, Any]], engines: Path
) -> None:
    """Threads that do not meet: a wait that comes first waits for the event as it was before, for nothing."""
    team, cudart = gpus("dsp2", 2)
    hub = team.transport._hub  # type: ignore[attr-defined]
    meet, seen = hub.meet, []

    def early(ranks: frozenset[int]) -> None:
        meet(ranks)
        seen.append(ranks)

    hub.meet = early
    record = cudart.cudaEventRecord
    cudart.cudaEventRecord = lambda event, stream: (0,) if len(seen) > 6 else record(event, stream)
    made(team, engines)
    assert cudart.races


def test_a_gpu_that_fails_stops_the_others(gpus: Callable[..., tuple[Team, Any]], engines: Path) -> None:
    team, cudart = gpus("cfg2xdsp2", 4)
    engine = engine_over(team, Bundle.open(engines))
    engine.admit(CLIP)
    engine.tick()
    copy = cudart.cudaMemcpy3DPeerAsync

    def failing(asked: Any, stream: int) -> tuple:
        return (2,) if cudart.streams[stream] == 2 else copy(asked, stream)

    cudart.cudaMemcpy3DPeerAsync = failing
    with pytest.raises(StivError, match="device 2 of the clip stopped .cudaMemcpy3DPeerAsync failed: cudaError"):
        finish(engine)
    team.close()


def test_gpus_that_cannot_be_let_reach_each_other(
    gpus: Callable[..., tuple[Team, Any]], stand_ins: SimpleNamespace, engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = (stand_ins.open(engines, racing(stand_ins.cudart)(gpus=2), device=index)[0] for index in (0, 1))
    assert one.cuda.reach(one.cuda)
    monkeypatch.setattr(one.cuda.api, "cudaDeviceEnablePeerAccess", lambda *_: (217,), raising=False)
    with pytest.raises(BackendError, match="^GPU 0 could not be let reach GPU 1 .CUDA error 217.$"):
        one.cuda.reach(other.cuda)
    monkeypatch.setattr(one.cuda.api, "cudaDeviceCanAccessPeer", lambda *_: (0, 0), raising=False)
    assert not one.cuda.reach(other.cuda), "copies then go through the host, which CUDA does"
