"""Schedulers of one process: clips alone on a device each, and one clip on all of them while the others stand still."""

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[2]))
from mixing_toys import mixing_graphs
from teams import assert_same
from toys import Toy, make_bundle

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.errors import DeviceError, StivError
from stiv_deploy.runtime.sampling.parallel.opening import team_of
from stiv_deploy.serving.store.jobs import ATTEMPTS, Size
from stiv_deploy.serving.store.opening import open_store
from stiv_deploy.serving.workers import scheduler as module
from stiv_deploy.serving.workers.floor import Floor, names_of
from stiv_deploy.serving.workers.process import Worker
from stiv_deploy.serving.workers.scheduler import Scheduler
from stiv_deploy.serving.workers.sharing import misfit, placement_of
from stiv_deploy.serving.workers.workshop import Workshop

SIZE = Size(4, 8, 8)
ROWS = (2, 3, 4, 8, 9)
ALONE, TOGETHER = 1.0, 0.6
"""Seconds of an evaluation, as these tests have measured them."""


class Crew:
    """Two devices of ``place``, their schedulers, and the latents that they make, by job."""

    def __init__(self, place: Any, monkeypatch: pytest.MonkeyPatch, parallel: str) -> None:
        self.place = place
        placement = placement_of(place.settings, place.bundle)
        assert placement is not None
        assert str(placement) == parallel
        shops = [Workshop(place.bundle, OnnxRuntimeBackend(place.bundle, threads=1)) for _ in range(2)]
        self.team = team_of(place.bundle.manifest, placement, [each.backend for each in shops])
        fits = partial(misfit, place.bundle, placement)
        self.floor = Floor(names_of("w", 2), self.team, lambda size: fits(size) is None, clock=place.clock)
        self.schedulers = []
        for rank, shop in enumerate(shops):
            place.stores.append(open_store(place.settings.jobs, place.clock))
            arguments = (place.stores[-1], place.results, shop, place.settings, self.floor.names[rank], place.clock)
            self.schedulers.append(Scheduler(*arguments, floor=self.floor, rank=rank))
            self.schedulers[-1].prepare()
            self.schedulers[-1]._lanes[SIZE]._rows = ROWS[-1]  # as if batches had been found to be worth it
        for rows in ROWS:
            self.floor._seconds[SIZE, rows, 1] = ALONE * max(1.0, rows / 2)
            self.floor._seconds[SIZE, rows, 2] = TOGETHER * max(1.0, rows / 2)
        monkeypatch.setattr(self.floor, "measure", lambda *_: None)
        self.latents: dict[str, np.ndarray] = {}
        write = module.write_files

        def kept(clip: Any, frames: np.ndarray, latents: np.ndarray, *rest: Any) -> None:
            self.latents[clip.job.id] = latents
            write(clip, frames, latents, *rest)

        monkeypatch.setattr(module, "write_files", kept)

    def batches_pay(self) -> None:
        """Let more rows cost little more."""
        for rows in ROWS:
            self.floor._seconds[SIZE, rows, 1] = ALONE * (1 + rows / 20)

    def turn(self, times: int = 1) -> bool:
        """A turn of each, the one that does not lead first; whether anybody had work."""
        return any([each.turn() for _ in range(times) for each in reversed(self.schedulers)])

    def finish(self) -> None:
        while self.turn():
            pass
        for each in self.schedulers:
            each.close()

    def forms(self) -> dict[str, float]:
        """How many clips were made by so many devices."""
        return {key.label: count for key, count in self.place.store.tallies().items() if key.metric == "clips"}

    def steps(self) -> dict[str, int]:
        return {clip.job.id: clip.step for each in self.schedulers for _, clip in each._clips()}


@pytest.fixture(scope="session")
def mixing_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle with halves; do not write into it."""
    return make_bundle(tmp_path_factory.mktemp("mixing") / "bundle", Toy(), mixing_graphs())


FORMS = pytest.mark.parametrize("crew", ["cfg2xdsp1", "cfg1xdsp2"], indirect=True)


@pytest.fixture
def crew(
    request: pytest.FixtureRequest,
    place_of: Callable[..., Any],
    mixing_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Crew]:
    form = getattr(request, "param", "cfg1xdsp2")
    place = place_of(mixing_path, devices=("cpu", "cpu"), parallel=form)
    made = Crew(place, monkeypatch, form)
    yield made
    made.team.close()


KINDS: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 6, "guidance_scale": 2.0},
    {"num_inference_steps": 3, "guidance_mode": "sit", "seed": 2, "time_shift": 2.0},
    {"num_inference_steps": 4, "guidance_mode": "none", "solver": "heun", "seed": 3},
)


def latents_alone(place: Any, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """What one device makes of a request."""
    made: list[np.ndarray] = []
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_files", lambda _clip, _frames, latents, *_: made.append(latents))
        worker = place.worker("one")
        job = place.ask(**kind)["id"]
        while worker.turn():
            pass
        worker.close()
    place.client.delete(f"/v1/videos/{job}")
    return made[0]


@FORMS
def test_a_lone_clip_is_made_by_all_devices_and_is_that_of_one(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [latents_alone(crew.place, kind, monkeypatch) for kind in KINDS]
    jobs = []
    for kind in KINDS:
        jobs.append(crew.place.ask(**kind)["id"])
        while crew.turn():
            pass
    crew.finish()
    assert crew.forms() == {"1": len(KINDS), "2": len(KINDS)}
    for job, latents in zip(jobs, right, strict=True):
        assert_same(crew.latents[job], latents)
        assert crew.place.look(job)["status"] == "completed"


@pytest.fixture(scope="session")
def skipping_mixing_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, whose steps can skip the blocks."""
    return make_bundle(tmp_path_factory.mktemp("mixing") / "skipping", Toy(skips=True), mixing_graphs())


def test_a_clip_that_skips_blocks_is_left_to_one_device(
    place_of: Callable[..., Any], skipping_mixing_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is what it is there alone; one that skips none has all."""
    place = place_of(skipping_mixing_path, devices=("cpu", "cpu"), parallel="cfg1xdsp2")
    plain: dict[str, Any] = {"num_inference_steps": 6, "solver": "euler"}
    skipping = plain | {"skipped_steps": [3, 5]}
    right = latents_alone(place, skipping, monkeypatch)
    crew = Crew(place, monkeypatch, "cfg1xdsp2")
    try:
        jobs = [place.ask(**each)["id"] for each in (skipping, plain)]
        first, second = map(place.store.get, jobs)
        assert crew.floor.chosen([first], place.clock()) is None
        assert crew.floor.chosen([second], place.clock()) == second.id
        crew.finish()
        np.testing.assert_array_equal(crew.latents[first.id], right)
        assert crew.place.look(second.id)["status"] == "completed"
    finally:
        crew.team.close()


def test_many_clips_are_made_alone_by_a_device_each(crew: Crew) -> None:
    """Six at once: a device's time goes further where it shares nothing."""
    crew.batches_pay()
    jobs = [crew.place.ask(seed=seed, num_inference_steps=4)["id"] for seed in range(4)]
    crew.turn(2)
    assert [len(each._lanes[SIZE].running) for each in crew.schedulers] == [2, 2]
    crew.finish()
    assert crew.forms() == {"1": len(jobs)}


def test_others_stand_still_for_an_urgent_clip_and_go_on_as_if_they_had_not(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = [{"num_inference_steps": 9, "seed": seed} for seed in range(4)]
    right = [latents_alone(crew.place, kind, monkeypatch) for kind in kinds]
    crew.batches_pay()
    calm = [crew.place.ask(**kind)["id"] for kind in kinds]
    crew.turn(3)
    before = crew.steps()
    assert set(before) == set(calm)
    urgent = crew.place.ask(num_inference_steps=5, seed=9, deadline_s=0.8 * 5 * ALONE)["id"]
    crew.turn(4)
    now = crew.steps()
    assert now.pop(urgent) in (3, 4)
    behind = [now[job] - before[job] for job in calm]
    assert max(behind) <= 1, "they may have been in the middle of a turn"
    crew.finish()
    assert crew.forms() == {"1": 2 * len(calm), "2": 1}
    for job, latents in zip(calm, right, strict=True):
        assert_same(crew.latents[job], latents)
    assert crew.place.look(urgent)["status"] == "completed"


def test_after_a_clip_of_all_the_others_have_as_long_again(crew: Crew) -> None:
    crew.batches_pay()
    calm = [crew.place.ask(seed=seed, num_inference_steps=60)["id"] for seed in range(4)]
    crew.turn(3)
    assert set(crew.steps()) == set(calm)
    due = 0.8 * 3 * ALONE
    crew.place.ask(num_inference_steps=3, seed=9, deadline_s=due)
    crew.turn(2)
    assert crew.floor.held
    crew.place.clock.now += 2.0
    crew.turn(3)
    assert not crew.floor.held
    second = crew.place.ask(num_inference_steps=3, seed=10, deadline_s=due)["id"]
    crew.turn(1)
    assert not crew.floor.held, "it would stop them twice in a row"
    third = crew.place.ask(num_inference_steps=3, seed=11, deadline_s=due)["id"]
    for job in (second, third):
        crew.place.client.delete(f"/v1/videos/{job}")
    crew.place.clock.now += 2.1
    last = crew.place.ask(num_inference_steps=3, seed=12, deadline_s=due)["id"]
    crew.turn(2)
    assert crew.floor.held
    assert last in crew.steps()
    for job in calm:
        crew.place.client.delete(f"/v1/videos/{job}")
    crew.finish()


@FORMS
def test_a_clip_of_all_devices_pauses_for_a_higher_priority_and_goes_on_from_its_very_latents(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one place where a clip may change its form: between two steps, by what a pause keeps."""
    kind = {"num_inference_steps": 8, "solver": "ab2", "guidance_scale": 2.0}
    right = latents_alone(crew.place, kind, monkeypatch)
    calm = crew.place.ask(**kind)["id"]
    crew.turn(4)
    (lane,) = [each._together for each in crew.schedulers if each._together is not None]
    before = lane._engine.pause(0)
    assert before.position in (3, 4)
    monkeypatch.setattr(crew.floor, "chosen", lambda *_: None)
    urgent = [crew.place.ask(num_inference_steps=3, seed=seed, priority=5)["id"] for seed in (5, 6)]
    admitted = []
    admit = module.Lane.admit
    monkeypatch.setattr(
        module.Lane,
        "admit",
        lambda lane, clip: (admitted.append((lane.devices, clip.job.id, clip.pause)), admit(lane, clip)),
    )
    crew.turn(1)
    crew.turn(1)
    assert not crew.floor.held
    ((devices, after),) = [(devices, pause) for devices, job, pause in admitted if job == calm]
    assert devices == 1
    assert after.position == before.position
    for name in ("latents", "inputs", "velocity"):
        assert (getattr(after, name) == getattr(before, name)).all(), name
    crew.finish()
    assert_same(crew.latents[calm], right)
    assert {crew.place.look(job)["status"] for job in (calm, *urgent)} == {"completed"}


def test_a_cancelled_clip_of_all_devices_leaves_before_the_next_step(crew: Crew) -> None:
    job = crew.place.ask(num_inference_steps=500)["id"]
    crew.turn(3)
    assert crew.floor.held
    crew.place.client.post(f"/v1/videos/{job}/cancel")
    crew.turn(1)
    assert not crew.floor.held
    assert crew.steps() == {}
    crew.finish()


def test_what_does_not_finish_in_time_is_given_back(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    job = crew.place.ask(num_inference_steps=40, solver="heun")["id"]
    crew.turn(3)
    assert crew.floor.held
    stop = Event()
    stop.set()
    for each in crew.schedulers:
        monkeypatch.setattr(each, "_soonest", lambda: float("inf"))
        each.run(stop)
    assert not crew.floor.held
    found = crew.place.look(job)
    assert (found["status"], found["stiv"]["attempts"]) == ("queued", 0)
    assert found["stiv"]["step"] > 0


def test_where_devices_cannot_share_a_size_each_makes_its_own(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise DeviceError("out of memory")

    monkeypatch.setattr(crew.schedulers[0], "_open_together", full)
    job = crew.place.ask()["id"]
    crew.finish()
    assert not crew.floor.held
    assert crew.forms() == {"1": 1}
    assert crew.place.look(job)["status"] == "completed"


def test_the_last_try_of_a_suspect_is_alone_in_the_process(crew: Crew) -> None:
    suspect = crew.place.ask(num_inference_steps=4)["id"]
    for name in range(ATTEMPTS - 1):
        assert crew.place.store.claim(suspect, str(name)) is not None
        crew.place.store.release(str(name))
    others = [crew.place.ask(seed=seed, num_inference_steps=4)["id"] for seed in (2, 3)]
    waited = []
    while {crew.place.look(job)["status"] for job in (suspect, *others)} != {"completed"}:
        crew.turn()
        owned = {job for name in crew.floor.names for job in crew.place.store.owned(name)}
        waited.append(suspect in owned)
        assert owned == {suspect} or suspect not in owned
    assert any(waited)
    crew.finish()


def test_the_leader_has_all_devices_only_between_two_pieces_of_the_others_work() -> None:
    floor, told = Floor(("a", "b")), []
    begun, go_on = Event(), Event()

    def work() -> None:
        with floor.device(1) as mine:
            told.append(mine)
            begun.set()
            go_on.wait(5)
            told.append(floor.held)  # wanted, and not yet given

    thread = Thread(target=work)
    thread.start()
    begun.wait(5)
    leader = Thread(target=floor.take)
    leader.start()
    time.sleep(0.02)
    assert leader.is_alive()
    go_on.set()
    leader.join()
    thread.join()
    with floor.device(1) as mine:
        told.append(mine)
    floor.give_back()
    with floor.device(1) as mine:
        told.append(mine)
    assert told == [True, True, False, True]


def test_what_ends_one_device_ends_the_worker(
    place_of: Callable[..., Any], mixing_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(mixing_path, devices=("cpu", "cpu"), threads=2)
    worker = Worker(place.settings, name="w")

    def broken() -> bool:
        raise DeviceError("it has fallen off the bus")

    monkeypatch.setattr(worker._schedulers[1], "turn", broken)
    with pytest.raises(DeviceError, match="fallen off"):
        worker.run(Event())
    assert place.store.workers() == []


def test_clips_that_are_too_small_are_refused_with_the_line_that_says_why(
    place_of: Callable[..., Any], mixing_path: Path
) -> None:
    place = place_of(mixing_path)
    for count, parallel, words in (
        (
            6,
            "dsp6",
            "4 frames of 8x8: 4 token frames of 16 tokens cannot be shared by 6 devices; give --parallel with dsp4",
        ),
        (2, "cfg3", "is of 3 devices"),
    ):
        chosen = place.settings.model_copy(update={"devices": ("cpu",) * count, "parallel": parallel})
        with pytest.raises(StivError) as caught:
            placement_of(chosen, place.bundle)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_deadline_that_only_all_devices_meet_is_accepted(crew: Crew) -> None:
    """And refused where not even they do, or a size is not theirs."""
    crew.place.store.measure(crew.place.bundle.hash, crew.floor.measured())
    body = {"prompt": "digit three moving left", "num_inference_steps": 10, "deadline_s": 0.8 * 10 * ALONE}
    assert crew.place.client.post("/v1/videos", json=body).status_code == 200
    late = crew.place.client.post("/v1/videos", json=body | {"deadline_s": 0.4 * 10 * ALONE})
    assert (late.status_code, late.json()["error"]["code"]) == (429, "deadline_cannot_be_met")


def test_a_worker_of_two_devices(place_of: Callable[..., Any], mixing_path: Path) -> None:
    """The whole of it, in threads, by what is measured: which form that is depends on the machine."""
    place = place_of(mixing_path, devices=("cpu", "cpu"), parallel="dsp2", threads=2)
    place.clock.now = time.time()
    stop, worker = Event(), Worker(place.settings, name="w")
    thread = Thread(target=worker.run, args=(stop,))
    thread.start()
    jobs = [place.ask(seed=seed, num_inference_steps=5)["id"] for seed in range(6)]
    for _ in range(600):
        if {place.look(job)["status"] for job in jobs} == {"completed"}:
            break
        stop.wait(0.05)
    assert sorted(each.id for each in place.store.workers()) == ["w", "w.1"]
    stop.set()
    thread.join()
    assert {place.look(job)["status"] for job in jobs} == {"completed"}
    assert place.store.workers() == []
    measured = place.store.measurements(place.bundle.hash)
    assert {each.devices for each in measured if each.rows} == {1, 2}
    text = place.client.get("/metrics").text
    assert 'stiv_step_seconds{devices="2",rows="2",size="4x8x8"}' in text
    assert "stiv_clips_total{devices=" in text
    assert place.client.get("/v1/models").json()["data"][0]["stiv"]["parallel"] == "cfg1xdsp2"
