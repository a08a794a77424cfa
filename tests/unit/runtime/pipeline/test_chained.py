"""Long videos: latents from end to end, given frames bit-equal, resumed at any chunk, a clip at a time in memory."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime import Bundle, Cancelled, GenerationRequest, RequestError, StivPipeline
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.chained import ChainOutput
from stiv_deploy.runtime.pipeline.media import read_comment

LATENTS = np.random.default_rng(0).standard_normal((5, 4, 4, 4)).astype(np.float32)
OPTIONS: dict[str, Any] = {"prompt": "digit three", "seed": 7, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe(bundle_path: Path) -> Iterator[StivPipeline]:
    """The toy bundle, trained at strides 1 and 3 for the first, the first two, every second, and the ends."""
    plain = Bundle.open(bundle_path)
    trained = TrainedOn(
        tasks=("mix",),
        givings=("none", "first", "first 2", "every 2", "ends"),
        strides=(1, 3),
        sizes=((8, 8),),
        frames=(4,),
    )
    bundle = Bundle(plain.folder, plain.manifest.model_copy(update={"trained": trained}))
    with StivPipeline(bundle, open_backend("onnxruntime", bundle, 1)) as opened:
        yield opened


def calls_of(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """What clips are asked for from now on."""
    asked: list[GenerationRequest] = []
    sample = pipe.sample

    def heard(plan: Any, *rest: Any) -> np.ndarray:
        asked.append(plan.videos[0].request)
        return sample(plan, *rest)

    monkeypatch.setattr(pipe, "sample", heard)
    return asked


TASKS: dict[str, Callable[..., ChainOutput]] = {
    "extend": lambda pipe, **more: pipe.extend(LATENTS, 10, **OPTIONS, **more),
    "interpolate": lambda pipe, **more: pipe.interpolate(LATENTS, 2, **OPTIONS, **more),
    "interpolate 4": lambda pipe, **more: pipe.interpolate(LATENTS, 4, **OPTIONS, **more),
    "long": lambda pipe, **more: pipe.long(frames=16, **OPTIONS, **more),
}


@pytest.mark.parametrize(
    ("task", "frames", "spacing"), [("extend", 10, 1), ("interpolate", 9, 2), ("interpolate 4", 17, 4), ("long", 16, 3)]
)
def test_given_frames_are_bit_equal_and_all_others_are_made(
    pipe: StivPipeline, task: str, frames: int, spacing: int
) -> None:
    output = TASKS[task](pipe)
    assert output.latents.shape == (frames, 4, 4, 4)
    if task != "long":
        assert np.array_equal(output.latents[: 5 * spacing : spacing], LATENTS)
    assert len({frame.tobytes() for frame in output.latents}) == frames
    shown = np.concatenate(list(output.frames()))
    assert (shown.shape, shown.dtype) == ((frames, 8, 8, 3), np.uint8)
    assert output.warnings == ()


def test_a_chunk_is_the_clip_that_its_request_makes(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension by hand: each clip is given the last two frames, and has a seed of its own."""
    asked = calls_of(pipe, monkeypatch)
    output = TASKS["extend"](pipe)
    monkeypatch.undo()
    made = LATENTS
    for number in range(3):
        request = GenerationRequest(latents={0: made[-2], 1: made[-1]}, **(OPTIONS | {"seed": 7 + number}))
        plan = pipe.plan(request)
        assert asked[number] == plan.videos[0].request
        made = np.concatenate([made, pipe.run(plan, output_type="latent").latents[0, 2:]])
    assert np.array_equal(output.latents, made[:10])


def test_key_frames_come_first_at_their_stride(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = calls_of(pipe, monkeypatch)
    output = TASKS["long"](pipe)
    strides = [(request.stride, sorted(request.latents)) for request in asked]
    assert strides == [(3, []), (3, [0, 1]), (1, [0, 3]), (1, [0, 3]), (1, [0, 3]), (1, [0, 3]), (1, [0, 3])]
    first = pipe.run(pipe.plan(GenerationRequest(stride=3, **OPTIONS)), output_type="latent").latents[0]
    assert np.array_equal(output.latents[:12:3], first)


@pytest.mark.parametrize("task", ["extend", "interpolate 4", "long"])
def test_a_stopped_run_goes_on_and_ends_in_the_same_bits(
    pipe: StivPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    whole = TASKS[task](pipe)
    asked, cancel = calls_of(pipe, monkeypatch), Event()

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 5:  # in the third clip of two steps each
            cancel.set()

    with pytest.raises(Cancelled):
        TASKS[task](pipe, folder=tmp_path, progress=stop, cancel=cancel)
    assert len(asked) == 3
    asked.clear()
    resumed = TASKS[task](pipe, folder=tmp_path)
    assert len(asked) == resumed.made == whole.made - 2
    assert np.array_equal(resumed.latents, whole.latents)
    assert resumed.seams == whole.seams
    asked.clear()
    assert TASKS[task](pipe, folder=tmp_path).made == 0
    assert asked == []


def test_without_a_seed_a_run_goes_on_with_its_own(pipe: StivPipeline, tmp_path: Path) -> None:
    unseeded = {name: value for name, value in OPTIONS.items() if name != "seed"}
    first, again = (pipe.extend(LATENTS, 8, folder=tmp_path, **unseeded) for _ in range(2))
    assert again.made == 0
    assert first.chain == again.chain
    with pytest.raises(RequestError, match="holds finished chunks of another video"):
        pipe.extend(LATENTS, 9, folder=tmp_path, **unseeded)
    with pytest.raises(RequestError, match="holds finished chunks of another video"):
        pipe.extend(2 * LATENTS, 8, folder=tmp_path, **unseeded)


def test_no_more_frames_than_a_clip_has_are_read_at_a_time(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    output = pipe.extend(LATENTS, 40, **OPTIONS)
    windows: list[int] = []
    decode = pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda plan, latents: windows.append(len(latents[0])) or decode(plan, latents))
    assert [len(window) for window in output.frames()] == [4] * 10
    assert windows == [4] * 10


def test_frames_are_encoded_and_a_file_is_the_same_as_its_frames(pipe: StivPipeline, tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (6, 8, 8, 3), np.uint8)
    output = pipe.extend(frames, 8, **OPTIONS)
    pictures = {index: frames[index] for index in range(4)}
    (clean,) = pipe.encode(pipe.plan(GenerationRequest(frames=pictures, **OPTIONS)))
    assert np.array_equal(output.latents[:4], np.stack([clean[index] for index in range(4)]))
    path = output.write(tmp_path / "long.webp")
    read = pipe.extend(path, 10, **OPTIONS)
    assert read.chain.known == 8
    again = pipe.extend(np.concatenate(list(output.frames())), 10, **OPTIONS)
    assert np.array_equal(read.latents, again.latents)


@pytest.mark.parametrize("name", ["long.mp4", "long.gif", "long.webp", "long.png", "folder"])
def test_every_format_is_written_and_tells_how_it_was_made(pipe: StivPipeline, tmp_path: Path, name: str) -> None:
    output = TASKS["interpolate"](pipe)
    path = output.write(tmp_path / name)
    record = json.loads(read_comment(path))
    assert (record["task"], record["frames"], record["fps"], record["bundle"]) == (
        "interpolate",
        9,
        16,
        pipe.bundle.hash,
    )
    assert record["passes"] == [{"name": "between-0", "chunks": 4, "stride": 1, "spacing": 2, "clips": [4]}]


def test_what_is_new_to_the_model_is_said_once(pipe: StivPipeline, caplog: pytest.LogCaptureFixture) -> None:
    output = pipe.extend(LATENTS, 12, overlap=3, stride=9, **OPTIONS)
    lines = ["stride 9: the model was trained at 1 or 3", "given frames 0, 1, 2: the model was trained to be given"]
    assert len(output.warnings) == len(caplog.records) == 2
    assert all(line.startswith(wanted) for line, wanted in zip(output.warnings, lines, strict=True))
    assert output.to_json()["warnings"] == list(output.warnings)


def test_chunks_vanish_with_the_result_unless_a_folder_is_given(pipe: StivPipeline, tmp_path: Path) -> None:
    output = TASKS["extend"](pipe)
    place = output.timeline.path(output.timeline.pieces[0]).parent
    assert place.is_dir()
    del output
    assert not place.exists()
    kept = TASKS["extend"](pipe, folder=tmp_path / "kept")
    del kept
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "chunks.json",
        *(f"more-{number:05d}.npy" for number in range(3)),
        "source-00000.npy",
        "source-00001.npy",
    ]
    shutil.rmtree(tmp_path / "kept")


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (LATENTS.astype(np.float64), {}, r"the video is float64 \[5, 4, 4, 4\]; give frames uint8"),
        (LATENTS[0], {}, r"the video is float32 \[4, 4, 4\]; give frames uint8"),
        (np.full_like(LATENTS, np.nan), {}, "the latents of the video are not finite"),
        (3, {}, "cannot use a int as a video; give a file, frames or latents"),
        (LATENTS, {"image": np.zeros((8, 8, 3), np.uint8)}, "is given its frames by the task; leave image"),
        (LATENTS, {"num_videos_per_prompt": 2}, "one long video is made at a time; give one prompt, and no count"),
        (LATENTS[:, :, :1], {}, "height is 2; this bundle takes 4 to 12"),
        (np.zeros((5, 8, 6, 3), np.uint8), {}, "the video is 6x8 .*, the video is 8x8; give it that size"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    pipe: StivPipeline, tmp_path: Path, video: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        pipe.extend(video, 12, folder=tmp_path / "chunks", **OPTIONS, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "chunks").exists()
