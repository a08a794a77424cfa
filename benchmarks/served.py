"""A service as a process of its own, for benchmarks: started, waited for, looked into, ended."""

import json
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from stiv_deploy.serving.workers.scheduler import TOLD

STIV = (sys.executable, "-c", "import sys; from stiv_deploy.runtime.command.main import main; sys.exit(main())")
OPTIONS = ("--port", "0", "--threads", "1", "--free-gib", "0", "--rate", "1e6", "--queue", "100000")
PATIENCE = 300.0
"""Seconds after which what has to happen counts as a failure of the run."""


class Served:
    """A running server, its ``address`` and its ``data`` folder."""

    def __init__(self, process: subprocess.Popen[str], data: Path) -> None:
        self._process, self.data = psutil.Process(process.pid), data
        assert process.stdout is not None
        line = process.stdout.readline()
        assert " at http://" in line, f"the server did not start: {line!r}"
        self.address = line.partition(" at ")[2].partition(",")[0]

    def get(self, path: str) -> Any:
        """The JSON at ``path``, whatever its status."""
        try:
            with urllib.request.urlopen(self.address + path, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)

    def wait_ready(self) -> None:
        """Wait until jobs are made."""
        self.wait_until(lambda: self.get("/ready")["status"] == "ok")

    def wait_until(self, done: Any) -> None:
        """Wait until ``done()`` is true; ``AssertionError`` if it never is."""
        until = time.monotonic() + PATIENCE
        while not done():
            assert time.monotonic() < until, "it took too long"
            time.sleep(0.05)

    def metrics(self) -> dict[tuple[str, ...], float]:
        """All metrics, by name and labels."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            return {(each.name, *each.labels.values()): each.value for family in families for each in family.samples}

    def counted(self) -> dict[tuple[str, ...], float]:
        """All metrics once the workers have told what they have done so far, which they do now and then."""
        time.sleep(4 * TOLD)
        return self.metrics()

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What the job store answers to ``query``."""
        with closing(sqlite3.connect(self.data / "jobs.sqlite", timeout=30, isolation_level=None)) as store:
            return store.execute(query).fetchall()

    def workers(self) -> list[psutil.Process]:
        """Processes of the workers."""
        return [each for each in self._process.children() if each.is_running()]

    def usage(self) -> dict[str, float]:
        """MiB of the server and of its largest worker, and file descriptors and threads of the server."""
        sizes = [0]
        for worker in self.workers():
            with suppress(psutil.NoSuchProcess):  # it was killed just now
                sizes.append(worker.memory_info().rss)
        process = self._process
        found = {"server_mib": process.memory_info().rss / 2**20, "worker_mib": max(sizes) / 2**20}
        return found | {"descriptors": process.num_fds(), "threads": process.num_threads()}


@contextmanager
def serving(bundle: Path, data: Path, options: Sequence[str] = (), command: Sequence[str] = STIV) -> Iterator[Served]:
    """A ready server of ``bundle``; its end must be in good order and within 30 seconds."""
    words = [*command, "serve", str(bundle), "--data", str(data), *OPTIONS, *options]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        server = Served(process, data)
        server.wait_ready()
        yield server
        process.terminate()
        assert process.wait(30) == 0, "the server did not end well"
    finally:
        if process.poll() is None:
            for each in psutil.Process(process.pid).children():
                each.kill()
        process.kill()
        process.wait()
