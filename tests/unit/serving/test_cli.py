"""``stiv serve``: what is wrong is one line before anything starts; and the whole of it, killed and ended."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.runtime.command.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run ``stiv serve`` in this process: exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", "serve", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


def test_what_is_wrong_is_one_line(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cases: list[tuple[tuple[object, ...], str]] = [
            ((tmp_path / "none",), "no such folder"),
            ((bundle_path, "--host", "0.0.0.0"), "give --tokens FILE"),
            ((bundle_path, "--tokens", tmp_path / "file"), "--new-token NAME"),
            ((bundle_path, "--new-token", "alice"), "without --tokens"),
            ((bundle_path, "--port", port, "--data", tmp_path / "jobs"), "choose another --port"),
            ((bundle_path, "--port", 0, "--data", tmp_path / "file"), "cannot be written"),
            ((bundle_path, "--port", 0, "--data", bundle_path / "jobs"), "is in the bundle"),
        ]
        for arguments, words in cases:
            code, out, err = run(*arguments)
            assert (code, out, err.count("\n")) == (2, "", 1), (arguments, err)
            assert words in err
    assert not (bundle_path / "jobs").exists()


def test_a_new_token_is_printed_once(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    code, out, err = run(bundle_path, "--tokens", tmp_path / "tokens", "--new-token", "alice")
    assert (code, err, len(out.strip()) > 40) == (0, "", True)
    assert out.strip() not in (tmp_path / "tokens").read_text()


class Running:
    """A server process and its address."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving toy at http://127.0.0.1:"), line
        self.address = line.split()[3].rstrip(",")

    def call(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, data, {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return json.load(answer)

    def wait(self, path: str, until: Callable[[Any], bool]) -> Any:
        for _ in range(600):
            try:
                found = self.call(path)
            except urllib.error.HTTPError as error:
                found = json.load(error)
            if until(found):
                return found
            time.sleep(0.1)
        raise AssertionError(found)


@contextmanager
def serving(bundle: Path, data: Path, *options: str) -> Iterator[Running]:
    command = [Path(sys.executable).parent / "stiv", "serve", bundle, "--data", data, "--port", "0", *options]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)
    try:
        yield Running(process)
    finally:
        process.kill()
        process.wait()


def workers(data: Path) -> list[int]:
    from stiv_deploy.serving.store.sqlite import SqliteJobStore

    store = SqliteJobStore(data / "jobs.sqlite")
    found = [worker.pid for worker in store.workers() if worker.ready]
    store.close()
    return found


@pytest.mark.alone
@pytest.mark.slow
def test_jobs_outlive_a_killed_worker_and_a_stopped_server(bundle_path: Path, tmp_path: Path) -> None:
    options = ("--threads", "1", "--grace", "0", "--latents-every", "50", "--free-gib", "0")
    body = {"prompt": "digit three moving left", "seed": 1, "num_inference_steps": 1000}
    data = tmp_path / "jobs"
    with serving(bundle_path, data, *options) as server:
        server.wait("/ready", lambda found: found["status"] == "ok")
        jobs = [server.call("/v1/videos", body | {"seed": seed})["id"] for seed in range(3)]
        server.wait(f"/v1/videos/{jobs[0]}", lambda found: found["stiv"]["step"] > 60)
        (pid,) = workers(data)
        os.kill(pid, signal.SIGKILL)
        again = server.wait(f"/v1/videos/{jobs[0]}", lambda found: found["stiv"]["attempts"] == 2)
        assert again["status"] != "failed"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    with serving(bundle_path, data, *options, "--workers", "2") as server:
        for job in jobs:
            found = server.wait(f"/v1/videos/{job}", lambda found: found["status"] not in ("queued", "in_progress"))
            assert found["status"] == "completed", found
        assert len(server.call("/v1/videos")["data"]) == 3
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 0
    assert len([*data.rglob("video.mp4")]) == 3
    assert [*data.rglob("*.npz")] == []


@pytest.mark.alone
@pytest.mark.slow
def test_a_worker_that_cannot_start_ends_the_server(bundle_path: Path, tmp_path: Path) -> None:
    with serving(bundle_path, tmp_path / "jobs", "--backend", "tensorrt") as server:
        assert server.process.wait(60) == 2
