"""What a clip says about itself: read back from every format, it reproduces its run; paths and sizes have bounds."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import GenerationRequest, RequestError, StivPipeline
from stiv_deploy.runtime.pipeline import records
from stiv_deploy.runtime.pipeline.output import StivOutput
from stiv_deploy.runtime.pipeline.records import GenerationRecord, read_requests, report_text

FORMATS = ("clip.mp4", "clip.png", "clip.gif", "clip.webp", "clip")
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LATENT = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 4, 4)


def record_of(**values: Any) -> GenerationRecord:
    request = GenerationRequest(prompt="ä, “x”", **values)
    return GenerationRecord(bundle="b" * 64, backend="onnxruntime", request=request)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"num_inference_steps": 3, "guidance_mode": "sit", "solver": "heun", "stride": 2, "time_shift": 1.1},
        {"image": {1: PIXELS}, "guidance_scale": 1 / 3},
        {"latents": {0: LATENT}, "num_videos_per_prompt": 2},
    ],
    ids=["settings", "image", "latents"],
)
def test_a_clip_reproduces_its_run_bit_by_bit(
    pipe: StivPipeline, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    first = pipe("digit “three”\n", **options)
    targets = first.write(tmp_path / name)
    for index, target in enumerate(targets):
        (recorded,) = read_requests(target)
        assert recorded == (first.requests[index], pipe.bundle.manifest.bundle_hash)
    read = [read_requests(target)[0].request for target in targets]
    again = pipe.run(pipe.plan(read))
    np.testing.assert_array_equal(again.frames, first.frames)
    np.testing.assert_array_equal(again.latents, first.latents)


def test_a_written_clip_is_the_same_with_and_without_its_record(pipe: StivPipeline, tmp_path: Path) -> None:
    from stiv_deploy.runtime import write_video

    output = pipe("digit", seed=1)
    clip = np.asarray(output.frames)[0]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("clip.png", "clip.webp"):
        with Image.open(write_video(tmp_path / "a" / name, clip, 8)) as plain:
            output.write(tmp_path / "b" / name, 1)
            with Image.open(tmp_path / "b" / name) as recorded:
                np.testing.assert_array_equal(np.asarray(plain), np.asarray(recorded))


def test_pictures_by_path_are_stored_as_name_and_hash(
    pipe: StivPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.fromarray(PIXELS).save("in/first.png")
    content = Path("in/first.png").read_bytes()
    output = pipe("digit", image={0: "in/first.png", 1: tmp_path / "in" / "first.png"}, num_inference_steps=1)
    (target,) = output.write(tmp_path / "clip.png")
    assert str(tmp_path).encode() not in target.read_bytes()
    frames = read_requests(target)[0].request.to_json()["frames"]
    digest = hashlib.sha256(content).hexdigest()
    assert frames == {"0": {"path": "in/first.png", "sha256": digest}, "1": {"path": "first.png", "sha256": digest}}
    with pytest.raises(RequestError, match=r"^first.png: no such image file$"):
        pipe.plan(read_requests(target)[0].request)
    monkeypatch.chdir(tmp_path / "in")
    (tmp_path / "in" / "in").symlink_to(tmp_path / "in")
    pipe.plan(read_requests(target)[0].request)
    Image.fromarray(255 - PIXELS).save("first.png")
    with pytest.raises(RequestError, match=r"first.png: not the picture that the request was made with .*SHA-256"):
        pipe.plan(read_requests(target)[0].request)


@pytest.mark.parametrize("path", ["/data/me/a.png", "C:\\me\\a.png", "\\\\host\\me\\a.png"])
def test_an_absolute_path_stays_at_home(path: str) -> None:
    record = record_of(frames={0: path})
    assert json.loads(record.embedded())["request"]["frames"] == {"0": {"path": "a.png"}}
    assert record.to_json()["request"]["frames"] == {"0": {"path": path}}


def test_too_much_to_embed_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(frames={0: PIXELS}, seed=3)
    monkeypatch.setattr(records, "EMBEDDED_LIMIT", len(record.embedded()) - 1)
    values = json.loads(record.embedded())
    assert values["omitted"] == ["frames"]
    assert values["task"] == "ti2v"
    assert values["request"]["seed"] == 3
    (tmp_path / "a.json").write_text(record.embedded())
    with pytest.raises(RequestError, match="a.json: the frames of its request were too large for it; use the report"):
        read_requests(tmp_path / "a.json")


def test_a_report_has_all_requests_in_full(tmp_path: Path) -> None:
    made = [record_of(seed=1, frames={0: "/data/me/a.png"}), record_of(seed=2, latents={0: LATENT})]
    text = report_text([Path("x-0.mp4"), Path("x-1.mp4")], made, {"total": 1.5})
    (tmp_path / "a.json").write_text(text)
    values = json.loads(text)
    assert [clip["file"] for clip in values["clips"]] == ["x-0.mp4", "x-1.mp4"]
    assert values["timings"] == {"total": 1.5}
    assert read_requests(tmp_path / "a.json") == [(record.request, "b" * 64) for record in made]


def test_json_of_one_request_or_several(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"prompt": "a"}')
    assert read_requests(path) == [(GenerationRequest(prompt="a"), None)]
    path.write_text('[{"prompt": "a"}, {"prompt": "b", "seed": 2}]')
    assert [each.request.prompt for each in read_requests(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.json", None, "none.json: no request can be read from it (No such file or directory)"),
        ("none.mp4", None, "none.mp4: no such file"),
        ("a.json", b"{", "a.json: no request can be read from it (Expecting"),
        ("a.json", b"\xff\xfe", "a.json: no request can be read from it (it is not UTF-8 text"),
        ("a.json", b'{"prompt": 3}', "a.json: a prompt must be a string, got 3"),
        ("a.json", b'{"promt": "digit"}', "a.json: no prompt given"),
        ("a.json", b'{"prompt": "digit", "sed": 1}', "a.json: a request has no 'sed'; there are: prompt"),
        ("a.json", b'{"request": {"prompt": "a"}, "bundle": 3}', "a.json: no prompt given"),
        ("a.json", b'{"request": {"seed": -1}, "bundle": "b"}', "a.json: seed must be from 0"),
        ("a.mp4", b"no video", "a.mp4: not a video that can be read"),
        ("a.png", b"no picture", "a.png: not a picture that can be read"),
    ],
)
def test_what_no_request_can_be_read_from(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_requests(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")
    assert "\n" not in str(caught.value)


def test_a_picture_that_is_none_of_ours(tmp_path: Path) -> None:
    for name in ("a.png", "a.gif", "a.webp"):
        Image.fromarray(PIXELS).save(tmp_path / name)
        with pytest.raises(RequestError, match="it carries no request; clips that 'stiv generate' wrote do"):
            read_requests(tmp_path / name)
    with pytest.raises(RequestError, match="no such file"):
        read_requests(tmp_path)


def output_of(**values: Any) -> StivOutput:
    common: dict[str, Any] = {"latents": LATENT[None, None], "bundle": "b", "backend": "onnxruntime", "timings": {}}
    return StivOutput(requests=[GenerationRequest(prompt="a", fps=8)], **common | values)


def test_pictures_are_written_like_arrays(tmp_path: Path) -> None:
    array = output_of(frames=PIXELS[None, None]).write(tmp_path / "a.png")[0].read_bytes()
    pictures = output_of(frames=[[Image.fromarray(PIXELS)]]).write(tmp_path / "b.png")[0].read_bytes()
    assert array == pictures


def test_latents_alone_can_not_be_written(tmp_path: Path) -> None:
    from stiv_deploy.runtime import OutputError

    with pytest.raises(OutputError, match="there are only latents to write"):
        output_of(frames=None).write(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []
