"""The API: OpenAI's wire format, what is ours beside it, and errors in one form."""

import base64
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.pipeline.records import read_requests
from stiv_deploy.serving.api import events
from stiv_deploy.serving.store.jobs import Measured, Size

SCHEMA = Path(__file__).with_name("videos.schema.json")


def png(height: int = 8, width: int = 8, value: int = 200) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((height, width, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def test_a_resource_has_all_that_openai_requires(place: Any) -> None:
    wanted = json.loads(SCHEMA.read_text())
    made = place.ask()
    assert set(made) == {*wanted["required"], "stiv"}
    assert made["status"] in wanted["properties"]["status"]["enum"]
    for name, kind in wanted["properties"].items():
        allowed = kind["type"] if isinstance(kind["type"], list) else [kind["type"]]
        found = {str: "string", int: "integer", type(None): "null", dict: "object"}[type(made[name])]
        assert found in allowed, name
    assert (made["status"], made["progress"], made["size"], made["seconds"]) == ("queued", 0, "8x8", "0.5")


def test_a_video_from_the_first_call_to_the_last(place: Any, finished: Callable[..., None], tmp_path: Path) -> None:
    job = place.ask(num_inference_steps=3)["id"]
    assert place.client.get(f"/v1/videos/{job}/content").status_code == 409
    finished(place.worker())
    made = place.look(job)
    assert (made["status"], made["progress"], made["stiv"]["step"]) == ("completed", 100, 3)
    assert made["expires_at"] > made["completed_at"] >= made["created_at"]
    content = place.client.get(f"/v1/videos/{job}/content")
    assert content.headers["content-type"] == "video/mp4"
    assert content.headers["content-disposition"] == f'attachment; filename="{job}.mp4"'
    part = place.client.get(f"/v1/videos/{job}/content", headers={"range": "bytes=4-7"})
    assert (part.status_code, part.content) == (206, content.content[4:8])
    (tmp_path / "clip.mp4").write_bytes(content.content)
    (recorded,) = read_requests(tmp_path / "clip.mp4")
    assert (recorded.request.seed, recorded.bundle) == (1, place.bundle.hash)
    for variant, size in (("thumbnail", (8, 8)), ("spritesheet", (42, 12))):
        answer = place.client.get(f"/v1/videos/{job}/content?variant={variant}")
        assert Image.open(io.BytesIO(answer.content)).size == size
    assert place.client.delete(f"/v1/videos/{job}").json() == {"id": job, "object": "video.deleted", "deleted": True}
    assert place.client.get(f"/v1/videos/{job}").status_code == 404
    assert job not in place.results.files.list()


def test_lists_have_pages(place: Any) -> None:
    jobs = [place.ask(seed=seed)["id"] for seed in range(3)]
    page = place.client.get("/v1/videos?limit=2").json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([jobs[2], jobs[1]], True)
    assert (page["first_id"], page["last_id"], page["object"]) == (jobs[2], jobs[1], "list")
    page = place.client.get(f"/v1/videos?limit=2&order=asc&after={jobs[0]}").json()
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([jobs[1], jobs[2]], False)
    assert place.client.get("/v1/videos?limit=0").json()["first_id"] is None


def test_forms_and_json_ask_for_the_same(place: Any, finished: Callable[..., None]) -> None:
    body = {"prompt": "digit", "seed": "7", "num_inference_steps": "3", "guidance_renorm": "false", "size": "8x4"}
    answer = place.client.post("/v1/videos", data=body, files={"frames[-1]": ("../../x", png(4), "image/png")})
    assert answer.status_code == 200, answer.text
    values = {"seed": 7, "num_inference_steps": 3, "guidance_renorm": False, "frames": {"-1": url(png(4))}}
    other = place.ask(prompt="digit", size="8x4", **values)
    finished(place.worker())
    assert place.sheet(answer.json()["id"]) == place.sheet(other["id"])
    assert other["stiv"]["task"] == "frames"
    assert {path.parent.name for path in place.settings.data.rglob("*.mp4")} == {answer.json()["id"], other["id"]}


def test_a_form_has_weights_of_a_solver_as_json(place: Any) -> None:
    parts = {
        name: (None, text) for name, text in (("prompt", "digit"), ("solver", "ab2"), ("num_inference_steps", "3"))
    }
    weights = [[1.25, -0.25], [1.5, -0.625]]
    answer = place.client.post("/v1/videos", files=parts | {"solver_weights": (None, json.dumps(weights))})
    assert answer.status_code == 200, answer.text
    assert json.loads(place.store.request(answer.json()["id"]))["solver_weights"] == weights
    for text in ("", "1.25", "[[1.25, NaN], [1, 0]]", "[[1.25, -0.25]]", "[" * 100_000):
        answer = place.client.post("/v1/videos", files=parts | {"solver_weights": (None, text)})
        assert answer.status_code == 400, text
        assert "solver_weights" in answer.json()["error"]["message"]


def form(**fields: str) -> dict[str, tuple[None, str]]:
    return {name: (None, text) for name, text in ({"prompt": "digit"} | fields).items()}


def test_a_form_says_what_skips_blocks(place_of: Callable[..., Any], skipping_path: Path) -> None:
    place = place_of(skipping_path)
    for fields, skipped in (
        ({"num_inference_steps": "6", "skip_blocks": "true"}, [3, 5]),
        ({"num_inference_steps": "6", "skip_blocks": "false"}, None),
        ({"num_inference_steps": "5", "solver": "euler", "skipped_steps": "[2, 4]"}, [2, 4]),
    ):
        answer = place.client.post("/v1/videos", files=form(**fields))
        assert answer.status_code == 200, answer.text
        stored = json.loads(place.store.request(answer.json()["id"]))
        assert ("skip_blocks" in stored, stored.get("skipped_steps")) == (False, skipped)
    for name, texts in (
        ("skip_blocks", ("", "maybe", "1", "[true]", "true")),
        ("skipped_steps", ("", "2", "[2.5]", '["2"]', "[1]", "[3, 2]", "[9]", "[" * 100_000)),
    ):
        for text in texts:
            answer = place.client.post("/v1/videos", files=form(**{name: text}))
            assert answer.status_code == 400, text
            words = answer.json()["error"]["message"]
            assert name in words or "step 1 cannot be skipped" in words
            assert "\n" not in words


def test_a_job_counts_the_evaluations_of_the_blocks(place_of: Callable[..., Any], skipping_path: Path) -> None:
    place = place_of(skipping_path)
    for asked, wanted in (
        ({"num_inference_steps": 6, "skip_blocks": True}, (4, 6, True)),
        ({"num_inference_steps": 6}, (6, 6, False)),
        ({"num_inference_steps": 6, "solver": "heun"}, (11, 6, False)),
    ):
        job = place.store.get(place.ask(**asked)["id"])
        assert (job.evaluations, job.steps, job.skips) == wanted


def test_the_model_tells_which_steps_can_be_skipped(place_of: Callable[..., Any], skipping_path: Path) -> None:
    (model,) = place_of(skipping_path).client.get("/v1/models").json()["data"]
    found = [(each["solver"], each["steps"], each["skipped_steps"], each["default"]) for each in model["stiv"]["tuned"]]
    assert found == [("ab2", 6, [], True), ("ab2", 6, [3, 5], False), ("euler", 8, [4, 6], False)]


@pytest.mark.parametrize(
    "reference",
    [{"image_url": url(png())}, {"png": base64.b64encode(png()).decode()}, url(png())],
    ids=["image_url", "png", "text"],
)
def test_the_first_frame_by_openais_name(place: Any, finished: Callable[..., None], reference: Any) -> None:
    job = place.ask(input_reference=reference)
    assert job["stiv"]["task"] == "ti2v"
    finished(place.worker())
    sheet = np.asarray(Image.open(io.BytesIO(place.sheet(job["id"]))))
    assert np.abs(sheet[2:10, 2:10].astype(int) - 200).max() <= 1


def test_a_remix_is_all_that_it_was_but_for_what_is_said(place: Any, finished: Callable[..., None]) -> None:
    first = place.ask(frames={"-1": url(png())}, guidance_scale=2.5, priority=3)
    address = f"/v1/videos/{first['id']}/remix"
    same, other = (place.client.post(address, json=body).json() for body in ({}, {"seed": 2, "prompt": "digit"}))
    finished(place.worker())
    assert place.sheet(same["id"]) == place.sheet(first["id"]) != place.sheet(other["id"])
    assert {each["remixed_from_video_id"] for each in (same, other)} == {first["id"]}
    assert (other["prompt"], other["stiv"]["seed"], other["stiv"]["priority"]) == ("digit", 2, 3)
    assert (first["remixed_from_video_id"], other["stiv"]["task"]) == (None, "frames")


@pytest.mark.parametrize("body", [{"nope": 1}, {"seed": -1}, {"seed": "x"}])
def test_a_bad_remix_is_told_what_is_wrong(place: Any, body: dict[str, Any]) -> None:
    answer = place.client.post(f"/v1/videos/{place.ask()['id']}/remix", json=body)
    assert answer.status_code == 400
    assert next(iter(body)) in answer.json()["error"]["message"]
    assert place.store.counts()["queued"] == 1


def test_a_remix_has_an_idempotency_key_too(place: Any) -> None:
    address, key = f"/v1/videos/{place.ask()['id']}/remix", {"Idempotency-Key": "k"}
    made = {place.client.post(address, json={"seed": 5}, headers=key).json()["id"] for _ in range(2)}
    assert len(made) == 1
    assert place.client.post(address, json={"seed": 6}, headers=key).status_code == 409
    assert place.client.post("/v1/videos/video_0/remix", json={}).status_code == 404


def test_seconds_become_frames(place: Any) -> None:
    assert place.ask(seconds="0.5")["stiv"]["num_frames"] == 4
    assert place.ask(seconds=0.3)["stiv"]["num_frames"] == 2
    assert place.ask(seconds="1", fps=4)["stiv"]["num_frames"] == 4


CASES = int(os.environ.get("STIV_FUZZ_CASES", "500"))
PROMPT = {"prompt": "digit"}


@pytest.mark.parametrize(
    ("body", "status", "code", "words"),
    [
        ({}, 400, "invalid_request", "no prompt given"),
        (PROMPT | {"nope": 1}, 400, "unknown_parameter", "unknown: nope"),
        (PROMPT | {"count": 2}, 400, "unknown_parameter", "unknown: count"),
        (PROMPT | {"num_inference_steps": 0}, 400, "invalid_request", "num_inference_steps must be from 1"),
        (PROMPT | {"fps": 0}, 400, "invalid_request", "fps must be from"),
        (PROMPT | {"guidance_mode": "x"}, 400, "invalid_request", "there are: none, jit, sit"),
        (PROMPT | {"size": "large"}, 400, "invalid_request", "size is WIDTHxHEIGHT"),
        (PROMPT | {"size": "8x8", "width": 8}, 400, "invalid_request", "give either"),
        (PROMPT | {"size": "998x8"}, 400, "invalid_request", "this bundle takes 4 to 12"),
        (PROMPT | {"seconds": "long"}, 400, "invalid_request", "seconds is a number"),
        (PROMPT | {"seconds": "1e9"}, 400, "invalid_request", "seconds must be from"),
        (PROMPT | {"seconds": "1", "num_frames": 4}, 400, "invalid_request", "give either"),
        (PROMPT | {"priority": 10}, 400, "invalid_request", "priority must be from 0 to 9"),
        (PROMPT | {"model": "sora-2"}, 404, "model_not_found", "one model here, 'toy'"),
        (PROMPT | {"frames": {"9": url(png())}}, 400, "invalid_request", "9"),
        (PROMPT | {"frames": {"x": url(png())}}, 400, "invalid_request", "by number"),
        (PROMPT | {"frames": [1]}, 400, "invalid_request", "frames are"),
        (PROMPT | {"frames": {"0": url(b"no picture")}}, 400, "invalid_image", "not an image"),
        (PROMPT | {"frames": {"0": {"path": "/etc/passwd"}}}, 400, "invalid_request", "a file part"),
        (PROMPT | {"frames": {"0": "/etc/passwd"}}, 400, "url_not_allowed", "nothing is fetched"),
        (
            PROMPT | {"input_reference": {"image_url": "http://127.0.0.1/"}},
            400,
            "url_not_allowed",
            "nothing is fetched",
        ),
        (PROMPT | {"input_reference": {"file_id": "file-1"}}, 400, "invalid_request", "a file part"),
        (PROMPT | {"input_reference": url(png()), "frames": {"0": url(png())}}, 400, "invalid_request", "twice"),
        (PROMPT | {"input_reference": url(png(6))}, 400, "invalid_request", "choose a fit"),
        (PROMPT | {"latents": {"0": 1}}, 400, "invalid_request", "latents"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    place: Any, body: dict[str, Any], status: int, code: str, words: str
) -> None:
    answer = place.client.post("/v1/videos", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (status, code, "invalid_request_error"), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert place.store.counts()["queued"] == 0


def bomb(height: int, width: int) -> bytes:
    """A tiny file of very many equal pixels."""
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def test_a_bomb_is_refused_before_it_is_decoded(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bomb(4_000, 5_000)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    answer = place.client.post("/v1/videos", json=PROMPT | {"input_reference": url(content)})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_image")
    assert "at most 16 million" in answer.json()["error"]["message"]


def test_other_formats_are_refused(place: Any) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "TIFF")
    answer = place.client.post("/v1/videos", data=PROMPT, files={"input_reference": ("a.png", buffer.getvalue())})
    assert answer.json()["error"]["code"] == "invalid_image"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b"[]", "application/json", 400),
        (b"a=b", "application/x-www-form-urlencoded", 415),
        (b"", "", 415),
        (b"no boundary", "multipart/form-data", 400),
        (b"{}" + b" " * 2_000, "application/json", 413),
    ],
)
def test_bodies_that_are_none(
    place_of: Callable[..., Any], bundle_path: Path, content: bytes, kind: str, status: int
) -> None:
    place = place_of(bundle_path, body_bytes=max(1_024, len(content) if status != 413 else 0))
    answer = place.client.post("/v1/videos", content=content, headers={"content-type": kind})
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_without_a_length_is_counted(place_of: Callable[..., Any], bundle_path: Path) -> None:
    place = place_of(bundle_path, body_bytes=2_000)
    parts = (b" " * 500 for _ in range(10))
    answer = place.client.post("/v1/videos", content=parts, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


def test_an_idempotency_key_makes_one_job(place: Any) -> None:
    first, second = (
        place.client.post("/v1/videos", json=PROMPT, headers={"Idempotency-Key": "k"}).json() for _ in range(2)
    )
    assert first["id"] == second["id"]
    answer = place.client.post("/v1/videos", json=PROMPT | {"seed": 1}, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "idempotency_conflict")


def test_a_full_queue_says_when_to_come_again(place_of: Callable[..., Any], bundle_path: Path) -> None:
    place = place_of(bundle_path, queue=1)
    place.ask()
    answer = place.client.post("/v1/videos", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "queue_full")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_deadline_that_cannot_be_met_is_refused(place: Any) -> None:
    worker = place.worker()
    worker.prepare()
    worker.close()
    answer = place.client.post("/v1/videos", json=PROMPT | {"deadline_s": 0.001, "num_inference_steps": 500})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "deadline_cannot_be_met")
    assert place.ask(deadline_s=1e6)["stiv"]["eta_s"] is not None  # of the toy it may be below a millisecond


def asked_in_a_burst(place: Any, *kinds: tuple[int, float]) -> list[str]:
    """What becomes of jobs of so many steps within so many seconds, at once, where a step takes 0.1 s."""
    size = place.bundle.manifest.sampling
    place.store.measure(place.bundle.hash, [Measured(Size(size.frames, size.height, size.width), 2, 0.1)])
    bodies = [
        PROMPT | {"num_inference_steps": steps, "deadline_s": due, "seed": at} for at, (steps, due) in enumerate(kinds)
    ]
    answers = [place.client.post("/v1/videos", json=body) for body in bodies]
    return ["taken" if answer.status_code == 200 else answer.json()["error"]["message"] for answer in answers]


def test_jobs_of_a_burst_count_for_those_behind_them(place: Any) -> None:
    found = asked_in_a_burst(place, (10, 2.5), (10, 2.5), (10, 2.5), (2, 2.5))
    assert found[:2] == ["taken", "taken"]
    assert "it would take about 3 s" in found[2]
    assert found[3] == "taken"


def test_a_deadline_is_kept_though_more_urgent_jobs_come(place: Any) -> None:
    found = asked_in_a_burst(place, (10, 1.5), (3, 0.6), (3, 0.7), (3, 2.5))
    assert found[:2] == ["taken", "taken"]
    assert "another job, accepted before, would be 0.1 s late" in found[2]
    assert found[3] == "taken"


def test_a_full_disk_takes_no_jobs(place_of: Callable[..., Any], bundle_path: Path) -> None:
    place = place_of(bundle_path, free_bytes=2**60)
    answer = place.client.post("/v1/videos", json=PROMPT)
    assert (answer.status_code, answer.json()["error"]["type"]) == (507, "server_error")


def test_too_many_at_once(place_of: Callable[..., Any], bundle_path: Path) -> None:
    place = place_of(bundle_path, rate=2)
    assert [place.client.post("/v1/videos", json=PROMPT).status_code for _ in range(3)] == [200, 200, 429]


def test_sync_waits_and_answers_with_the_file(place: Any) -> None:
    with place.working():
        answer = place.client.post("/v1/videos/sync", json=PROMPT)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert place.look(answer.headers["x-video-id"])["status"] == "completed"


def test_a_client_that_leaves_cancels(place: Any) -> None:
    """An orphan of a disconnect does not run on."""
    body = [{"type": "http.request", "body": json.dumps(PROMPT).encode()}]
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/videos/sync", "raw_path": b"", "query_string": b""}

    async def receive() -> dict[str, Any]:
        return body.pop() if body else {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        pass

    anyio.run(place.client.app, scope | {"headers": headers, "http_version": "1.1"}, receive, send)
    (job,) = place.client.get("/v1/videos").json()["data"]
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled")


def test_an_equal_request_has_the_same_result_at_once(place: Any, finished: Callable[..., None]) -> None:
    first = place.ask()["id"]
    finished(place.worker())
    second = place.ask()
    assert (second["status"], second["id"] != first) == ("completed", True)
    place.client.delete(f"/v1/videos/{first}")
    assert place.client.get(f"/v1/videos/{second['id']}/content").status_code == 200
    assert place.ask(seed=2)["status"] == "queued"
    place.results.remove(second["id"])
    assert place.ask()["status"] == "queued"  # its file has gone


def test_pictures_have_a_limit_together(place: Any) -> None:
    content = bomb(3_000, 5_000)
    frames = {str(index): url(content) for index in range(5)}
    answer = place.client.post("/v1/videos", json=PROMPT | {"num_frames": 5, "fit": "crop", "frames": frames})
    assert answer.status_code == 400
    assert "at most 64 million pixels together" in answer.json()["error"]["message"]


BODY = {
    "prompt": "digit", "negative_prompt": "", "fit": "pad", "num_frames": 4, "height": 8, "width": 8, "fps": 8.0,
    "stride": 1, "original_height": 8, "original_width": 8, "num_inference_steps": 1, "guidance_mode": "sit",
    "guidance_scale": 2.0, "image_guidance_scale": 1.5, "guidance_renorm": True, "solver": "heun", "time_shift": 1.0,
    "seed": 1, "decode_tile": 0, "frames": {}, "latents": {}, "noise": None, "background": "black", "model": "toy",
    "seconds": None, "size": None, "input_reference": None, "priority": 1, "deadline_s": 5.0,
}  # fmt: skip
hostile = st.one_of(
    st.sampled_from((0, -1, 2**63, 10**30, 0.5, 1e300, "", "a", "x" * 300, "\0", "../../a", "data:,", "1e5", "8x8")),
    st.sampled_from((None, True, [], {}, [0], {"a": 1}, {"0": {"png": "AAAA"}}, {"0": "data:image/png;base64,AAAA"})),
    st.sampled_from(({"image_url": "data:image/png;base64,%"}, {"image_url": 1}, {"0": {"dtype": "float32"}})),
    st.integers(),
    st.text(max_size=20),
)


@settings(
    max_examples=CASES // 5,
    deadline=None,
    derandomize="STIV_FUZZ_CASES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
@given(st.dictionaries(st.sampled_from(sorted(BODY)), hostile, min_size=1, max_size=2), st.booleans())
def test_whatever_a_body_says_there_is_an_answer(place: Any, changes: dict[str, Any], form: bool) -> None:
    if form:
        values = {name: json.dumps(value) for name, value in changes.items()}
        parts = {name: (None, value) for name, value in ({"prompt": "digit"} | values).items()}
        answer = place.client.post("/v1/videos", files=parts)
    else:
        answer = place.client.post("/v1/videos", json=BODY | changes)
    assert answer.status_code in (200, 400, 404, 415, 429), answer.text
    if answer.status_code != 200:
        assert "\n" not in answer.json()["error"]["message"]


def test_events_tell_of_every_change_to_the_end(place: Any) -> None:
    job = place.ask(num_inference_steps=5)["id"]
    with place.working():
        lines = place.client.get(f"/v1/videos/{job}/events").text.split("\n")
    states = [json.loads(line.removeprefix("data: "))["status"] for line in lines if line.startswith("data: ")]
    assert states[0] in ("queued", "in_progress")  # the worker may be faster than the first look
    assert states[-1] == "completed"
    assert {line for line in lines if line.startswith("event: ")} == {"event: video"}


def test_events_show_how_it_looks_like_becoming(
    place_of: Callable[..., Any], previewed_path: Path, finished: Callable[..., None]
) -> None:
    """Only to who looks, and only while it is made."""
    place = place_of(previewed_path)
    watched, other = (place.store.get(place.ask(seed=seed, num_inference_steps=9)["id"]) for seed in (1, 2))
    worker = place.worker()

    async def said() -> list[str]:
        stream = events.stream(place.service, watched)
        kinds = [(await anext(stream)).partition("\n")[0]]
        while "event: preview" not in kinds:
            worker._told = 0.0
            worker.turn()
            block = await anext(stream)
            kinds.append(block.partition("\n")[0])
        return [*kinds, block]

    *kinds, block = anyio.run(said)
    assert kinds[0] == "event: video"
    data = json.loads(block.partition("data: ")[2])
    picture = base64.b64decode(data["image"].removeprefix("data:image/webp;base64,"))
    with Image.open(io.BytesIO(picture)) as image:
        assert (data["id"], image.size, image.n_frames) == (watched.id, (4, 4), 4)
    assert place.results.previews.get(other.id) is None
    finished(worker)
    assert [*(place.settings.data / "previews").iterdir()] == []


def test_a_gif_has_all_frames(place: Any, finished: Callable[..., None]) -> None:
    job = place.ask()["id"]
    finished(place.worker())
    answer = place.client.get(f"/v1/videos/{job}/content?variant=gif")
    assert (answer.headers["content-type"], answer.headers["x-video-id"]) == ("image/gif", job)
    assert f'filename="{job}.gif"' in answer.headers["content-disposition"]
    with Image.open(io.BytesIO(answer.content)) as image:
        assert (image.size, image.n_frames, image.info["duration"]) == ((8, 8), 4, 120)  # of 125 ms, in hundredths


def test_what_is_kept_long_enough_goes_with_its_files(place: Any, finished: Callable[..., None]) -> None:
    """Row and file die together."""
    job = place.ask()["id"]
    finished(place.worker())
    place.service.tidy()
    assert place.look(job)["status"] == "completed"
    place.clock.now += place.settings.keep_seconds + 1
    place.service.tidy()
    assert place.client.get(f"/v1/videos/{job}").status_code == 404
    assert [*place.settings.data.rglob("*.mp4")] == []


def test_the_model_says_what_can_be_asked_for(place: Any) -> None:
    (model,) = place.client.get("/v1/models").json()["data"]
    assert model["id"] == "toy"
    assert model["stiv"]["defaults"]["num_frames"] == 4
    assert model["stiv"]["choices"]["fit"] == ["exact", "stretch", "crop", "pad"]
    assert model["stiv"]["buckets"][0]["width"]["max"] == 12
    assert {"t2v", "ti2v", "predict"} <= {*model["stiv"]["tasks"]}


def test_the_model_tells_what_goes_best_with_how_many_steps(place_of: Callable[..., Any], tuned_path: Path) -> None:
    """As it is taken where nothing is said of it."""
    place = place_of(tuned_path)
    (model,) = place.client.get("/v1/models").json()["data"]
    assert (model["stiv"]["defaults"]["solver"], model["stiv"]["defaults"]["time_shift"]) == ("ab2", 1.5)
    assert model["stiv"]["tuned"][1] == {
        "solver": "euler", "steps": 40, "time_shift": 2.5, "late_stretch": 1.0, "skipped_steps": [], "tried": 0.1,
        "default": True, "fitted": False,
    }  # fmt: skip
    assert [each["default"] for each in model["stiv"]["tuned"]] == [True, True, False]


def test_times_for_skipped_blocks_are_told_where_they_can_be(
    place_of: Callable[..., Any], skipping_path: Path, bundle_with: Callable[..., Path]
) -> None:
    """A bundle of a tuned checkpoint has them, with graphs for that or not."""
    tuned, other = read_manifest(skipping_path).tuned, bundle_with()
    assert tuned is not None
    manifest = read_manifest(other)
    own = tuned.model_copy(update={"bundle": manifest.bundle_hash})
    write_manifest(other, manifest.model_copy(update={"tuned": own}))
    models = [place_of(path).client.get("/v1/models").json()["data"][0]["stiv"] for path in (skipping_path, other)]
    found = [[each["skipped_steps"] for each in model["tuned"]] for model in models]
    assert any(found[0])
    assert found[1] == [each for each in found[0] if not each]


def test_health_knows_whether_anybody_works(place: Any) -> None:
    assert place.client.get("/health").json()["reasons"] == ["no worker is alive"]
    from stiv_deploy.serving.store.jobs import LEASE, WorkerState

    now = place.clock.now
    place.store.beat(WorkerState("w", 1, now, now, False, "cpu"))
    assert place.client.get("/health").status_code == 200
    assert place.client.get("/ready").json()["reasons"] == ["no worker is ready yet"]
    place.store.beat(WorkerState("w", 1, now, now - 1_000, True, "cpu"))
    assert "has got on" in place.client.get("/health").json()["reasons"][0]
    place.store.beat(WorkerState("w", 1, now, now, True, "cpu"))
    assert place.client.get("/ready").status_code == 200
    place.service.accepting = False
    assert place.client.get("/ready").status_code == 503
    assert place.client.post("/v1/videos", json=PROMPT).status_code == 503
    place.clock.now += LEASE + 1
    assert place.client.get("/health").status_code == 503


def test_a_route_that_is_none_and_a_fault_are_in_the_same_form(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from starlette.testclient import TestClient

    assert place.client.get("/v1/nothing").json()["error"]["code"] == "not_found"
    assert place.client.get("/v1/videos?limit=x").json()["error"]["param"] == "limit"
    assert place.client.get("/v1/videos/video_0/content?variant=x").status_code == 400

    def broken(*_: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(place.service, "model", broken)
    client = TestClient(place.client.app, base_url="http://127.0.0.1", raise_server_exceptions=False)
    answer = client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
