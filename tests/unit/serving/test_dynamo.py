"""The service as a worker of Dynamo: what its requests mean here, its answers; and its own frontend, where it is."""

import asyncio
import base64
import io
import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.media import read_comment
from stiv_deploy.serving.dynamo.videos import Videos, body_of
from stiv_deploy.serving.errors import ApiError
from stiv_deploy.serving.store.jobs import CANCELLED, State

ASKED = {"model": "toy", "prompt": "digit three moving left"}
LONG = {"nvext": {"num_inference_steps": 1000}}
needs_dynamo = pytest.mark.skipif(
    find_spec("dynamo") is None, reason="NVIDIA Dynamo is not installed: docs/serving.md, 'In Dynamo', says how"
)


def test_a_request_of_dynamo_has_the_fields_of_ours() -> None:
    request = {
        **ASKED,
        "user": "me",
        "seconds": 2,
        "size": "64x64",
        "input_reference": None,
        "response_format": "b64_json",
        "output_format": "mp4",
        "stream": False,
        "nvext": {"annotations": ["x"], "fps": 8, "num_frames": None, "seed": 3},
        "extra_args": {"media_passthrough": {"guidance_mode": "none"}},
    }
    assert body_of(request) == ASKED | {"seconds": 2, "size": "64x64", "fps": 8, "seed": 3, "guidance_mode": "none"}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"output_format": "mjpeg"}, "output_format is mp4, got 'mjpeg'"),
        ({"response_format": "path"}, "response_format is url or b64_json, got 'path'"),
        (
            {"nvext": {"seed": 1}, "extra_args": {"media_passthrough": {"seed": 1}}},
            "given in nvext and beside it: seed; give either",
        ),
    ],
)
def test_what_is_not_made_is_one_line(request_: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=f"^{words}$") as caught:
        body_of(ASKED | request_)
    assert caught.value.status == 400


@pytest.fixture
def answers(place: Any, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """All answers to a request of Dynamo's at ``place``, whose clients leave when they are ``stopped``."""
    return lambda **request: list_of(place, tmp_path, request)


def list_of(
    place: Any, folder: Path, request: dict[str, Any], stopped: Callable[[], bool] = lambda: False
) -> list[dict[str, Any]]:
    async def stored(name: str, content: bytes) -> str:
        (folder / Path(name).name).write_bytes(content)
        return f"https://videos/{name}"

    async def collected() -> list[dict[str, Any]]:
        videos = Videos(place.service, stored)
        return [answer async for answer in videos.make(ASKED | request, "name", stopped, {})]

    return asyncio.run(collected())


def test_a_video_is_one_answer_with_its_bytes_or_where_they_are(
    place: Any, answers: Callable[..., Any], tmp_path: Path
) -> None:
    with place.working():
        (whole,) = answers(nvext={"seed": 3}, response_format="b64_json")
        (there,) = answers(nvext={"seed": 3})
    (data,) = whole["data"]
    assert (whole["object"], whole["model"], whole["status"], whole["progress"]) == ("video", "toy", "completed", 100)
    file = tmp_path / f"{there['id']}.mp4"
    assert base64.b64decode(data["b64_json"]) == file.read_bytes()
    assert there["data"] == [{"output_format": "mp4", "url": f"https://videos/videos/{file.name}"}]
    assert json.loads(read_comment(file))["request"]["seed"] == 3


def test_a_stream_has_previews_and_then_all_frames(
    place_of: Callable[..., Any], previewed_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stiv_deploy.serving.workers.scheduler.TOLD", 0.0)
    monkeypatch.setattr("stiv_deploy.serving.api.events.LOOK", 0.005)
    place = place_of(previewed_path)
    with place.working():
        found = list_of(place, tmp_path, {"stream": True, "nvext": {"num_inference_steps": 60}})
    kinds = [each["status"] for each in found]
    frames = kinds.count("completed")
    assert kinds == ["in_progress"] * (len(kinds) - frames) + ["completed"] * frames
    assert 0 < frames < len(kinds)
    progress = [each["progress"] for each in found]
    assert progress == sorted(progress)
    sizes = {Image.open(io.BytesIO(base64.b64decode(each["data"][0]["b64_json"]))).size for each in found}
    assert sizes == {(4, 4), (8, 8)}


def test_a_client_that_has_left_cancels(place: Any, tmp_path: Path) -> None:
    looks = iter([False, False, True])
    with place.working(), pytest.raises(ApiError) as caught:
        list_of(place, tmp_path, LONG, lambda: next(looks))
    assert caught.value.status == 499
    (job,) = place.store.page("local", None, 1, ascending=False).jobs
    assert (job.state, job.error_code) == (State.FAILED, CANCELLED)


def test_an_answer_that_is_closed_or_aborted_cancels(place: Any) -> None:
    async def left(how: str) -> None:
        videos = Videos(place.service, None)  # type: ignore[arg-type]
        task = asyncio.ensure_future(anext(videos.make(ASKED, how, lambda: False, {})))
        while not videos._jobs:
            await asyncio.sleep(0.01)
        if how == "closed":
            task.cancel()
        else:
            videos.close()
        with pytest.raises((asyncio.CancelledError, ApiError)):
            await task

    for how in ("closed", "aborted"):
        asyncio.run(left(how))
    assert [job.error_code for job in place.store.page("local", None, 9, ascending=False).jobs] == [CANCELLED] * 2


def test_a_video_that_fails_is_an_answer_and_a_bad_request_none(place: Any, answers: Callable[..., Any]) -> None:
    place.store.waiting = lambda: []  # nobody takes it

    async def failed() -> dict[str, Any]:
        videos = Videos(place.service, None)  # type: ignore[arg-type]
        task = asyncio.ensure_future(anext(videos.make(ASKED, "name", lambda: False, {})))
        while not videos._jobs:
            await asyncio.sleep(0.01)
        (job,) = videos._jobs.values()
        assert place.store.claim(job, "w") is not None
        place.store.fail(job, "w", "not_finite", "it has values that are not finite", place.clock() + 1)
        return await task

    answer = asyncio.run(failed())
    assert (answer["status"], answer["data"]) == ("failed", [])
    assert answer["error"] == "not_finite: it has values that are not finite"
    for bad in ({"nvext": {"seed": -1}}, {"nvext": {"guidance_scale_2": 1}}, {"input_reference": "http://a/b.png"}):
        with pytest.raises((ApiError, RequestError)):
            answers(**bad)


@pytest.mark.skipif(find_spec("dynamo") is not None, reason="NVIDIA Dynamo is installed")
def test_without_dynamo_it_is_said_where_to_look(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["stiv", "serve", str(bundle_path), "--dynamo"])
    assert main() == 2
    signal.signal(signal.SIGTERM, handler)
    error = capsys.readouterr().err
    assert error == "error: --dynamo: dynamo is not installed; docs/serving.md, 'In Dynamo', says how\n"


@needs_dynamo
@pytest.mark.parametrize(
    ("error", "name"),
    [
        (RequestError("steps"), "InvalidArgument"),
        (ApiError(404, "model_not_found", "one model"), "InvalidArgument"),
        (ApiError(429, "queue_full", "full"), "HttpError"),
        (ApiError(499, "cancelled", "gone"), "Cancelled"),
        (ApiError(507, "insufficient_storage", "disk"), "Unknown"),
    ],
)
def test_errors_are_dynamos(error: Any, name: str) -> None:
    from dynamo.llm import exceptions

    from stiv_deploy.serving.dynamo.worker import raised

    found = raised(error)
    assert type(found) is getattr(exceptions, name)
    assert str(error) in str(found)


@pytest.fixture
def frontend(bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """The address of Dynamo's frontend, and our worker behind it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "found"),
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_MEDIA_OUTPUT_FS_URL": (tmp_path / "media").as_uri(),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = ["--data", tmp_path / "jobs", "--threads", "1", "--free-gib", "0", "--name", "toy"]
    commands = [
        [Path(sys.executable).parent / "stiv", "serve", bundle_path, "--dynamo", *options],
        [sys.executable, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)],
    ]
    with (tmp_path / "log").open("w") as log:
        processes = [subprocess.Popen([*map(str, each)], stdout=log, stderr=log) for each in commands]
        try:
            wait_for_model(f"http://127.0.0.1:{port}", tmp_path / "log")
            yield f"http://127.0.0.1:{port}", processes[0]
        finally:
            for each in processes:
                each.kill()
                each.wait()


def wait_for_model(address: str, log: Path) -> None:
    for _ in range(900):
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
                if json.load(answer)["data"]:
                    return
        except (urllib.error.URLError, ConnectionError):
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])


def call(address: str, path: str, timeout: float = 60, **body: Any) -> bytes:
    content = json.dumps(ASKED | body).encode()
    asked = urllib.request.Request(address + path, content, {"content-type": "application/json"})
    with urllib.request.urlopen(asked, timeout=timeout) as answer:
        found: bytes = answer.read()
    return found


def states(data: Path, count: int) -> list[tuple[str, str | None]]:
    """States of the jobs, as soon as ``count`` of them have ended."""
    from stiv_deploy.serving.store.sqlite import SqliteJobStore

    store = SqliteJobStore(data / "jobs.sqlite")
    for _ in range(200):
        jobs = store.page("local", None, 100, ascending=True).jobs
        if sum(not job.live for job in jobs) >= count:
            break
        time.sleep(0.1)
    store.close()
    return [(str(job.state), job.error_code) for job in jobs]


@needs_dynamo
@pytest.mark.alone
@pytest.mark.slow
def test_dynamos_own_frontend_has_videos_made(frontend: tuple[str, Any], tmp_path: Path) -> None:
    address, worker = frontend
    done = json.loads(call(address, "/v1/videos", nvext={"seed": 3}))
    file = tmp_path / "media" / "videos" / f"{done['id']}.mp4"
    assert (done["status"], done["data"][0]["url"]) == ("completed", file.as_uri())
    assert json.loads(read_comment(file))["request"]["seed"] == 3
    stream = call(address, "/v1/videos/stream", stream=True, seed=4)
    assert stream.count(b"Content-Type: image/jpeg") == stream.count(b"\xff\xd8\xff") > 1
    with pytest.raises(urllib.error.HTTPError) as caught:
        call(address, "/v1/videos", num_inference_steps=0)
    assert (caught.value.code, "num_inference_steps must be" in caught.value.read().decode()) == (400, True)
    for path, streams in (("/v1/videos", False), ("/v1/videos/stream", True)):
        with pytest.raises(TimeoutError):
            call(address, path, 0.5, stream=streams, seed=5, **LONG)
    assert states(tmp_path / "jobs", 4) == [("completed", None)] * 2 + [("failed", CANCELLED)] * 2
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
