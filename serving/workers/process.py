"""A worker as a process: ``python -m stiv_deploy.serving.workers.process INDEX SETTINGS-AS-JSON NAME PARENT-PID``.

It ends by SIGTERM, and when its parent is gone; with 2, and a line on standard error, if it cannot start, and with 1 if
something ends it later.
"""

import logging
import os
import secrets
import signal
import sys
import time
from contextlib import suppress
from threading import Event, Thread

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.backends.cuda import count_gpus
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import StivError, one_line
from stiv_deploy.runtime.pipeline.verification import proven_backend
from stiv_deploy.runtime.sampling.parallel.opening import open_each, shared_threads, team_of
from stiv_deploy.runtime.sampling.parallel.placement import Placement
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.serving.errors import StoreError
from stiv_deploy.serving.logs import set_up
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.jobs import LEASE, WorkerState
from stiv_deploy.serving.store.opening import open_results, open_store
from stiv_deploy.serving.tracing import open_spans
from stiv_deploy.serving.workers.floor import Floor, names_of
from stiv_deploy.serving.workers.scheduler import Scheduler
from stiv_deploy.serving.workers.sharing import misfit, placement_of
from stiv_deploy.serving.workers.workshop import Workshop

CPU = "onnxruntime"
"""The backend that has no GPU to be told."""
BEAT = LEASE / 5
log = logging.getLogger(__name__)


def device_of(settings: ServeSettings, index: int) -> int:
    """The GPU of worker number ``index``; all are on the CPU where that is asked for, or there is nothing else."""
    return settings.device if settings.backend == CPU or not count_gpus() else settings.device + index


def open_backends(settings: ServeSettings, index: int, bundle: Bundle, placement: Placement | None) -> list[Backend]:
    """The proven backends of worker number ``index``: of its one device, or of those of ``placement`` by rank.

    Raises :class:`~stiv_deploy.runtime.errors.BackendError`, and what
    :func:`~stiv_deploy.runtime.pipeline.verification.proven_backend` does.
    """
    threads = settings.threads if placement is None else shared_threads(placement, settings.threads)

    def proven(name: str | None, device: int) -> Backend:
        return proven_backend(bundle, name, threads, device, strict=settings.strict)

    if placement is None:
        return [proven(settings.backend, device_of(settings, index))]
    return open_each(placement, settings.backend, proven)


class Worker:
    """Worker number ``index`` of a service: a scheduler for each device, and a thread that tells that it lives.

    It ends when ``parent``, the process that it is to work for, is not its parent any more.
    """

    def __init__(
        self, settings: ServeSettings, index: int = 0, name: str | None = None, parent: int | None = None
    ) -> None:
        self._parent = os.getppid() if parent is None else parent
        self.name = name or f"worker-{index}-{secrets.token_hex(4)}"
        self._store = open_store(settings.jobs)
        bundle = Bundle.open(settings.bundle)
        placement = placement_of(settings, bundle)
        self._workshops = [Workshop(bundle, each) for each in open_backends(settings, index, bundle, placement)]
        self._team: Team | None = None
        floor = Floor(names_of(self.name, len(self._workshops)))
        if placement is not None:
            self._team = team_of(bundle.manifest, placement, [each.backend for each in self._workshops])
            floor = Floor(floor.names, self._team, lambda size: misfit(bundle, placement, size) is None)
        self._floor, self._spans = floor, open_spans(settings, worker=self.name)
        results = open_results(settings.data, settings.results)
        self._schedulers = [
            Scheduler(self._store, results, each, settings, name, spans=self._spans, floor=floor, rank=rank)
            for rank, (name, each) in enumerate(zip(floor.names, self._workshops, strict=True))
        ]
        self._failed: list[BaseException] = []
        self.ready = False
        """Whether it takes jobs, or has done so."""

    @property
    def idle_seconds(self) -> float:
        """Seconds since it last got on with its work, or looked for some, with that device where that is longest."""
        return time.time() - min(each.turned for each in self._schedulers)

    def run(self, stop: Event) -> None:
        """Work until ``stop`` is set."""
        ended = Event()
        pulse = Thread(target=self._live, args=(ended, stop), daemon=True)
        pulse.start()
        try:
            for scheduler in self._schedulers:
                scheduler.prepare()
            self.ready = True
            self._beat()
            self._work(stop)
        finally:
            ended.set()
            pulse.join()
            with suppress(StoreError):
                for name in self._floor.names:
                    self._store.sign_off(name)
            self._close()
            self._store.close()
            self._spans.close()

    def _work(self, stop: Event) -> None:
        """Let each scheduler work until ``stop`` is set, the first one in this thread; what ends one ends all."""
        leader, *others = self._schedulers
        threads = [Thread(target=self._follow, args=(each, stop)) for each in others]
        for thread in threads:
            thread.start()
        try:
            leader.run(stop)
        finally:
            stop.set()
            self._floor.give_back()
            for thread in threads:
                thread.join()
        for error in self._failed:
            raise error

    def _follow(self, scheduler: Scheduler, stop: Event) -> None:
        try:
            scheduler.run(stop)
        except BaseException as error:
            self._failed.append(error)
            stop.set()

    def _close(self) -> None:
        leader, *others = self._workshops
        for each in others:
            each.free()
        if self._team is not None:
            self._team.close()
        leader.close()

    def _live(self, ended: Event, stop: Event) -> None:
        """Tell that we live, and free what others left; an orphan stops."""
        while not ended.is_set():
            try:
                self._beat()
                self._store.expire_leases()
            except Exception:  # a busy store is no reason to die
                log.exception("%s cannot tell that it lives", self.name)
            if os.getppid() != self._parent:
                stop.set()
            ended.wait(BEAT)

    def _beat(self) -> None:
        for name, workshop, scheduler in zip(self._floor.names, self._workshops, self._schedulers, strict=True):
            turned, device = scheduler.turned, workshop.backend.device
            self._store.beat(WorkerState(name, os.getpid(), time.time(), turned, self.ready, device))


def main() -> int:
    """Run the worker that the arguments describe; its exit code."""
    stop = Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches the parent, which tells us
    index, settings, name = int(sys.argv[1]), ServeSettings.model_validate_json(sys.argv[2]), sys.argv[3]
    parent = int(sys.argv[4])  # told, not asked for: it may have been gone before we began
    set_up(as_json=settings.log_json)
    worker = None
    try:
        worker = Worker(settings, index, name, parent)
        worker.run(stop)
    except StivError as error:
        sys.stderr.write(f"error: {one_line(str(error))}\n")
        return 1 if worker is not None and worker.ready else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
