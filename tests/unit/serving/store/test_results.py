"""Files of jobs: whole or not there, and none without a job."""

import io
import os
from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.serving.store.files import VIDEO
from stiv_deploy.serving.store.jobs import Job, State
from stiv_deploy.serving.store.results import Results
from stiv_deploy.serving.store.sqlite import SqliteJobStore


def write(results: Results, job: str, error: Exception | None = None) -> None:
    with results.files.writing(job) as folder:
        (folder / VIDEO).write_bytes(b"video")
        if error is not None:
            raise error


def test_a_result_is_whole_or_not_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    with pytest.raises(RuntimeError, match="killed"):
        write(results, "a", RuntimeError("killed"))
    assert "a" not in results.files.list()
    write(results, "a")
    assert results.files.bytes("a") == 5
    results.remove("a")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


def test_latents_come_back_bit_by_bit(tmp_path: Path) -> None:
    results, latents = Results(tmp_path), np.random.default_rng(0).standard_normal((2, 3), dtype=np.float32)
    assert results.latents("a") is None
    results.save_latents("a", latents=latents, position=np.array(3))
    found = results.latents("a")
    assert found is not None
    np.testing.assert_array_equal(found["latents"], latents)
    assert found["position"] == 3


def pickled() -> bytes:
    """An archive whose array would run code."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=True, latents=np.array([print], dtype=object))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off", pickled()])
def test_damaged_latents_are_none(tmp_path: Path, content: bytes) -> None:
    results = Results(tmp_path)
    (tmp_path / "latents" / "a.npz").write_bytes(content)
    assert results.latents("a") is None


def test_files_without_a_job_and_jobs_without_a_file_are_swept(tmp_path: Path) -> None:
    results, store = Results(tmp_path), SqliteJobStore(tmp_path / "jobs.sqlite")

    def add(name: str, state: State) -> None:
        job = Job(
            id=name, owner="me", created=1, frames=1, height=2, width=2, rows=1, evaluations=1, steps=1, state=state
        )
        store.submit(job, "{}", most=9)

    for name, state in (("done", "completed"), ("lost", "completed"), ("runs", "in_progress"), ("waits", "queued")):
        add(name, State(state))
    for name in ("done", "runs", "orphan", "waits"):
        write(results, name)
        results.save_latents(name, position=np.array(1))
    (tmp_path / "results" / ".done-x1_.partial").mkdir()
    (tmp_path / "results" / ".runs-x1_.partial").mkdir()
    assert results.sweep(store) == 5
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"done", "runs", ".runs-x1_.partial"}
    assert {file.name for file in (tmp_path / "latents").iterdir()} == {"runs.npz", "waits.npz"}
    assert (store.get("lost").state, store.get("lost").error_code) == (State.FAILED, "result_lost")
    assert store.get("done").state == State.COMPLETED
    store.close()


def test_what_killed_processes_left_half_written_goes_in_time(tmp_path: Path) -> None:
    """Without a restart, and without taking it from one who still writes."""
    results = Results(tmp_path)
    write(results, "done")
    for name in (".old-x_.partial", ".new-x_.partial"):
        for folder in ("results", "latents"):
            (tmp_path / folder / name).mkdir()
            (tmp_path / folder / name / "file").write_bytes(b"half")
    for folder in ("results", "latents"):
        os.utime(tmp_path / folder / ".old-x_.partial", (0, 0))
    results.sweep_abandoned()
    assert {file.name for file in (tmp_path / "results").iterdir()} == {"done", ".new-x_.partial"}
    assert {file.name for file in (tmp_path / "latents").iterdir()} == {".new-x_.partial"}
