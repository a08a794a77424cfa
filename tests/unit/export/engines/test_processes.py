"""Builder processes that crash, hang, talk nonsense or run out of memory."""

import sys
import threading
import time

import pytest

from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.runtime.errors import EngineError

JOB = EngineJob(graph="head", onnx="head.onnx", plan="head.plan", backend="tensorrt-rtx", sm="89", profiles=())


def processes(program: str) -> BuilderProcesses:
    """Builder processes that run ``program`` instead of the worker."""
    return BuilderProcesses((sys.executable, "-c", program))


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os; os.kill(os.getpid(), 11)", "the builder process ended by signal SIGSEGV (no message)"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "the builder process was killed (most likely out of memory); try --jobs 1",
        ),
        ("import sys; print('a\\nlast words', file=sys.stderr); sys.exit(3)", "with exit status 3 (last words)"),
        ("print('{')", "with exit status 0"),
        ("print('[1]')", "with exit status 0"),
        ("""print('{"unknown": 1}')""", "with exit status 0"),
    ],
)
def test_crash_is_one_line(program: str, error: str) -> None:
    result = processes(program).run(JOB)
    assert result.error is not None
    assert error in result.error
    assert "\n" not in result.error


def test_answer_is_the_workers_json() -> None:
    program = "import json, sys; print(json.dumps({'seconds': 2.5, 'bytes': len(json.load(sys.stdin)['graph'])}))"
    result = processes(program).run(JOB)
    assert (result.seconds, result.bytes, result.error) == (2.5, 4, None)


def test_stop_ends_running_builders_and_starts_no_more() -> None:
    builders = processes("import time; time.sleep(60)")
    results = []
    thread = threading.Thread(target=lambda: results.append(builders.run(JOB)))
    thread.start()
    while not builders._running:
        time.sleep(0.01)
    builders.stop()
    thread.join(timeout=20)
    assert results[0].error is not None
    with pytest.raises(EngineError, match="the build was stopped"):
        builders.run(JOB)
