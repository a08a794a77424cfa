"""A service on the toy bundle, in this process: its API by a test client, its worker by turns or in a thread."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import fsspec
import pytest
from starlette.testclient import TestClient

sys.path.append(str(Path(__file__).parents[1]))
from toys import bundle_of, bundle_path, bundle_with, skipping_path, toy

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.manifest import Preview
from stiv_deploy.runtime.bundle.tuned import Tuned, TunedGrid
from stiv_deploy.serving.api.app import create_app
from stiv_deploy.serving.api.guard import Tokens
from stiv_deploy.serving.api.service import Service
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.spans import Spans
from stiv_deploy.serving.store.opening import open_results, open_store
from stiv_deploy.serving.workers.scheduler import Scheduler
from stiv_deploy.serving.workers.workshop import Workshop

__all__ = ["bundle_of", "bundle_path", "bundle_with", "skipping_path", "toy"]
ADDRESS = "http://127.0.0.1:8000"


class Clock:
    """Time that tests let pass."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Place:
    """All parts of a service of a bundle in one folder; each worker has its own connection to the store."""

    def __init__(self, bundle: Path, folder: Path, tokens: Tokens, spans: Spans | None = None, **settings: Any) -> None:
        self.clock, self.spans = Clock(), spans
        self.settings = ServeSettings(bundle=bundle, data=folder, name="toy", **({"free_bytes": 0} | settings))
        self.bundle = Bundle.open(bundle)
        self.results = open_results(folder, self.settings.results)
        self.store = open_store(self.settings.jobs, self.clock)
        self.service = Service(self.settings, self.bundle, self.store, self.results, self.clock, spans)
        self.client = TestClient(create_app(self.service, tokens), base_url=ADDRESS)
        self.stores = [self.store]

    def worker(self, name: str = "w") -> Scheduler:
        """A new worker."""
        backend = OnnxRuntimeBackend(self.bundle, threads=1)
        workshop = Workshop(self.bundle, backend)
        self.stores.append(open_store(self.settings.jobs, self.clock))
        return Scheduler(self.stores[-1], self.results, workshop, self.settings, name, self.clock, spans=self.spans)

    def ask(self, **body: Any) -> dict[str, Any]:
        """The resource of a new job."""
        answer = self.client.post("/v1/videos", json={"prompt": "digit three moving left", "seed": 1} | body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def look(self, job: str) -> dict[str, Any]:
        """The resource of a job."""
        found: dict[str, Any] = self.client.get(f"/v1/videos/{job}").json()
        return found

    def sheet(self, job: str) -> bytes:
        """The contact sheet of a completed job: its frames, lossless."""
        answer = self.client.get(f"/v1/videos/{job}/content?variant=spritesheet")
        assert answer.status_code == 200, answer.text
        content: bytes = answer.content
        return content

    @contextmanager
    def working(self) -> Iterator[None]:
        """A worker in a thread."""
        stop, worker = Event(), self.worker()
        thread = Thread(target=worker.run, args=(stop,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def finish(worker: Scheduler) -> None:
    """Let ``worker`` work until there is nothing to do, and all is written."""
    while worker.turn():
        pass
    worker.close()


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of a place in this process's memory."""
    yield "memory://videos/here"
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


@pytest.fixture
def place_of(tmp_path: Path) -> Iterator[Callable[..., Place]]:
    """Makes services."""
    made: list[Place] = []

    def make(bundle: Path, tokens: Tokens | None = None, **settings: Any) -> Place:
        made.append(Place(bundle, tmp_path / "jobs", tokens or Tokens(), **settings))
        return made[-1]

    yield make
    for place in made:
        for store in place.stores:
            store.close()


@pytest.fixture
def place(place_of: Callable[..., Place], bundle_path: Path) -> Place:
    """A service of the toy bundle, without a worker."""
    return place_of(bundle_path)


@pytest.fixture
def finished() -> Callable[[Scheduler], None]:
    """See :func:`finish`."""
    return finish


FITTED_WEIGHTS = ((1.25, -0.25), (1.5, -0.625), (1.75, -0.5))


@pytest.fixture
def tuned_path(bundle_with: Callable[..., Path]) -> Path:
    """A bundle with other solvers, shifts and late stretches for few steps and for many."""
    path = bundle_with()
    manifest = Bundle.open(path).manifest
    grids = [
        TunedGrid(
            solver=solver,
            steps=steps,
            time_shift=shift,
            late_stretch=stretch,
            solver_weights=weights,
            tried=0.1,
            error=0.1,
        )
        for solver, steps, shift, stretch, weights in (
            ("ab2", 4, 1.5, 1.25, FITTED_WEIGHTS),
            ("euler", 40, 2.5, 1.0, ()),
            ("heun", 40, 3.5, 1.75, ()),
        )
    ]
    tuned = Tuned(bundle=manifest.bundle_hash, clips=2, reference_error=0.0, grids=grids)
    write_manifest(path, manifest.model_copy(update={"tuned": tuned}))
    return path


@pytest.fixture
def previewed_path(bundle_with: Callable[..., Path]) -> Path:
    """A bundle whose latents have colours."""
    path = bundle_with()
    manifest = Bundle.open(path).manifest
    preview = Preview(weights=tuple((1.0, 0.5, 0.1 * index) for index in range(4)), bias=(0.0, 0.1, 0.2), error=0.0)
    write_manifest(path, manifest.model_copy(update={"preview": preview}))
    return path
