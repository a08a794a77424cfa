"""Worker processes: results as they come, expected errors as results, and a crash that takes nobody along."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.stiv_ref.data.pool import run_jobs
from stiv_deploy.stiv_ref.errors import VideoError

WORK = """
import os, signal
from stiv_deploy.stiv_ref.errors import VideoError

def work(job):
    if job == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "broken":
        raise VideoError("broken: on purpose")
    if job == "fault":
        raise ZeroDivisionError("ours")
    return job.upper()
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module that worker processes can import too."""
    (tmp_path / "test_only_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "test_only_work", raising=False)
    import test_only_work

    return test_only_work


def results(work: ModuleType, jobs: list[str], workers: int) -> dict[str, object]:
    found = dict(run_jobs(work.work, jobs, workers, expected=VideoError))
    assert set(found) == set(jobs)
    return {job: str(result) for job, result in found.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_expected_errors(work: ModuleType, workers: int) -> None:
    assert results(work, ["a", "broken", "c"], workers) == {"a": "A", "broken": "broken: on purpose", "c": "C"}
    assert results(work, [], workers) == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_any_other_error_ends_it(work: ModuleType, workers: int) -> None:
    with pytest.raises(ZeroDivisionError, match="ours"):
        results(work, ["a", "fault", "c"], workers)


def test_a_crash_is_one_broken_job(work: ModuleType) -> None:
    """Whatever else was running in the pool that died is done again."""
    jobs = ["a", "b", "crash", "c", "broken", "d", "e"]
    found = results(work, jobs, 3)
    assert found.pop("crash") == "crash: its worker process crashed (a broken file, or too little memory)"
    assert found == {job: "broken: on purpose" if job == "broken" else job.upper() for job in jobs if job != "crash"}
