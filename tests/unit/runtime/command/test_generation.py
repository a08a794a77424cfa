"""From options of ``stiv generate`` to requests: every one is passed on, read back or refused in one line."""

import inspect
import io
import json
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import av
import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import GenerationRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.command.cli import generate
from stiv_deploy.runtime.command.generation import FIELDS, parse_frames, replaced
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline import limits
from stiv_deploy.runtime.pipeline.plan import RECOMMENDED
from stiv_deploy.runtime.pipeline.request import NAMES

Run = Callable[..., tuple[int, str, str]]


OPTIONS: dict[str, Any] = {
    "--negative-prompt": "left",
    "--fit": "crop",
    "--background": "white",
    "--count": 2,
    "--frames": 3,
    "--height": 4,
    "--width": 4,
    "--fps": 7.5,
    "--stride": 3,
    "--original-height": 720,
    "--original-width": 1280,
    "--steps": 2,
    "--guidance": 2.5,
    "--image-guidance": 1.25,
    "--guidance-mode": "sit",
    "--no-renorm": False,
    "--guidance-from": 0.125,
    "--guidance-until": 0.5,
    "--unseen": "zero",
    "--solver": "ab2",
    "--time-shift": 2.0,
    "--late-stretch": 1.5,
    "--no-skip-blocks": False,
    "--decode-tile": 4,
}
"""An option for each field of a request that is one, with another value than the default."""


def flat(options: Mapping[str, Any]) -> list[Any]:
    return [item for name, value in options.items() for item in ([name] if name.startswith("--no-") else [name, value])]


def test_every_option_is_a_field_and_every_field_has_an_option() -> None:
    parameters = {name for name in inspect.signature(generate).parameters if name in FIELDS}
    assert parameters == set(FIELDS)
    fields = set(GenerationRequest.model_fields)
    assert fields - set(FIELDS.values()) == {
        "prompt",
        "frames",
        "seed",
        "latents",
        "noise",
        "solver_weights",
        "skipped_steps",
    }  # as FIELDS says
    assert {name.removeprefix("--no-").removeprefix("--").replace("-", "_") for name in OPTIONS} == set(FIELDS)


def test_prompts_from_a_file_and_timings_as_a_table(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffdigit three\n\n  moving left \r\n", encoding="utf-8")
    arguments = ["--prompt", "right", "--prompts", file, "--steps", 1, "--seed", 4]
    code, out, err = run("generate", bundle_path, *arguments, "--timings", "--out", tmp_path / "out.gif")
    assert (code, err) == (0, "")
    assert [(each.prompt, each.seed) for each in planned] == [("right", 4), ("digit three", 5), ("moving left", 6)]
    rows = [line.split() for line in out.splitlines() if line.strip().endswith("%")]
    assert {row[0] for row in rows} == {"load", "text", "encode", "denoise", "decode", "graphs", "replays", "total"}
    assert rows[-1][2] == "100.0%"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n", "no prompt in it; write one a line"),
        (b"a\xff", "not a file of prompts (it is not UTF-8 text, its byte 1"),
    ],
)
def test_a_file_without_prompts(run: Run, bundle_path: Path, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    code, _, err = run("generate", bundle_path, "--prompts", file, "--out", tmp_path / "out.gif")
    assert code == 2
    assert err.startswith(f"error: {file}: {message}")
    assert err.count("\n") == 1
    assert list(tmp_path.glob("out*")) == []


def test_names_to_choose_from_are_those_of_the_request() -> None:
    hints = get_type_hints(generate)
    for name in ("fit", "guidance_mode", "solver"):
        choices, _ = get_args(hints[name])
        assert sorted(get_args(choices)) == sorted(NAMES[name])


def test_generate_passes_every_option_on(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    red = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(red)
    others = ["--image", red, "--frame", f"-1={red}", "--seed", 11, "--backend", "onnxruntime", "--threads", 1]
    others += ["--device", 0]
    code, _, err = run(
        "generate", bundle_path, "--prompt", "digit", *flat(OPTIONS), *others, "--out", tmp_path / "out.mp4"
    )
    assert (code, err) == (0, "")
    names = {FIELDS[option.removeprefix("--no-").removeprefix("--").replace("-", "_")]: option for option in OPTIONS}
    wanted = {field: OPTIONS[option] for field, option in names.items()}
    assert planned == [GenerationRequest(prompt="digit", seed=11, frames={0: red, -1: red}, **wanted)]
    defaults = dict(GenerationRequest(prompt=""))
    assert all(wanted[field] != defaults[field] for field in wanted)  # so that a lost option shows


def test_each_default_of_the_bundle_is_named_in_the_help_and_shown_with_the_bundle(run: Run, bundle_path: Path) -> None:
    hints = get_type_hints(generate, include_extras=True)
    helps = {name: hint.__metadata__[0].help for name, hint in hints.items() if hasattr(hint, "__metadata__")}
    of_bundle = {name for name, field in FIELDS.items() if field in RECOMMENDED}
    assert {name for name, text in helps.items() if text.endswith("Default: the bundle's.")} == of_bundle
    code, out, _ = run("inspect", bundle_path)
    assert code == 0
    table = out[out.index("Defaults of 'stiv generate'") : out.index("Buckets")]
    shown = dict(line.split(maxsplit=1) for line in table.splitlines() if line.strip().startswith("--"))
    sampling = Bundle.open(bundle_path).manifest.sampling
    assert int(shown["--frames"]) == sampling.frames
    assert shown["--guidance-mode"].strip() == sampling.guidance_mode
    assert len(shown) == len(of_bundle)


def test_options_that_are_not_given_leave_the_defaults(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    assert run("generate", bundle_path, "--prompt", "digit", "--seed", 0, "--out", tmp_path / "a.png")[0] == 0
    assert planned == [GenerationRequest(prompt="digit", seed=0)]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", ["a.mp4", "a.png", "a.json"])
def test_request_makes_a_clip_again(run: Run, bundle_path: Path, tmp_path: Path, name: str) -> None:
    Image.fromarray(np.full((8, 8, 3), 51, dtype=np.uint8)).save(tmp_path / "grey.png")
    options = {"--steps": 3, "--fps": 12.5, "--guidance-mode": "sit", "--image": tmp_path / "grey.png"}
    first = ("generate", bundle_path, "--prompt", "digit", *flat(options))
    out = tmp_path / (name if name != "a.json" else "a.mp4")
    assert run(*first, "--out", out, "--json", tmp_path / "a.json")[0] == 0
    again = tmp_path / f"again{out.suffix}"
    pictures = ["--image", tmp_path / "grey.png"] if name != "a.json" else []  # a clip has but the picture's name
    code, stdout, err = run("generate", bundle_path, "--request", tmp_path / name, *pictures, "--out", again)
    assert (code, err) == (0, "")
    seed = json.loads((tmp_path / "a.json").read_text())["clips"][0]["request"]["seed"]
    assert f"seed {seed}\n" in stdout
    if out.suffix == ".mp4":
        np.testing.assert_array_equal(frames_of(again), frames_of(out))
    else:
        np.testing.assert_array_equal(np.asarray(Image.open(again)), np.asarray(Image.open(out)))


def test_request_with_a_picture_that_changed(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "red").save("first.png")
    assert run("generate", bundle_path, "--prompt", "digit", "--image", "first.png", "--out", "a.mp4")[0] == 0
    Image.new("RGB", (8, 8), "blue").save("first.png")
    code, out, err = run("generate", bundle_path, "--request", "a.mp4", "--out", "b.mp4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: first.png: not the picture that the request was made with")
    assert not Path("b.mp4").exists()


def test_options_replace_what_the_request_says(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"prompt": "a", "seed": 3, "num_inference_steps": 2, "count": 2}, {"prompt": "b", "seed": 9}]')
    command = ("generate", bundle_path, "--request", file, "--out", tmp_path / "a.png")
    assert run(*command, "--steps", 1)[0] == 0
    first = GenerationRequest(prompt="a", seed=3, num_inference_steps=1, count=2)
    assert planned == [first, GenerationRequest(prompt="b", seed=9, num_inference_steps=1)]
    assert run(*command, "--seed", 5)[0] == 0
    assert [request.seed for request in planned] == [5, 7]
    assert run(*command, "--prompt", "c", "--prompt", "d")[0] == 0
    assert [(request.prompt, request.seed) for request in planned] == [("c", 3), ("d", 3), ("c", 9), ("d", 9)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ((), True),
        (("--guidance", 2, "--steps", 3, "--time-shift", 1.5), True),
        (("--late-stretch", 2), True),  # the request has none of its own that this would be another than
        (("--steps", 2), False),
        (("--solver", "euler"), False),
        (("--time-shift", 2), False),
        (("--prompt", "b", "--time-shift", 2), False),
    ],
)
def test_weights_of_a_request_go_where_an_option_takes_their_times(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest], options: tuple[Any, ...], kept: bool
) -> None:
    weights = ((1.25, -0.25), (1.5, -0.625))
    read = GenerationRequest(
        prompt="a", seed=3, num_inference_steps=3, solver="ab2", time_shift=1.5, solver_weights=weights
    )
    (tmp_path / "a.json").write_text(json.dumps(read.to_json()))
    command = ("generate", bundle_path, "--request", tmp_path / "a.json", "--out", tmp_path / "a.png", *options)
    code, _, err = run(*command)
    assert code == 0, err
    assert [each.solver_weights for each in planned] == [weights if kept else None]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({}, True),
        ({"negative_prompt": "b", "num_inference_steps": 6, "solver": "ab2"}, True),
        ({"num_inference_steps": 7}, False),
        ({"solver": "euler"}, False),
        ({"time_shift": 2.0}, False),
        ({"late_stretch": 2.0}, False),
    ],
)
def test_skipped_steps_of_a_request_go_where_an_option_takes_their_times(values: dict[str, Any], kept: bool) -> None:
    times = {"num_inference_steps": 6, "solver": "ab2", "time_shift": 1.5, "late_stretch": 1.0}
    read = {"prompt": "a", "skipped_steps": (3, 5), **times}
    assert replaced(read, values) == read | ({} if kept else {"skipped_steps": None, "solver_weights": None}) | values


def test_steps_that_skip_are_listed(run: Run, skipping_path: Path) -> None:
    words = " ".join(run("inspect", skipping_path)[1].split())
    assert "6 --skip-blocks ab2" in words
    assert "8 --skip-blocks euler" in words


def test_steps_that_skip_are_asked_for_by_an_option(
    run: Run, skipping_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    command = ("generate", skipping_path, "--prompt", "digit", "--out", tmp_path / "a.png")
    code, _, err = run(*command, "--steps", 6, "--skip-blocks")
    assert code == 0, err
    assert [each.skip_blocks for each in planned] == [True]
    code, _, err = run(*command, "--steps", 7, "--skip-blocks")
    assert (code, err.count("\n")) == (2, 1)
    assert "tuned to skip blocks in 6 steps of ab2, 8 steps of euler; ask for one of these" in err


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({}, (1.5, ((1.5, -0.5),), (4,))),
        ({"num_inference_steps": 9}, (1.5, None, None)),
        ({"skip_blocks": False}, (None, None, None)),  # they were tuned together
        ({"skip_blocks": True}, (None, None, None)),  # the bundle's own come in their place
        ({"skip_blocks": True, "time_shift": 2.0}, (2.0, None, None)),
    ],
)
def test_skipped_steps_of_a_request_go_where_an_option_says_so(options: dict[str, Any], left: tuple[Any, ...]) -> None:
    read = {"num_inference_steps": 5, "time_shift": 1.5, "solver_weights": ((1.5, -0.5),), "skipped_steps": (4,)}
    found = replaced(read, options)
    assert tuple(found[name] for name in ("time_shift", "solver_weights", "skipped_steps")) == left
    whole = {"num_inference_steps": 5, "time_shift": 1.5, "skipped_steps": None}
    assert replaced(whole, {"skip_blocks": False})["time_shift"] == 1.5


def test_request_of_another_bundle_is_noted(
    run: Run, bundle_path: Path, tmp_path: Path, bundle_of: Callable[[float], Path]
) -> None:
    assert run("generate", bundle_of(0.25), "--prompt", "digit", "--out", tmp_path / "a.png")[0] == 0
    code, _, err = run("generate", bundle_path, "--request", tmp_path / "a.png", "--out", tmp_path / "b.png")
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("note: made with another bundle (")
    assert run("generate", bundle_path, "--request", tmp_path / "b.png", "--out", tmp_path / "c.png")[2] == ""


def test_count_of_each_prompt(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    command = ("generate", bundle_path, "--prompt", "digit", "--prompt", "three", "--seed", 5, "--count", 2)
    code, stdout, _ = run(*command, "--out", tmp_path / "a.png")
    assert code == 0
    assert [line.rpartition("seed ")[2] for line in stdout.splitlines()[:4]] == ["5", "6", "7", "8"]
    assert len(list(tmp_path.iterdir())) == 4


BAD_REQUESTS = [
    (["--steps", "0"], "steps"),
    (["--steps", "-3"], "steps"),
    (["--guidance", "nan"], "guidance_scale must be a finite number, got nan"),
    (["--guidance", "inf"], "guidance_scale must be a finite number, got inf"),
    (["--guidance-mode", "most"], "'--guidance-mode': 'most' is not one of 'jit', 'sit', 'none'. (see 'stiv generate"),
    (["--guidance-mode", "x" * 5000], "is not one of 'jit', 'sit', 'none'. (see 'stiv generate --help')"),
    (["--solver", "rk4"], "--solver"),
    (["--frames", "7"], "frames is 7; this bundle takes 1 to 6"),
    (["--height", "14"], "height is 14"),
    (["--width", "7"], "width is 7"),
    (["--backend", "abacus"], "unknown backend 'abacus'"),
    (["--threads", "-1"], "threads"),
    (["--upscale", "0"], "--upscale"),
    (["--seed", "-1"], "seed"),
    (["--image", "none.png"], "none.png: no such image file"),
    (["--image", "text.png"], "text.png: not an image"),
    (["--image", "bomb.png"], "bomb.png: has 13000x13000 = 169.0 million pixels; a picture has at most 50 million"),
    (["--frame", "0=far.tif"], "far.tif is of floats from 0 to 9; give 8 or 16 bits for each colour, or floats from 0"),
    (["--background", "mauvish"], "background must be a colour without alpha, as in white or #336699, got 'mauvish'"),
    (["--image", "large.png"], "large.png is 20x10 (width x height), the video is 8x8"),
    (["--frame", "9=good.png"], "frame 9"),
    (["--frame", "good.png"], "want INDEX=FILE"),
    (["--image", "good.png", "--frame", "0=good.png"], "frame 0 is given twice"),
    (["--out", "clip.avi"], "cannot write '.avi'"),
    (["--out", "none/clip.mp4"], "does not exist"),
    (["--out", ""], ".: names no file; choose a name such as clip.mp4"),
    (["--out", "."], ".: names no file"),
    (["--out", "/"], "/: names no file"),
    (["--out", ".."], "..: is the folder that you are in, or above it"),
    (["--out", ".mp4"], ".mp4: names no file; choose a name such as clip.mp4"),
    (["--out", ".GIF", "--count", "2"], ".GIF: names no file"),
    (["--out", "good.png", "--image", "good.png"], "good.png: would replace good.png, which is read"),
    (["--out", "link.png", "--frame", "0=good.png"], "link.png: would replace good.png, which is read"),
    (["--out", "clip.png", "--json", "a.json", "--request", "a.json"], "a.json: would replace a.json, which is read"),
    (["--fps", "0"], "fps must be from 0.01 to 1000.0, got 0.0"),
    (["--stride", "0"], "stride must be from 1 to 65536, got 0"),
    (["--count", "0"], "count must be from 1 to 1000, got 0"),
    (["--fit", "zoom"], "--fit"),
    (["--fit", "exact", "--resize"], "--resize is given, and --fit exact resizes nothing"),
    (["--device", "-1"], "the device is a GPU's index, 0 or more; got -1"),
    (["--request", "none.json"], "none.json: no request can be read from it (No such file or directory)"),
    (["--request", "good.png"], "good.png: it carries no request"),
    (["--request", "bomb.png"], "bomb.png: it carries no request"),
    (["--request", "text.png"], "text.png: not a picture that can be read"),
    (["--request", "unknown.json"], "unknown.json: a request has no 'sed'; there are: prompt, "),
    (["--request", "latents.json"], "the latents of frame 0 are [1, 1, 1]; 4 frames of 8x8 wants [4, 4, 4]"),
    (["--frame", f"{'9' * 5000}=good.png"], "want INDEX=FILE"),
    (["--frame", f"{'x' * 5000}=good.png"], "want INDEX=FILE"),
    (["--frame", f"65537={'x' * 300}"], "65537"),
    (["--image", "x" * 300], "a name of 300 bytes, file systems take 255; choose a shorter one"),
    (["--out", f"{'é' * 150}.mp4"], "a name of 304 bytes, file systems take 255"),
    (["--request", "x" * 300], "a name of 300 bytes"),
    (["--request", "deep.json"], "deep.json: no request can be read from it (it is nested too deeply)"),
    (["--request", "latin.json"], "latin.json: no request can be read from it (it is not UTF-8 text, its byte 14 is"),
    (["--request", "omitted.json"], "the 5 of its request were too large for it"),
    (["--request", "nul.json"], "a\\x00.png: no such image file"),
    (["--steps", str(10**20)], f"num_inference_steps must be from 1 to 10000, got {10**20}"),
    (["--seed", str(2**63)], f"seed must be from 0 to {2**63 - 1}, got {2**63}"),
    (["--seed", str(2**63 - 1), "--count", "2"], "seed must be from 0 to 2^63 - 2"),
    (["--guidance", "1e300"], "guidance_scale must be from -1000.0 to 1000.0, got 1e+300"),
    (["--threads", "100000"], "the number of threads must be a whole number up to 1024"),
    (["--upscale", "100000"], "--upscale"),
    (
        ["--upscale", "2000", "--out", "clip.gif"],
        "4 frames of 8x8, enlarged 2000 times, needs 2.86 GiB of memory, here",
    ),
    (["--device", str(10**400)], "the device is a GPU's index"),
    (["--backend", "x" * 5000], "unknown backend 'xxx"),
    (["--json", "none/a.json"], "none/a.json: cannot be written"),
    (["--json", "clip.mp4"], "clip.mp4: named by both --out and --json"),
]


def png_that_says(width: int, height: int) -> bytes:
    """A PNG of one pixel whose header says that it has more."""
    buffer = io.BytesIO()
    Image.new("1", (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


@pytest.mark.parametrize(("options", "message"), BAD_REQUESTS, ids=[" ".join(each[0]) for each in BAD_REQUESTS])
def test_bad_request(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    """Each is refused with code 2 and one line, before a graph runs, and writes nothing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    (tmp_path / "link.png").symlink_to("good.png")
    (tmp_path / "a.json").write_text('{"prompt": "digit"}')
    (tmp_path / "bomb.png").write_bytes(png_that_says(13_000, 13_000))
    Image.fromarray(np.array([[0, 9]], np.float32)).save(tmp_path / "far.tif")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "unknown.json").write_text('{"prompt": "digit", "sed": 1}')
    (tmp_path / "deep.json").write_text("[" * 50_000)
    (tmp_path / "latin.json").write_bytes('{"prompt": "größer"}'.encode("latin-1"))
    (tmp_path / "omitted.json").write_text('{"request": {"prompt": ""}, "bundle": "", "omitted": 5}')
    (tmp_path / "nul.json").write_text('{"prompt": "", "frames": {"0": "a\\u0000.png"}}')
    latents = {"dtype": "float32", "shape": [1, 1, 1], "data": "AAAAAA=="}
    (tmp_path / "latents.json").write_text(json.dumps({"prompt": "digit", "latents": {"0": latents}}))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(limits, "memory_bytes", lambda: 2**30)
    monkeypatch.chdir(tmp_path)
    code, out, err = run("generate", bundle_path, "--prompt", "digit", "--out", "clip.mp4", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert len(err) <= 500
    assert "Value error" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_request_with_a_byte_order_mark(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"prompt": "digit", "num_inference_steps": 1}')
    assert run("generate", bundle_path, "--request", tmp_path / "a.json", "--out", tmp_path / "a.gif")[0] == 0


def test_neither_prompt_nor_request(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    message = "error: no prompt given; give --prompt, --prompts FILE, or --request with a file that has one\n"
    assert run("generate", bundle_path, "--out", tmp_path / "a.mp4") == (2, "", message)


def test_parse_frames() -> None:
    assert parse_frames(None, []) == {}
    assert parse_frames(Path("a.png"), ["3=b=c.png", "-1=d.png"]) == {
        0: Path("a.png"),
        3: Path("b=c.png"),
        -1: Path("d.png"),
    }
    for bad in ("=a.png", "one=a.png", "1=", "1.5=a.png", "--1=a.png"):
        with pytest.raises(RequestError, match="want INDEX=FILE"):
            parse_frames(None, [bad])


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (["--devices", "0,0"], "--devices 0,0: GPU 0 is named twice; name each once"),
        (["--devices", "gpu0"], "--devices: 'gpu0'; give at most 64 indices of GPUs, or cpu"),
        (["--devices", "cpu,cpu", "--parallel", "dsp3"], "--parallel dsp3 is of 3 devices, --devices names 2"),
        (["--devices", "cpu,cpu", "--parallel", "dsp2"], "its blocks are whole, which devices cannot share; make the"),
        (["--devices", "0,1", "--device", "1"], "--device 1 and --devices 0,1 are both given; give one of them"),
        (
            ["--devices", "0,1", "--backend", "onnxruntime"],
            "--devices 0 is a GPU, --backend onnxruntime runs on the CPU",
        ),
        (
            ["--parallel", "cfg2"],
            "--parallel, --processes and --nccl are for several devices; name them with --devices",
        ),
        (["--devices", "cpu,cpu", "--upsample", "2"], "--upsample makes its clips on one device; leave out --devices"),
    ],
)
def test_devices_that_do_not_go_together(
    run: Run, bundle_path: Path, tmp_path: Path, options: list[str], fault: str
) -> None:
    code, _, error = run("generate", bundle_path, "--prompt", "three", "--out", tmp_path / "a.gif", *options)
    assert code == 2
    assert fault in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_clip_by_two_devices(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gif"
    code, said, _ = run("generate", bundle_path, "--prompt", "three", "--out", out, "--devices", "cpu,cpu")
    assert code == 0
    assert out.is_file()
    assert "generated in" in said
