"""``stiv extend``, ``interpolate`` and ``long``: options, files, what is refused, and how they stop."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.films import open_film
from stiv_deploy.runtime.pipeline.media import write_video
from stiv_deploy.runtime.pipeline.timeline import locked

Run = Callable[..., tuple[int, str, str]]
CLIP = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
FEW = ("--steps", 1, "--seed", 3)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return write_video(tmp_path / "clip.webp", CLIP, 8)


@pytest.mark.parametrize(
    ("command", "frames"),
    [
        (["extend", "--frames", 9, "--overlap", 2], 9),
        (["interpolate"], 9),
        (["interpolate", "--factor", 4], 17),
        (["long", "--prompt", "digit three", "--frames", 7], 7),
        (["long", "--prompt", "digit three", "--frames", 7, "--upsample", 2], 13),
        (["extend", "--frames", 6, "--overlap", 2, "--upsample", 4], 21),
    ],
)
def test_a_video_is_written_and_told(
    run: Run, bundle_path: Path, clip: Path, tmp_path: Path, command: list[Any], frames: int
) -> None:
    name, *rest = command
    video = [] if name == "long" else [clip]
    out, report = tmp_path / "out.webp", tmp_path / "report.json"
    code, told, err = run(name, bundle_path, *video, *rest, *FEW, "--upscale", 2, "--out", out, "--json", report)
    assert (code, err) == (0, "")
    assert told.startswith(f"{out}: {frames} frames of 8x8 at ")
    assert "seams (step there by the usual step, 1 is none): " in told
    film = open_film(out)
    assert film.frames == frames
    assert film.made == (8, 8)
    with Image.open(out) as image:
        assert image.size == (16, 16)
    values = json.loads(report.read_text())
    assert (values["task"], values["frames"], values["file"]) == (name, frames, str(out))
    assert values["seams"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.webp", "out.webp", "report.json"]


def test_every_option_reaches_the_clips(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    sample = StivPipeline.sample

    def heard(pipe: StivPipeline, plan: Any, *rest: Any) -> np.ndarray:
        asked.append(plan.videos[0].request)
        return sample(pipe, plan, *rest)

    monkeypatch.setattr(StivPipeline, "sample", heard)
    clip = write_video(tmp_path / "clip.webp", CLIP[:, :, :4].repeat(2, axis=1), 8)
    options = {
        "--prompt": "digit", "--negative-prompt": "left", "--clip": 3, "--fit": "crop", "--height": 12, "--width": 6,
        "--fps": 5, "--stride": 2, "--seed": 9, "--steps": 2, "--guidance": 2.5, "--backend": "onnxruntime",
        "--threads": 1, "--device": 0, "--overlap": 1, "--chunks": tmp_path / "kept",
    }  # fmt: skip
    flat = [word for option in options.items() for word in option]
    code, _, err = run("extend", bundle_path, clip, "--frames", 7, *flat, "--out", tmp_path / "out.gif")
    assert code == 0, err
    request = asked[0]
    assert (request.prompt, request.negative_prompt, request.num_frames) == ("digit", "left", 3)
    assert (request.height, request.width, request.fps, request.stride) == (12, 6, 5, 2)
    assert (request.seed, request.num_inference_steps, request.guidance_scale) == (9, 2, 2.5)
    assert (tmp_path / "kept" / "chunks.json").is_file()


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    run: Run, bundle_path: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "extend",
        bundle_path,
        clip,
        "--frames",
        12,
        "--overlap",
        1,
        "--steps",
        1,
        "--out",
        tmp_path / "out.webp",
    )
    asked: list[int] = []
    sample = StivPipeline.sample

    def interrupted(pipe: StivPipeline, plan: Any, *rest: Any) -> np.ndarray:
        asked.append(plan.videos[0].seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return sample(pipe, plan, *rest)

    monkeypatch.setattr(StivPipeline, "sample", interrupted)
    code, _, err = run(*command)
    folder = tmp_path / "out.webp.chunks"
    assert (code, err) == (130, f"1 finished clips are kept in {folder}; the same command goes on\ninterrupted\n")
    assert folder.is_dir()
    code, told, _ = run(*command)
    assert code == 0
    assert "3 clips (2 made now)" in told
    assert asked[2:] == [asked[1], asked[1] + 1]  # its own seed, though none was given
    assert not folder.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["extend", "CLIP", "--frames", 5], "the video has 5 frames, and 5 are wanted; ask for more than it has"),
        (["extend", "CLIP", "--frames", 9, "--overlap", 9], "overlap is 9; a clip has 4 frames, take 1 to 3"),
        (["extend", "missing.mp4", "--frames", 9], "missing.mp4: no such clip"),
        (["extend", "CLIP", "--frames", 9, "--height", 12], "the video is 8x12; give it that size, or choose a fit"),
        (["interpolate", "CLIP", "--factor", 3], "factor must be 2 or 4, got 3"),
        (["interpolate", "CLIP", "--clip", 9], "frames is 9; this bundle takes 1 to 6"),
        (["long", "--prompt", "a", "--frames", 8], "nearest number is 7 or 10"),
        (["long", "--prompt", "a", "--frames", 7, "--image", "no.png"], "no.png: no such image file"),
        (["long", "--frames", 7], "no prompt given; give --prompt, or --request with a file that has one"),
        (["long", "--frames", 7, "--request", "no.json"], "no.json: no request can be read from it"),
        (["long", "--prompt", "a", "--frames", 7, "--upsample", 3], "upsample must be 2 or 4, got 3"),
        (["generate", "--prompt", "a", "--upsample", 3], "upsample must be 2 or 4, got 3"),
        (["generate", "--prompt", "a", "--frames", 1, "--upsample", 2], "there is nothing between"),
        (["generate", "--prompt", "a", "--prompt", "b", "--upsample", 2], "--upsample is of one clip"),
        (["extend", "CLIP", "--frames", 9, "--out", "clip.avi"], "cannot write '.avi'; choose"),
        (["extend", "CLIP", "--frames", 9, "--out", "CLIP"], "would replace"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, bundle_path: Path, clip: Path, tmp_path: Path, command: list[Any], message: str
) -> None:
    name, *words = [str(clip) if word == "CLIP" else word for word in command]
    out = [] if "--out" in words else ["--out", tmp_path / "out.webp"]
    code, _, err = run(name, bundle_path, *words, *FEW, *out)
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["clip.webp"]


def test_a_task_that_the_model_was_not_trained_for(run: Run, own_bundle: Path, clip: Path, tmp_path: Path) -> None:
    trained = TrainedOn(tasks=("t2v",), givings=("none",), strides=(1,), sizes=((8, 8),), frames=(4,))
    write_manifest(own_bundle, read_manifest(own_bundle).model_copy(update={"trained": trained}))
    for words in (("extend", own_bundle, clip, "--frames", 9), ("interpolate", own_bundle, clip)):
        code, _, err = run(*words, "--out", tmp_path / "out.webp")
        assert code == 2
        assert "this model was not trained to be given" in err
        assert "its givings are none" in err


def test_a_generated_clip_is_upsampled_in_latents(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    picture, out, report = tmp_path / "first.png", tmp_path / "out.webp", tmp_path / "report.json"
    Image.fromarray(CLIP[0]).save(picture)
    words = ("generate", bundle_path, "--prompt", "digit", "--image", picture, *FEW)
    assert run(*words, "--out", tmp_path / "plain")[0] == 0
    code, told, err = run(*words, "--upsample", 2, "--out", out, "--json", report)
    assert (code, err) == (0, "")
    assert told.startswith(f"{out}: 7 frames of 8x8 at 16 a second")
    values = json.loads(report.read_text())
    assert [each["name"] for each in values["passes"]] == ["clip", "upsampled-0"]
    plain = [frame for window in open_film(tmp_path / "plain").windows(9, 8, 8) for frame in window]
    assert run(*words, "--upsample", 2, "--out", tmp_path / "faster")[0] == 0
    faster = [frame for window in open_film(tmp_path / "faster").windows(9, 8, 8) for frame in window]
    assert np.array_equal(np.stack(faster[::2]), np.stack(plain))


@pytest.mark.parametrize(("words", "prompt"), [((), "digit four"), (("--prompt", ""), "")])
@pytest.mark.parametrize("command", [("interpolate",), ("extend", "--frames", 6)], ids=lambda words: words[0])
def test_a_clip_of_ours_has_its_own_prompt(
    run: Run, bundle_path: Path, tmp_path: Path, command: tuple[object, ...], words: tuple[str, ...], prompt: str
) -> None:
    made, out = tmp_path / "made.webp", tmp_path / "out.webp"
    assert run("generate", bundle_path, "--prompt", "digit four", *FEW, "--out", made)[0] == 0
    name, *own = command
    assert run(name, bundle_path, made, *own, *FEW, *words, "--out", out)[0] == 0
    assert open_film(made).prompt == "digit four"
    assert open_film(out).prompt == prompt


def test_a_second_run_in_one_folder_is_one_line(run: Run, bundle_path: Path, clip: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    words = ("interpolate", bundle_path, clip, *FEW, "--chunks", kept, "--out", tmp_path / "out.webp")
    with locked(kept):
        code, _, err = run(*words)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{kept}: another run makes a video there; wait for its end, stop it, or choose another folder" in err
    assert run(*words)[0] == 0
    assert not (kept / "chunks.lock").exists()


def test_a_request_says_how_to_sample(run: Run, bundle_path: Path, clip: Path, tmp_path: Path) -> None:
    """That of a clip, or that of a long video's clips; options replace what it says."""
    made, asked = tmp_path / "made.webp", tmp_path / "made.json"
    first, report = tmp_path / "first.webp", tmp_path / "report.json"
    picture = tmp_path / "picture.png"
    Image.fromarray(CLIP[0]).save(picture)
    words = ("--prompt", "digit four", "--image", picture, "--guidance", 2.5, "--frames", 4)
    assert run("generate", bundle_path, *words, *FEW, "--out", made, "--json", asked)[::2] == (0, "")
    assert run("extend", bundle_path, clip, "--frames", 9, "--request", made, "--out", first, "--json", report)[0] == 0
    template = json.loads(report.read_text())["template"]
    assert (template["prompt"], template["guidance_scale"], template["num_frames"]) == ("digit four", 2.5, 4)
    assert template["seed"] == 3
    for source in (first, report):
        again = tmp_path / f"again-{source.suffix[1:]}"
        assert run("extend", bundle_path, clip, "--frames", 9, "--request", source, "--out", again)[0] == 0
        ((frames,), (wanted,)) = (list(open_film(path).windows(9, 8, 8)) for path in (again, first))
        assert np.array_equal(frames, wanted)
    words = ("long", bundle_path, "--frames", 7, "--request", asked, "--seed", 9, "--out", tmp_path / "long.webp")
    assert run(*words, "--json", report)[::2] == (0, "")
    template = json.loads(report.read_text())["template"]
    assert (template["prompt"], template["seed"], list(template["frames"])) == ("digit four", 9, ["0"])
