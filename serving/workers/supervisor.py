"""The workers of a service: started, watched, started again when they die, and ended in good order."""

import logging
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from threading import Event, Thread

from stiv_deploy.serving.errors import StoreError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.jobs import JobStore
from stiv_deploy.serving.workers.floor import names_of

WATCH = 0.2
"""Seconds between two looks at the workers."""
PAUSES = (0.0, 1.0, 5.0, 30.0)
"""Seconds before a worker is started again, by how many times it has died soon after its start."""
SOON = 60.0
USAGE = 2
"""Exit code of a worker that cannot start at all."""
HUNG = 900.0
"""Seconds without getting on after which a worker is killed: more than the making of any engine takes."""
SLACK = 8.0
"""Seconds that a worker may take to end beyond those that it has to finish its jobs; then it is killed."""
COMMAND = (sys.executable, "-m", "stiv_deploy.serving.workers.process")
log = logging.getLogger(__name__)


class _Watched:
    """Worker number ``index``: its process, and how often it has died."""

    def __init__(self, settings: ServeSettings, index: int) -> None:
        self._settings, self._index = settings, index
        self.name = ""
        self._deaths = 0
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.name = f"worker-{self._index}-{secrets.token_hex(4)}"
        command = [*COMMAND, str(self._index), self._settings.model_dump_json(), self.name, str(os.getpid())]
        self.starts += 1
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self._started = time.monotonic()

    @property
    def names(self) -> tuple[str, ...]:
        """Those of its schedulers."""
        return names_of(self.name, len(self._settings.devices))

    def pause(self) -> float:
        """Seconds to wait before the next start, after a death."""
        self._deaths = self._deaths + 1 if time.monotonic() < self._started + SOON else 0
        return PAUSES[min(self._deaths, len(PAUSES) - 1)]


class Supervisor:
    """Keeps the workers of ``settings`` alive; ``failed`` is called if one cannot start (its line is on stderr)."""

    def __init__(self, settings: ServeSettings, store: JobStore, failed: Callable[[], None]) -> None:
        self._settings, self._store, self._failed = settings, store, failed
        self._stop = Event()
        self._watched: list[_Watched] = []
        self._thread = Thread(target=self._watch, daemon=True)

    @property
    def pids(self) -> list[int]:
        """Ids of the workers' processes."""
        return [each.process.pid for each in self._watched]

    def start(self) -> None:
        """Start all workers."""
        self._watched = [_Watched(self._settings, index) for index in range(self._settings.workers)]
        self._thread.start()

    def _watch(self) -> None:
        due: dict[int, float] = {}
        while not self._stop.wait(WATCH):
            for index, each in enumerate(self._watched):
                if index in due:
                    if time.monotonic() >= due[index]:
                        del due[index]
                        each.start()
                elif each.process.poll() is not None:
                    if each.process.returncode == USAGE and each.starts == 1:
                        self._failed()
                        return
                    self._bury(each)
                    due[index] = time.monotonic() + each.pause()
            self._kill_hung()

    def _kill_hung(self) -> None:
        """Kill workers that live and get on with nothing; they are then buried as others are."""
        try:
            states = {each.id: each for each in self._store.workers()}
        except StoreError:
            return
        for each in self._watched:
            there = [state for name in each.names if (state := states.get(name)) is not None and state.ready]
            idle = max((state.beat - state.turned for state in there), default=0.0)
            if idle > HUNG:
                log.error("%s has not got on for %d s; it is killed", each.name, idle)
                each.process.kill()

    def _bury(self, each: _Watched) -> None:
        """Give the jobs of a worker that died to others."""
        log.error("%s died (exit code %d); its jobs go on elsewhere", each.name, each.process.returncode)
        try:
            for name in each.names:
                self._store.release(name)
                self._store.sign_off(name)
        except StoreError as error:  # its leases end by themselves
            log.error("the jobs of %s wait until its leases end (%s)", each.name, error)

    def stop(self) -> None:
        """End all workers: each finishes or gives back what it has; who does not is killed."""
        self._stop.set()
        self._thread.join()
        for each in self._watched:
            each.process.terminate()
        until = time.monotonic() + self._settings.grace_seconds + SLACK
        for each in self._watched:
            try:
                each.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
                self._bury(each)
