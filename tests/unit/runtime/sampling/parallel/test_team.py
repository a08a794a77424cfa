"""Clips made by several devices in threads are those of one, and a device that stops is one clear error."""

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_clips import finish, sample_of, settings_of
from mixing_toys import mixing_graphs
from teams import CLIPS, assert_same, clips_of, cpus, engine_over, evaluation_bytes
from toys import Toy, make_bundle

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.bundle.verified import Machine
from stiv_deploy.runtime.errors import BackendError, DeviceError, RequestError, StivError
from stiv_deploy.runtime.sampling.parallel import opening, transport
from stiv_deploy.runtime.sampling.parallel.placement import Placement
from stiv_deploy.runtime.sampling.parallel.team import check_alike
from stiv_deploy.runtime.sampling.parallel.transport import HostTransport, Hub
from stiv_deploy.runtime.sampling.student import one_row


@pytest.fixture(scope="module")
def alone(mixing_path: Any) -> dict[int, np.ndarray]:
    """What one device makes of :data:`CLIPS`, by whole blocks."""
    return clips_of(None, Bundle.open(mixing_path))


FORMS = [(1, "dsp1"), (2, "cfg2"), (2, "dsp2"), (3, "cfg3"), (3, "dsp3"), (4, "cfg2xdsp2"), (6, "cfg3xdsp2"), (8, None)]


@pytest.mark.parametrize(("count", "form"), FORMS, ids=[form or "automatic" for _, form in FORMS])
def test_clips_of_several_devices_are_those_of_one(
    mixing: Bundle, alone: dict[int, np.ndarray], count: int, form: str | None
) -> None:
    """Odd frames, shares of different sizes, rows that join, leave and move between groups.

    Halves compute what the block does, in its order.
    """
    team = cpus(mixing, count, form)
    found = clips_of(team, mixing)
    team.close()
    assert found.keys() == alone.keys()
    for slot, latents in alone.items():
        assert_same(found[slot], latents)


def test_the_toy_tells_apart_what_is_out_of_place(mixing: Bundle, alone: dict[int, np.ndarray]) -> None:
    """Frames or positions that are not exchanged give another clip: the comparison above can fail."""
    team = cpus(mixing, 2, "dsp2")
    bind = team.transport.bind

    def lazy(name: str, parts: Any) -> Callable[[], None]:
        call = bind(name, parts)
        done: list[bool] = []

        def once() -> None:
            if "to_positions 1" in name and done:
                team.transport._hub.meet(frozenset({0, 1}))  # type: ignore[attr-defined]
                return
            done.append(True)
            call()

        return once

    team.transport.bind = lazy  # type: ignore[method-assign]
    found = clips_of(team, mixing)
    team.close()
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(np.stack([found[slot] for slot in alone]), np.stack(list(alone.values())))


@pytest.mark.parametrize(("guidance", "sequence"), [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3)])
def test_bytes_moved_are_those_of_the_formula(
    mixing: Bundle, guidance: int, sequence: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[HostTransport] = []
    init = HostTransport.__init__

    def keep(self: HostTransport, *arguments: Any) -> None:
        init(self, *arguments)
        made.append(self)

    monkeypatch.setattr(HostTransport, "__init__", keep)
    team = cpus(mixing, guidance * sequence, f"cfg{guidance}xdsp{sequence}")
    engine = engine_over(team, mixing)
    engine.admit(sample_of(settings_of("sit", steps=2)))
    finish(engine)
    team.close()
    assert sum(each.received for each in made) == 2 * evaluation_bytes(3, guidance, sequence)


@pytest.mark.parametrize("seed", range(3))
def test_random_delays_change_nothing(mixing: Bundle, alone: dict[int, np.ndarray], seed: int) -> None:
    team = cpus(mixing, 4, "cfg2xdsp2")
    chance = random.Random(seed)
    meet = team.transport._hub.meet  # type: ignore[attr-defined]

    def slow(ranks: frozenset[int]) -> None:
        time.sleep(chance.random() * 0.002)
        meet(ranks)
        time.sleep(chance.random() * 0.002)

    team.transport._hub.meet = slow  # type: ignore[attr-defined]
    found = clips_of(team, mixing)
    team.close()
    for slot, latents in alone.items():
        assert_same(found[slot], latents)


def test_two_sizes_and_many_clips_one_after_another(mixing: Bundle) -> None:
    team = cpus(mixing, 2, "dsp2")
    engines = [engine_over(team, mixing), engine_over(team, mixing)]
    plain = engine_over(None, mixing)
    for clip in CLIPS:
        for engine in engines:
            slot = engine.admit(clip)
            right = plain.admit(clip)
            assert_same(finish(engine)[slot], finish(plain)[right])
    del engine, engines
    hub = team.transport._hub  # type: ignore[attr-defined]
    until = time.monotonic() + 5
    while hub.given and time.monotonic() < until:
        time.sleep(0.01)
    assert not hub.given, "nothing is kept of engines that are gone"
    team.close()


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_device_that_stops_in_the_middle_is_one_error_and_nothing_hangs(mixing: Bundle, rank: int) -> None:
    team = cpus(mixing, 4, "cfg2xdsp2")
    engine = engine_over(team, mixing)
    engine.admit(CLIPS[0])
    engine.tick()
    backends = [team.backend, *(member._backend for member in team._members.values())]  # type: ignore[attr-defined]
    _break(backends[rank])
    other = engine_over(team, mixing)
    other.admit(CLIPS[0])
    started = time.monotonic()
    with pytest.raises(StivError, match="graph mixed_01 failed") as caught:
        finish(other)
    assert time.monotonic() - started < 20
    assert "\n" not in str(caught.value)
    if rank:
        assert f"device {rank} of the clip stopped" in str(caught.value)
    with pytest.raises(StivError, match="graph mixed_01 failed"):
        finish(engine)
    team.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("stiv device")]


def _break(backend: Any) -> None:
    bind = backend.bind

    def broken(graph: str, *buffers: Any) -> Callable[[], None]:
        def fail() -> None:
            raise StivError(f"graph {graph} failed in ONNX Runtime: out of memory")

        return fail if graph == "mixed_01" else bind(graph, *buffers)

    backend.bind = broken


def test_settled_is_who_has_done_all_that_it_was_told(mixing: Bundle) -> None:
    team, done = cpus(mixing, 3, "cfg3"), []
    for rank, member in team._members.items():
        member._backend.synchronize = lambda rank=rank: (time.sleep(0.02), done.append(rank))  # type: ignore[attr-defined]
    team.settle()
    assert sorted(done) == [1, 2]
    team.close()


def test_one_that_does_not_answer_is_not_waited_for_for_ever() -> None:
    hub = Hub(stall=0.05)
    with pytest.raises(DeviceError, match="^a device has not answered for 0.05 s; run it again, or name fewer --dev"):
        hub.meet(frozenset({0, 1}))
    hub.fail(DeviceError("device 3 of the clip stopped"))
    with pytest.raises(DeviceError, match="device 3"):
        hub.meet(frozenset({0, 2}))


def test_a_bundle_without_halves_names_the_command(toy_bundle: Bundle) -> None:
    with pytest.raises(
        BackendError, match="its blocks are whole, which devices cannot share; make the bundle again .*halves"
    ):
        cpus(toy_bundle, 2, "dsp2")
    team = cpus(toy_bundle, 2, "cfg2")
    plain, both = engine_over(None, toy_bundle), engine_over(team, toy_bundle)
    slots = plain.admit(CLIPS[0]), both.admit(CLIPS[0])
    assert_same(finish(both)[slots[1]], finish(plain)[slots[0]])
    team.close()


def test_a_clip_of_fewer_frames_than_devices(mixing: Bundle) -> None:
    team = cpus(mixing, 4, "dsp4")
    with pytest.raises(RequestError, match="3 token frames of 16 tokens cannot be shared by 4 devices"):
        engine_over(team, mixing)
    team.close()


def test_devices_that_are_not_alike(mixing: Bundle) -> None:
    machine = Machine(backend="tensorrt", device="NVIDIA L40S (SM 89)", driver="1", library="TensorRT 11", engines="a")
    placement = Placement(devices=("0", "1"), guidance=2, sequence=1)
    check_alike([machine, machine], placement)
    other = machine.model_copy(update={"device": "NVIDIA H100 (SM 90)"})
    with pytest.raises(
        BackendError, match="^--devices 0,1: 0 is NVIDIA L40S .* with TensorRT 11, 1 is NVIDIA H100 .* alike$"
    ):
        check_alike([machine, other], placement)
    cpu = OnnxRuntimeBackend(mixing, threads=1).machine
    indexed = [cpu.model_copy(update={"device": f"CUDA device {index}"}) for index in (0, 11)]
    check_alike(indexed, placement)


@pytest.mark.parametrize(
    ("devices", "backend", "fault"),
    [
        (["0", "1"], "onnxruntime", "--devices 0 is a GPU, --backend onnxruntime runs on the CPU"),
        (["cpu", "cpu"], "tensorrt", "--devices cpu and --backend tensorrt do not fit"),
        (["cpu", "0"], None, "devices must be alike"),
        (["70", "71"], "tensorrt", "backend tensorrt does not work here"),
    ],
)
def test_devices_that_are_not_there_or_do_not_fit(
    mixing: Bundle, devices: list[str], backend: str | None, fault: str
) -> None:
    with pytest.raises(BackendError) as caught:
        opening.open_team(mixing, devices, backend=backend)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


def test_threads_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    placement = Placement(devices=("cpu",) * 3, guidance=1, sequence=3)
    monkeypatch.setattr(opening, "thread_count", lambda threads: threads or 0)
    monkeypatch.setattr(opening.os, "cpu_count", lambda: 8)
    assert opening.shared_threads(placement, 7) == 2
    assert opening.shared_threads(placement, None) == 2
    assert opening.shared_threads(placement, 1) == 1
    assert opening.shared_threads(Placement(devices=("0", "1"), guidance=2, sequence=1), 3) == 3


def test_the_host_reaches_a_buffer_or_copies_it(mixing: Bundle) -> None:
    backend = OnnxRuntimeBackend(mixing, threads=1)
    buffer = backend.upload(np.arange(4, dtype=np.float32))
    for reachable in (True, False):
        if not reachable:
            backend.host_view = lambda _: None  # type: ignore[method-assign]
        raw = transport.HostBytes(backend, buffer)
        raw.fetch()
        raw.array[:4] = np.array([7], np.float32).view(np.uint8)
        raw.put()
        assert list(backend.read(buffer)) == [7, 1, 2, 3]
        backend.write(buffer, np.arange(4, dtype=np.float32))


def test_a_flow_maps_scale_and_target_time_reach_all_devices(tmp_path: Path) -> None:
    student = Student(guidance=(2.0, 6.0), flow_map=True)
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", Toy(student=student), mixing_graphs()))
    clips = [sample_of(one_row(settings_of("jit", guidance_scale=scale), student), seed=int(scale)) for scale in (2, 6)]
    team = cpus(bundle, 4, "cfg2xdsp2")
    plain, shared = (engine_over(each, bundle, 2, rungs=(2,)) for each in (None, team))
    slots = [(plain.admit(clip), shared.admit(clip)) for clip in clips]
    right, found = finish(plain), finish(shared)
    team.close()
    for one, other in slots:
        assert_same(found[other], right[one])
