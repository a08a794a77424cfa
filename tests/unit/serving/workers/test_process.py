"""Which device a worker has, and how it begins and ends."""

from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.workers import process
from stiv_deploy.serving.workers.process import Worker, device_of


@pytest.mark.parametrize(
    ("backend", "gpus", "device"), [(None, 4, 3), (None, 0, 1), (None, None, 1), ("onnxruntime", 4, 1)]
)
def test_each_worker_has_its_gpu(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, gpus: int | None, device: int
) -> None:
    monkeypatch.setattr(process, "count_gpus", lambda: gpus)
    settings = ServeSettings(bundle=Path("b"), data=Path("d"), name="m", backend=backend, device=1)
    assert device_of(settings, 2) == device


def test_a_worker_tells_that_it_lives_and_signs_off(place: Any) -> None:
    stop, worker = Event(), Worker(place.settings, name="w")
    thread = Thread(target=worker.run, args=(stop,))
    thread.start()
    for _ in range(600):
        if any(each.ready for each in place.store.workers()):
            break
        stop.wait(0.05)
    (state,) = place.store.workers()
    assert (state.id, state.ready) == ("w", True)
    stop.set()
    thread.join()
    assert place.store.workers() == []


def test_an_orphan_from_the_start_ends(place: Any) -> None:
    """Its parent was killed before it could look who that is."""
    Worker(place.settings, name="w", parent=2**22 + 1).run(Event())
    assert place.store.workers() == []
