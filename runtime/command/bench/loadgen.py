"""Scenarios of MLPerf Inference by the official LoadGen, which runs in a process of its own.

LoadGen ends the process that it is in when a query fails, and cannot be stopped; so it asks for samples over a pipe,
and the clips are made here. The pipe's time, some ten microseconds, is part of what LoadGen measures.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from stiv_deploy.runtime.command.bench.mllog import LoadgenResult, Scenario, result_of
from stiv_deploy.runtime.errors import MeasurementError, OutputError, one_line
from stiv_deploy.runtime.files import check_folder, check_no_bundle

CHILD = "stiv_deploy.runtime.command.bench.loadgen_process"
END = "end"
LEAST_QUERIES: dict[Scenario, int] = {"singlestream": 64, "offline": 248}
"""What early stopping needs for the 90th percentile, and the least of MLPerf's text to video."""
LEAST_SECONDS = 600.0
"""The least duration of MLPerf's text to video."""


class Order(NamedTuple):
    """A run: at least so many queries and seconds, over so many prompts; clips a second are a guess for offline."""

    scenario: Scenario
    queries: int
    seconds: float
    prompts: int
    expected: float


def check_loadgen() -> None:
    """Raise ``ModuleNotFoundError`` if LoadGen is not there."""
    import_module("mlperf_loadgen")


def check_logs(folder: Path | None) -> None:
    """Raise :class:`OutputError` if ``folder`` cannot become one of LoadGen's logs: it is a new one, or empty."""
    if folder is None:
        return
    check_folder(folder, "choose another --loadgen-logs")
    check_no_bundle(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder}: holds files already, which the logs would replace; name a new --loadgen-logs")


def run_loadgen(order: Order, make: Callable[[Sequence[int]], object], batch: int, folder: Path) -> LoadgenResult:
    """Let LoadGen ask for clips, which ``make`` makes of the numbers of prompts, at most ``batch`` at once.

    Its logs go into ``folder``. Raises what ``make`` does, and :class:`MeasurementError` where LoadGen fails.
    """
    check_loadgen()
    with _process(order, folder) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == END:
                break
            asked = json.loads(line)
            for start in range(0, len(asked), batch):
                part = asked[start : start + batch]
                make(part)
                process.stdin.write("\n" * len(part))
                process.stdin.flush()
        if process.wait():
            said = process.stderr.read() if process.stderr is not None else ""
            raise MeasurementError(f"LoadGen failed: {one_line(said, 200) or f'it ended with {process.returncode}'}")
    return result_of(folder, order.scenario)


@contextmanager
def _process(order: Order, folder: Path) -> Iterator[Any]:
    """LoadGen's process, which ends with the block, however that ends."""
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    arguments = json.dumps({**order._asdict(), "folder": str(folder)})
    with subprocess.Popen([sys.executable, "-m", CHILD, arguments], text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()
