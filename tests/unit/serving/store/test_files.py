"""Files of results, wherever they are: in a folder, or by fsspec in memory or on this machine's disk."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.store.files import THUMBNAIL, VIDEO, FolderFiles, ResultFiles
from stiv_deploy.serving.store.jobs import Job, State, new_id
from stiv_deploy.serving.store.opening import open_results
from stiv_deploy.serving.store.remote import BLOCK, FsspecFiles
from stiv_deploy.serving.store.sqlite import SqliteJobStore

CONTENT = bytes(range(256)) * (BLOCK // 256) + b"the end"


@pytest.fixture(params=["folder", "memory", "local"])
def files(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> ResultFiles:
    (tmp_path / "results").mkdir()
    if request.param == "folder":
        return FolderFiles(tmp_path / "results")
    return FsspecFiles(memory if request.param == "memory" else f"local://{tmp_path}/place", tmp_path / "results")


def write(files: ResultFiles, job: str, content: bytes = CONTENT) -> None:
    with files.writing(job) as folder:
        (folder / VIDEO).write_bytes(content)
        (folder / THUMBNAIL).write_bytes(b"small")


def read(files: ResultFiles, job: str, start: int = 0, stop: int | None = None) -> bytes | None:
    found = files.get(job, VIDEO)
    if found is None or isinstance(found, Path):
        return None if found is None else found.read_bytes()[start:stop]
    return b"".join(found.read(start, found.size if stop is None else stop))


def test_a_result_is_there_whole_when_its_block_has_ended(files: ResultFiles, tmp_path: Path) -> None:
    job = new_id()
    assert (files.get(job, VIDEO), files.list()) == (None, [])
    write(files, job)
    assert (files.list(), files.bytes(job)) == ([job], len(CONTENT) + 5)
    assert read(files, job) == CONTENT
    assert read(files, job, BLOCK - 3, BLOCK + 4) == CONTENT[BLOCK - 3 : BLOCK + 4]
    files.remove(job)
    files.remove(job)
    assert (files.get(job, VIDEO), files.list()) == (None, [])
    assert [*(tmp_path / "results").iterdir()] == []


def test_nothing_is_there_of_what_failed(files: ResultFiles, tmp_path: Path) -> None:
    job = new_id()
    with suppress(KeyError), files.writing(job) as folder:
        (folder / VIDEO).write_bytes(b"half")
        raise KeyError
    assert (files.list(), [*(tmp_path / "results").iterdir()]) == ([], [])


def test_the_later_of_two_that_write_is_there(files: ResultFiles) -> None:
    """Of a job that was taken from a worker which was only slow."""
    job = new_id()
    with files.writing(job) as first:
        (first / VIDEO).write_bytes(b"one")
        write(files, job, b"two")
        assert read(files, job) == b"two"
    assert read(files, job) == b"one"


def test_equal_jobs_have_equal_files_and_go_by_themselves(files: ResultFiles) -> None:
    made, twin = new_id(), new_id()
    assert not files.link(made, twin)
    write(files, made)
    assert files.link(made, twin)
    files.remove(made)
    assert read(files, twin) == CONTENT


def test_a_place_that_fails_is_told_as_such(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("no credentials\nat all")

    (tmp_path / "results").mkdir()
    files, job = FsspecFiles(memory, tmp_path / "results"), new_id()
    monkeypatch.setattr(files._system, "put_file", refused)
    with pytest.raises(OutputError, match=r"videos/here/video_.*: cannot be written \(no credentials at all\)"):
        write(files, job)
    monkeypatch.setattr(files._system, "rm", refused)
    files.remove(job)  # it is swept when a server starts


def test_the_video_is_put_last(tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is, the others are: an object store has no rename."""
    (tmp_path / "results").mkdir()
    files, put = FsspecFiles(memory, tmp_path / "results"), []
    kept = files._system.put_file
    monkeypatch.setattr(files._system, "put_file", lambda source, place: (put.append(place), kept(source, place)))
    write(files, new_id())
    assert [Path(place).name for place in put] == [THUMBNAIL, VIDEO]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nothing://x", "Protocol not known"),
        ("s3://me:secret@bucket/x", "no secret may be in its URL"),
        ("local:///proc/none", "nothing can be put there"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path, url: str, words: str) -> None:
    with pytest.raises(ServeError, match=words) as caught:
        open_results(tmp_path, url)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)


def test_what_belongs_to_nobody_is_swept_and_what_is_not_ours_stays(tmp_path: Path, memory: str) -> None:
    results, store = open_results(tmp_path, memory), SqliteJobStore(tmp_path / "jobs.sqlite")
    names = {state: new_id() for state in ("completed", "lost", "in_progress", "queued", "orphan")}
    for state, name in names.items():
        if state != "orphan":
            store.submit(job_of(name, State("completed" if state == "lost" else state)), "{}", most=9)
        if name != names["lost"]:
            write(results.files, name)
    fsspec.filesystem("memory").pipe_file("/videos/here/other", b"not ours")
    assert results.sweep(store) == 2
    assert set(results.files.list()) == {names["completed"], names["in_progress"]}
    assert fsspec.filesystem("memory").exists("/videos/here/other")
    assert store.get(names["lost"]).error_code == "result_lost"
    store.close()


def job_of(name: str, state: State) -> Job:
    return Job(id=name, owner="me", created=1, frames=1, height=2, width=2, rows=1, evaluations=1, steps=1, state=state)


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    results = open_results(tmp_path, f"file://{tmp_path}/place")
    assert isinstance(results.files, FolderFiles)
    write(results.files, "a")
    assert (tmp_path / "place" / "a" / VIDEO).read_bytes() == CONTENT
