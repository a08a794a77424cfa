"""Builder processes: one for each engine, so that a crash or an exhausted memory costs one engine, not the build."""

import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.runtime.errors import EngineError, one_line

KILLED = -getattr(signal, "SIGKILL", 9)  # which Windows has not
WORKER = (sys.executable, "-P", "-m", "stiv_deploy.export.engines.worker")


class BuilderProcesses:
    """Runs builder processes, each by ``command``, and can end them all."""

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = tuple(command)
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def _start(self) -> "subprocess.Popen[str]":
        with self._lock:
            if self._stopped:
                raise EngineError("the build was stopped")
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process only, which then ends its children
            )
            self._running.add(process)
        return process

    def run(self, job: EngineJob) -> EngineResult:
        """Build ``job`` in a process of its own; a crash becomes the result's error."""
        process = self._start()
        try:
            answer, complaints = process.communicate(job.to_json())
        finally:
            process.kill()
            with self._lock:
                self._running.discard(process)
        try:
            return EngineResult.from_json(answer)
        except (ValueError, TypeError):
            return EngineResult(error=_crash(process.returncode, complaints))

    def stop(self) -> None:
        """End all builder processes; none can be started after."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()


def _crash(status: int, complaints: str) -> str:
    """What to say of a builder process that ended without an answer."""
    last = one_line((complaints.strip().splitlines() or ["no message"])[-1], 300)
    if status == KILLED:
        return "the builder process was killed (most likely out of memory); try --jobs 1"
    how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return f"the builder process ended {how} ({last})"
