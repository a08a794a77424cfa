"""The supervisor: workers that die, hang or do not end; their processes are stand-ins."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stiv_deploy.serving.store.jobs import WorkerState
from stiv_deploy.serving.workers import supervisor as module
from stiv_deploy.serving.workers.supervisor import Supervisor

SLEEPS = "import time; time.sleep(600)"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(600)"


@pytest.fixture
def watching(place: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Supervisor]]:
    """Starts a supervisor of one worker, a process that runs ``code``."""
    made: list[Supervisor] = []

    def start(code: str, failed: Callable[[], None] = lambda: None) -> Supervisor:
        monkeypatch.setattr(module, "COMMAND", (sys.executable, "-S", "-c", code))
        monkeypatch.setattr(module, "PAUSES", (0.0,))
        made.append(Supervisor(place.settings.model_copy(update={"grace_seconds": 0.0}), place.store, failed))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        for watched in each._watched:
            watched.process.kill()
        each.stop()


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(1_200):
        if what():
            return
        time.sleep(0.05)
    raise AssertionError


def test_who_dies_is_started_again_and_its_jobs_go_on(place: Any, watching: Callable[..., Supervisor]) -> None:
    supervisor = watching(SLEEPS)
    job, (watched,) = place.ask()["id"], supervisor._watched
    name = watched.name
    assert place.store.claim(job, name) is not None
    watched.process.kill()
    wait_for(lambda: watched.name != name and watched.process.poll() is None)
    assert place.look(job)["status"] == "queued"


def test_jobs_of_all_devices_of_who_dies_go_on(place: Any, watching: Callable[..., Supervisor]) -> None:
    place.settings = place.settings.model_copy(update={"devices": ("cpu", "cpu")})
    supervisor = watching(SLEEPS)
    job, (watched,) = place.ask()["id"], supervisor._watched
    name = watched.name
    assert place.store.claim(job, f"{name}.1") is not None
    watched.process.kill()
    wait_for(lambda: watched.name != name and watched.process.poll() is None)
    assert place.look(job)["status"] == "queued"


def test_who_hangs_is_killed_and_started_again(place: Any, watching: Callable[..., Supervisor]) -> None:
    """It gives signs of life by another thread, so that its leases would be renewed for ever."""
    supervisor = watching(SLEEPS)
    (watched,) = supervisor._watched
    name, now = watched.name, place.clock.now
    place.store.beat(WorkerState(name, 1, now, now - module.HUNG - 1, False, "cpu"))
    time.sleep(3 * module.WATCH)
    assert watched.name == name  # it makes its first engine, which takes as long as it takes
    place.store.beat(WorkerState(name, 1, now, now - module.HUNG - 1, True, "cpu"))
    wait_for(lambda: watched.name != name)
    assert [each.id for each in place.store.workers()] == []


def test_who_does_not_end_is_killed(
    place: Any, watching: Callable[..., Supervisor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.SLACK + place.settings.grace_seconds + 5 < 30  # with what open connections have
    monkeypatch.setattr(module, "SLACK", 0.2)
    supervisor = watching(DEAF)
    (watched,) = supervisor._watched
    supervisor.stop()
    assert watched.process.returncode is not None


def test_a_start_that_fails_ends_the_server_but_not_one_that_failed_later(watching: Callable[..., Supervisor]) -> None:
    failed = threading.Event()
    watching("raise SystemExit(2)", failed.set)
    assert failed.wait(60)
    failed.clear()
    supervisor = watching(SLEEPS, failed.set)
    module.COMMAND = (sys.executable, "-S", "-c", "raise SystemExit(2)")
    (watched,) = supervisor._watched
    watched.process.kill()
    wait_for(lambda: watched.starts > 2)
    assert not failed.is_set()
