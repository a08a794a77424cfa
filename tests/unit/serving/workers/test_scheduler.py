"""The scheduler on a real engine: clips come, leave, pause and go on between steps, and none notices the others."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.serving.errors import StoreError
from stiv_deploy.serving.store.jobs import State
from stiv_deploy.serving.store.sqlite import SqliteJobStore
from stiv_deploy.serving.workers import scheduler as module
from stiv_deploy.serving.workers.scheduler import Scheduler

KINDS: tuple[dict[str, Any], ...] = (
    {"num_inference_steps": 6, "guidance_scale": 2.0},
    {"num_inference_steps": 3, "guidance_mode": "sit", "seed": 2, "time_shift": 2.0},
    {"num_inference_steps": 4, "guidance_mode": "none", "solver": "heun", "seed": 3},
    {"num_inference_steps": 5, "guidance_renorm": False, "seed": 4, "prompt": "digit right"},
)


def sheets(place: Any, worker: Scheduler, finished: Callable[..., None], gap: int) -> list[bytes]:
    """Contact sheets of ``KINDS``, of which one comes every ``gap`` turns."""
    jobs = []
    for kind in KINDS:
        jobs.append(place.ask(**kind)["id"])
        for _ in range(gap):
            worker.turn()
    finished(worker)
    return [taken(place, job) for job in jobs]


def taken(place: Any, job: str) -> bytes:
    """The contact sheet of ``job``, which is then deleted, so that an equal request is made again."""
    sheet: bytes = place.sheet(job)
    place.client.delete(f"/v1/videos/{job}")
    return sheet


def test_clips_of_every_kind_join_and_leave_between_steps(place: Any, finished: Callable[..., None]) -> None:
    alone = sheets(place, place.worker(), finished, 40)
    assert sheets(place, place.worker(), finished, 0) == alone
    assert sheets(place, place.worker(), finished, 1) == alone


def test_a_short_job_does_not_wait_for_a_long_one(place: Any) -> None:
    worker = place.worker()
    long = place.ask(num_inference_steps=500)["id"]
    for _ in range(5):
        worker.turn()
    short = place.ask(num_inference_steps=3)["id"]
    for _ in range(10):
        worker.turn()
    worker.close()
    assert place.look(short)["status"] == "completed"
    assert place.look(long)["status"] == "in_progress"


@pytest.mark.parametrize("how", ["cancel", "delete"])
def test_a_cancelled_clip_leaves_before_the_next_step(place: Any, how: str) -> None:
    """DELETE does not leave the device at work."""
    worker = place.worker()
    job = place.ask(num_inference_steps=500)["id"]
    for _ in range(3):
        worker.turn()
    address = f"/v1/videos/{job}"
    answer = place.client.post(f"{address}/cancel") if how == "cancel" else place.client.delete(address)
    assert answer.status_code == 200
    assert not worker.turn()  # nothing runs any more
    worker.close()
    assert job not in place.results.files.list()
    if how == "cancel":
        found = place.look(job)
        assert (found["status"], found["error"]["code"]) == ("failed", "cancelled")


def test_cancelled_while_it_is_written(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's word is the last one: a result that nobody may have is not left behind."""
    write = module.write_files

    def cancelled_meanwhile(clip: Any, *rest: Any) -> None:
        write(clip, *rest)
        place.store.cancel(clip.job.id)

    monkeypatch.setattr(module, "write_files", cancelled_meanwhile)
    worker = place.worker()
    job = place.ask()["id"]
    while worker.turn():
        pass
    worker.close()
    assert place.look(job)["error"]["code"] == "cancelled"
    assert job not in place.results.files.list()


def test_a_result_that_cannot_be_written_fails_its_job_alone(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_files", full)
    worker = place.worker()
    job = place.ask()["id"]
    while worker.turn():
        pass
    worker.close()
    assert place.look(job)["error"]["code"] == "storage_error"


@pytest.mark.parametrize("priority", [5, 0])
def test_urgent_and_short_clips_go_first_and_paused_ones_go_on(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None], priority: int
) -> None:
    place = place_of(bundle_path, slots=1)
    worker = place.worker()
    worker.prepare()
    calm = place.ask(num_inference_steps=40)["id"]
    for _ in range(3):
        worker.turn()
    urgent = place.ask(num_inference_steps=2, priority=priority, seed=2)["id"]
    for _ in range(2):
        worker.turn()
    assert place.look(calm)["status"] == "in_progress"
    finished(worker)
    assert place.look(urgent)["stiv"]["priority"] == priority
    first = [place.store.get(job).finished for job in (urgent, calm)]
    assert first == sorted(first)
    paused = taken(place, calm)
    again = place.ask(num_inference_steps=40)["id"]
    finished(place.worker("other"))
    assert place.sheet(again) == paused  # as if it had never been


def test_a_killed_workers_clip_goes_on_from_its_latents(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(bundle_path, latents_every=4)
    whole = place.ask(num_inference_steps=10, solver="heun")["id"]
    finished(place.worker())
    whole = taken(place, whole)
    job = place.ask(num_inference_steps=10, solver="heun")["id"]
    dead = place.worker("dead")
    for _ in range(12):  # 6 steps, 4 of them kept
        dead.turn()
    place.store.release("dead")  # as after kill -9
    assert int(place.results.latents(job)["position"]) == 8
    admitted = []
    admit = module.Lane.admit
    monkeypatch.setattr(
        module.Lane, "admit", lambda lane, clip: (admitted.append(dataclasses.replace(clip)), admit(lane, clip))
    )
    finished(place.worker())
    assert [(clip.pause.position, clip.step) for clip in admitted] == [(8, 4)]
    assert place.sheet(job) == whole
    assert place.look(job)["stiv"]["attempts"] == 2
    assert place.results.latents(job) is None


def test_a_killed_workers_clip_goes_on_along_its_residuals(
    place_of: Callable[..., Any], skipping_path: Path, finished: Callable[..., None]
) -> None:
    """Of eight steps the fifth and the seventh are skipped; it is killed after the fourth, and three are kept."""
    place = place_of(skipping_path, latents_every=3)
    asked = {"num_inference_steps": 8, "solver": "euler", "skip_blocks": True}
    whole = place.ask(**asked)["id"]
    finished(place.worker())
    whole = taken(place, whole)
    job = place.ask(**asked)["id"]
    dead = place.worker("dead")
    for _ in range(5):
        dead.turn()
    place.store.release("dead")  # as after kill -9
    kept = place.results.latents(job)
    assert int(kept["position"]) == 3
    assert kept["residuals"].shape[:2] == (2, 2)
    finished(place.worker())
    assert place.sheet(job) == whole
    assert place.look(job)["stiv"]["attempts"] == 2


def test_what_does_not_finish_in_time_is_given_back(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None]
) -> None:
    place = place_of(bundle_path, grace_seconds=0.0)
    worker, stop = place.worker(), Event()
    job = place.ask(num_inference_steps=12, solver="heun")["id"]
    for _ in range(3):  # within a step
        worker.turn()
    stop.set()
    worker.run(stop)
    found = place.look(job)
    assert (found["status"], found["stiv"]["attempts"], found["stiv"]["step"]) == ("queued", 0, 2)
    finished(place.worker())
    assert place.look(job)["status"] == "completed"


def test_two_workers_share_a_queue(place: Any) -> None:
    workers = [place.worker(name) for name in ("a", "b")]
    jobs = [place.ask(seed=seed)["id"] for seed in range(9)]
    while any([worker.turn() for worker in workers]):
        pass
    for worker in workers:
        worker.close()
    assert {place.look(job)["status"] for job in jobs} == {"completed"}
    assert {place.look(job)["stiv"]["attempts"] for job in jobs} == {1}


def test_sizes_take_turns_and_a_third_one_gets_its_place(
    place: Any, finished: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUANTUM", 1e-9)
    worker = place.worker()
    jobs = [place.ask(num_inference_steps=200, size=size)["id"] for size in ("8x8", "12x4")]
    for _ in range(20):
        worker.turn()
    third = place.ask(num_inference_steps=2, size="4x4")["id"]
    for _ in range(20):
        worker.turn()
    worker._told = 0.0
    worker.turn()
    steps = [place.look(job)["stiv"]["step"] for job in jobs]
    assert min(steps) > 5  # by turns
    assert place.look(third)["status"] == "queued"
    place.clock.now += module.PATIENCE + 1
    place.client.post(f"/v1/videos/{jobs[0]}/cancel")
    finished(worker)
    assert place.look(third)["status"] == "completed"


def test_a_clip_that_is_not_finite_fails_alone(place: Any, finished: Callable[..., None]) -> None:
    worker = place.worker()
    good, bad = place.ask()["id"], place.ask(guidance_scale=1000.0, guidance_renorm=False)["id"]
    noise = place.bundle.manifest.model
    assert noise.name == "toy"
    worker.turn()
    (lane,) = worker._lanes.values()
    slot = next(slot for slot, clip in lane._running.items() if clip.job.id == bad)
    lane._engine.change(slot, np.full(lane._engine.shape, np.nan, np.float32))
    finished(worker)
    assert place.look(good)["status"] == "completed"
    assert place.look(bad)["error"]["code"] == "not_finite"


def test_a_request_that_cannot_be_prepared_fails_alone(
    place: Any, finished: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad request does not kill the worker."""
    worker = place.worker()
    clip = worker._workshop.clip

    def prepared(job: Any, request: str) -> Any:
        if job.priority == 9:
            raise RuntimeError("a fault of ours")
        return clip(job, request)

    monkeypatch.setattr(worker._workshop, "clip", prepared)
    bad, good = place.ask(priority=9)["id"], place.ask()["id"]
    finished(worker)
    assert place.look(bad)["error"]["code"] == "internal_error"
    assert place.look(good)["status"] == "completed"


def test_the_store_outlives_its_users(place: Any, finished: Callable[..., None]) -> None:
    """Jobs are there after a restart, waiting ones and finished ones."""
    done = place.ask()["id"]
    finished(place.worker())
    waiting = place.ask(seed=2)["id"]
    again = SqliteJobStore(Path(place.settings.jobs))
    assert again.get(done).state == State.COMPLETED
    assert [job.id for job in again.waiting()] == [waiting]
    again.close()


def test_latents_of_another_bundle_are_not_gone_on_from(
    place_of: Callable[..., Any], bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(bundle_path, latents_every=2)
    job = place.ask(num_inference_steps=50)["id"]
    dead = place.worker("dead")
    for _ in range(6):
        dead.turn()
    place.store.release("dead")
    arrays = place.results.latents(job)
    place.results.save_latents(job, **(arrays | {"bundle": np.array("0" * 64)}))
    worker, admitted = place.worker(), []
    monkeypatch.setattr(module.Lane, "admit", lambda _lane, clip: admitted.append(clip))
    worker.turn()
    worker.close()
    assert [(clip.pause, clip.step) for clip in admitted] == [(None, 0)]


def test_decoding_waits_for_nobody_and_can_be_cancelled(
    place_of: Callable[..., Any], bundle_with: Callable[..., Path]
) -> None:
    """A large clip is decoded in parts, between the steps of the others."""
    place = place_of(bundle_with())
    worker = place.worker()
    large = place.ask(num_inference_steps=1, size="16x16")["id"]
    steps = place.ask(num_inference_steps=50, size="16x16", seed=2)["id"]
    parts = worker._workshop.decoding

    def slowly(clip: Any, latents: np.ndarray) -> Any:
        for frames in parts(clip, latents):
            for _ in range(100):
                yield frames

    worker._workshop.decoding = slowly
    for _ in range(20):
        worker.turn()
    assert place.look(large)["status"] == "in_progress"
    (lane,) = worker._lanes.values()
    assert [clip.step for clip in lane.running] == [20]
    place.client.delete(f"/v1/videos/{large}")
    worker.turn()
    assert len(worker._decoding) == 0
    assert place.look(steps)["status"] == "in_progress"
    worker.close()


def test_the_last_try_of_a_suspect_is_alone(place: Any, finished: Callable[..., None]) -> None:
    """A request that kills workers takes no other with it for ever."""
    suspect = place.ask(num_inference_steps=4)["id"]
    for name in ("first", "second"):
        assert place.store.claim(suspect, name) is not None
        place.store.release(name)
    others = [place.ask(seed=seed, num_inference_steps=4)["id"] for seed in (2, 3)]
    worker = place.worker()
    for _ in range(3):
        worker.turn()
        assert place.store.owned("w") == {suspect}
    finished(worker)
    assert {place.look(job)["status"] for job in (suspect, *others)} == {"completed"}


def test_a_size_without_memory_gets_fewer_slots_or_fails_alone(
    place: Any, finished: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, asked = place.worker(), []
    engine = worker._workshop.engine

    def limited(size: Any, slots: int) -> Any:
        asked.append((size.width, slots))
        if slots > (1 if size.width == 8 else 0):
            raise RuntimeError("out of memory")
        return engine(size, slots)

    monkeypatch.setattr(worker._workshop, "engine", limited)
    small, large = place.ask()["id"], place.ask(size="12x12")["id"]
    finished(worker)
    assert asked == [(8, 3), (8, 1), (12, 3), (12, 1)]
    assert place.look(small)["status"] == "completed"
    assert place.look(large)["error"]["code"] == "size_unavailable"


def test_who_comes_late_takes_nothing_from_who_was_in_time(place: Any, finished: Callable[..., None]) -> None:
    """A worker that stood still until its lease was over finishes a job that another has made."""
    job = place.ask(num_inference_steps=3)["id"]
    late = place.worker("late")
    for _ in range(3):
        late.turn()
    place.store.release("late")
    finished(place.worker("in time"))
    sheet = place.sheet(job)
    late._drop_lost = lambda: None  # as if it had been asleep in the middle of its last step
    finished(late)
    assert place.look(job)["status"] == "completed"
    assert place.sheet(job) == sheet


def test_a_hundred_jobs_with_cancels_deletes_and_deaths(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None]
) -> None:
    """None is lost, none is made twice, and nothing stays behind."""
    place, random = place_of(bundle_path, latents_every=2, slots=3), np.random.default_rng(0)
    jobs: list[str] = []
    ended: dict[str, str] = {}
    workers = {name: place.worker(name) for name in ("a", "b")}
    for number in range(100):
        size = ("8x8", "8x8", "12x4", "4x8")[random.integers(4)]
        steps, priority = int(random.integers(1, 9)), int(random.integers(3))
        jobs.append(place.ask(seed=number, size=size, num_inference_steps=steps, priority=priority)["id"])
        for _ in range(int(random.integers(6))):
            workers[("a", "b")[random.integers(2)]].turn()
        chosen = jobs[random.integers(len(jobs))]
        if random.random() < 0.2 and chosen not in ended:
            how = ("cancel", "delete")[random.integers(2)]
            done = place.store.get(chosen).state == State.COMPLETED
            getattr(place.service, how)("local", chosen)
            ended[chosen] = "completed" if done and how == "cancel" else how
            place.clock.now += 1
        if random.random() < 0.05:
            name = ("a", "b")[random.integers(2)]
            workers[name].close()
            place.store.release(name)
            workers[name] = place.worker(name)
    place.clock.now += module.PATIENCE + 1
    while any([worker.turn() for worker in workers.values()]) or place.store.waiting():
        place.clock.now += 1
    for worker in workers.values():
        worker.close()
    for job in jobs:
        found, how = place.store.get(job), ended.get(job)
        if how == "delete":
            assert found is None
        else:
            assert found.state == (State.FAILED if how == "cancel" else State.COMPLETED), found
        assert (job in place.results.files.list()) == (found is not None and found.state == State.COMPLETED)
    assert place.results.sweep(place.store) == 0


@pytest.mark.parametrize("method", ["claim", "complete", "advance", "owned", "version"])
def test_a_store_that_fails_for_a_while_costs_no_job(place: Any, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """A disk that was full: what ran begins again, and counts as tried once."""
    monkeypatch.setattr(module, "RETRY", 0.0)
    worker, stop, failed = place.worker(), Event(), []
    call = getattr(worker._store, method)

    def full(*arguments: Any) -> Any:
        if len(failed) < 3 and place.store.counts()["in_progress"] + (method == "claim"):
            failed.append(method)
            raise StoreError("full", full=True)
        return call(*arguments)

    monkeypatch.setattr(worker._store, method, full)
    monkeypatch.setattr(module, "TOLD", 0.0)
    job = place.ask(num_inference_steps=6)["id"]
    thread = Thread(target=worker.run, args=(stop,))
    thread.start()
    for _ in range(600):
        if place.look(job)["status"] == "completed":
            break
        stop.wait(0.05)
    stop.set()
    thread.join()
    found = place.look(job)
    assert (found["status"], found["stiv"]["attempts"], len(failed)) == ("completed", 1, 3)


def test_latents_that_cannot_be_kept_cost_nothing(
    place_of: Callable[..., Any], bundle_path: Path, finished: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = place_of(bundle_path, latents_every=1)

    def full(*_: Any, **__: Any) -> None:
        raise OutputError("No space left on device")

    monkeypatch.setattr(place.results, "save_latents", full)
    job = place.ask(num_inference_steps=3)["id"]
    finished(place.worker())
    assert place.look(job)["status"] == "completed"
