"""``stiv serve``: what is wrong is one line before anything starts; and the whole of it, killed and ended."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from running import serving

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
            ((bundle_path, "--max-workers", 2), "is for --ray"),
            ((bundle_path, "--parallel", "cfg2"), "without --devices"),
            ((bundle_path, "--devices", "cpu"), "one device shares nothing; name more"),
            ((bundle_path, "--devices", "cpu,0"), "devices must be alike"),
            ((bundle_path, "--devices", "cpu,cpu", "--workers", 2), "--workers is of no use with --devices"),
            ((bundle_path, "--devices", "0,1", "--ray"), "--ray is of no use with --devices"),
            ((bundle_path, "--devices", "cpu,cpu", "--parallel", "dsp3"), "make them agree"),
            (
                (bundle_path, "--devices", "cpu,cpu,cpu"),
                "make the bundle again with 'stiv export CHECKPOINT --out BUNDLE --halves'",
            ),
            ((bundle_path, "--devices", "0,1", "--backend", "onnxruntime"), "--backend onnxruntime runs on the CPU"),
            ((bundle_path, "--devices", "70,71"), "--devices 70,71: there is no GPU 71"),
            ((bundle_path, "--dynamo", "--port", 0), "--port is of no use with --dynamo"),
            ((bundle_path, "--dynamo", "--ray"), "--ray is of no use with --dynamo"),
            ((bundle_path, "--results", "videos"), "want a URL"),
            ((bundle_path, "--results", "nothing://x", "--data", tmp_path / "jobs", "--port", 0), "nothing can be put"),
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
