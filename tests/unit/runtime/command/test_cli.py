"""``stiv generate``: what it writes and tells, and how it stops."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import GenerationRequest, StivPipeline
from stiv_deploy.runtime.pipeline.grid import grid_sides
from stiv_deploy.runtime.pipeline.media import SIDES

Run = Callable[..., tuple[int, str, str]]


def test_generate_writes_a_clip(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.webp"
    arguments = ("generate", bundle_path, "--prompt", "digit three", "--seed", 7, "--out", out, "--upscale", 3)
    code, stdout, stderr = run(*arguments)
    assert (code, stderr) == (0, "")
    assert f"{out}: 4 frames of 8x8, seed 7\n" in stdout
    with Image.open(out) as image:
        assert (image.n_frames, image.size) == (4, (24, 24))
    first = out.read_bytes()
    assert run(*arguments)[0] == 0
    assert out.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["clip.webp"]


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [("a.gif", (), 256), ("a.webp", (), 256), ("a.gif", ("--upscale", 1), 8), ("frames", (), 8)],
)
def test_small_clips_are_made_visible_where_they_are_watched(
    run: Run, bundle_path: Path, tmp_path: Path, name: str, options: tuple[object, ...], side: int
) -> None:
    out = tmp_path / name
    code, _, err = run("generate", bundle_path, "--prompt", "digit", "--steps", 1, "--out", out, *options)
    assert (code, err) == (0, "")
    with Image.open(out / "frame_000.png" if out.is_dir() else out) as image:
        assert image.size == (side, side)


def test_a_grid_is_one_file_that_makes_all_its_clips_again(
    run: Run, bundle_path: Path, tmp_path: Path, planned: list[GenerationRequest]
) -> None:
    out, report = tmp_path / "all.webp", tmp_path / "all.json"
    prompts = ("--prompt", "digit three", "--prompt", "digit four", "--seed", 4)
    common = ("--steps", 1, "--grid", "--out")
    code, stdout, err = run("generate", bundle_path, *prompts, "--count", 2, *common, out, "--json", report)
    assert (code, err) == (0, "")
    assert stdout.count(f"{out}: 4 frames of 8x8, seed ") == 4
    assert {path.name for path in tmp_path.iterdir()} == {"all.webp", "all.json"}
    with Image.open(out) as image:
        assert (image.n_frames, image.size[::-1]) == (4, grid_sides(4, 256, 256))
    for source in (out, report):
        assert run("generate", bundle_path, "--request", source, *common, tmp_path / "again.webp")[0] == 0
        assert [(each.prompt, each.seed) for each in planned] == [
            ("digit three", 4),
            ("digit three", 5),
            ("digit four", 6),
            ("digit four", 7),
        ]
        assert (tmp_path / "again.webp").read_bytes() == out.read_bytes()


def test_a_grid_has_one_frame_rate(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StivPipeline, "run", lambda *_: pytest.fail("something was computed"))
    (tmp_path / "two.json").write_text('[{"prompt": "a", "fps": 8}, {"prompt": "b", "fps": 12}]')
    code, out, err = run(
        "generate", bundle_path, "--request", tmp_path / "two.json", "--grid", "--out", tmp_path / "a.mp4"
    )
    assert (code, out, err) == (2, "", "error: the videos have different frame rates, 8 and 12; give all the same\n")


def test_json_alone_prints_the_report(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    code, stdout, _ = run("generate", bundle_path, "--prompt", "digit", "--out", tmp_path / "a.gif", "--json")
    assert code == 0
    report = json.loads(stdout)
    assert report["clips"][0]["file"] == str(tmp_path / "a.gif")
    assert report["timings"]["total"] > 0


def test_json_of_inspect_and_doctor_alone_or_to_a_file(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    for command in (("inspect", bundle_path), ("doctor",)):
        printed = run(*command, "--json")
        assert printed[0] == 0
        assert json.loads(printed[1])
        code, out, _ = run(*command, "--json", tmp_path / "a.json")
        assert code == 0
        assert set(json.loads((tmp_path / "a.json").read_text())) == set(json.loads(printed[1]))
        assert not out.startswith("{")
        assert run(*command, "--json", tmp_path / "none" / "a.json")[0] == 2


def test_frame_rate_is_written(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    command = ("generate", bundle_path, "--prompt", "digit", "--fps", 12.5, "--out", tmp_path / "a.mp4")
    assert run(*command)[0] == 0
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12.5


def test_generate_several_prompts(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(
        "generate", bundle_path, "--prompt", "digit", "--prompt", "three", "--seed", 5, "--out", tmp_path / "a"
    )
    assert code == 0
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a-0", "a-1"]
    assert "seed 5\n" in stdout
    assert "seed 6\n" in stdout
    assert run("generate", bundle_path, "--prompt", "three", "--seed", 6, "--out", tmp_path / "b")[0] == 0
    for index in range(4):  # the second of two is what it would be alone
        name = f"frame_{index:03d}.png"
        alone, batched = (np.asarray(Image.open(tmp_path / folder / name)) for folder in ("b", "a-1"))
        assert np.array_equal(alone, batched)


def test_generate_scales_an_image_when_asked(run: Run, bundle_path: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    arguments = (
        "generate",
        bundle_path,
        "--prompt",
        "x",
        "--image",
        tmp_path / "large.png",
        "--out",
        tmp_path / "a.gif",
    )
    assert run(*arguments)[0] == 2
    for fit in (("--resize",), ("--fit", "stretch"), ("--resize", "--fit", "stretch"), ("--fit", "pad")):
        assert run(*arguments, *fit)[0] == 0


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "onnx/head.onnx", "new.json"])
def test_a_report_goes_into_no_bundle(run: Run, own_bundle: Path, tmp_path: Path, name: str) -> None:
    report = ("--json", own_bundle / name)
    for command in (("inspect", own_bundle), ("generate", own_bundle, "--prompt", "a", "--out", tmp_path / "a.png")):
        code, _, err = run(*command, *report)
        assert (code, err.count("\n")) == (2, 1)
        assert "which holds its own files only" in err or "manifest.json, which is read" in err
    assert run("inspect", own_bundle)[0] == 0


@contextmanager
def disk_full() -> Iterator[None]:
    """No file may be longer than 16 bytes: to a program the same as a disk without room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("name", ["a.mp4", "a.gif", "a.webp", "a.png", "frames"])
def test_a_full_disk_is_one_line(run: Run, bundle_path: Path, tmp_path: Path, name: str) -> None:
    with disk_full():
        code, out, err = run("generate", bundle_path, "--prompt", "digit", "--out", tmp_path / name)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"error: {tmp_path / name}: " in err
    assert "File too large" in err
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_unicode(run: Run, bundle_path: Path, own_bundle: Path, tmp_path: Path) -> None:
    folder = own_bundle.rename(tmp_path / os.fsdecode(b"bundle-\xff"))
    code, out, _ = run("inspect", folder)
    assert code == 0
    assert r"bundle-\udcff" in out.replace("\n", "")  # a terminal breaks lines at a dash
    code, out, _ = run("inspect", folder, "--json")
    assert json.loads(out)["path"] == str(folder)
    code, out, err = run(
        "generate", folder, "--prompt", "digit", "--steps", 1, "--out", folder / os.fsdecode(b"\xfe.gif")
    )
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert r"bundle-\udcff: ONNX Runtime reads no file below a name that is not Unicode; rename it" in err
    clip = tmp_path / os.fsdecode(b"\xfe.gif")
    code, out, err = run("generate", bundle_path, "--prompt", "digit", "--steps", 1, "--out", clip)
    assert (code, err) == (0, "")
    assert r"\udcfe.gif: 4 frames" in out
    code, out, err = run("generate", folder / "none", "--prompt", "digit", "--out", tmp_path / "a.gif")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert r"bundle-\udcff/none: no such folder" in err


def test_frames_too_large_for_their_format_are_refused_before_the_work(
    run: Run, bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIDES, ".mp4", 100)
    monkeypatch.setattr(StivPipeline, "run", lambda *_: pytest.fail("something was computed"))
    code, out, err = run("generate", bundle_path, "--prompt", "a", "--upscale", 16, "--out", tmp_path / "a.mp4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a.mp4: frames would be 128x128 pixels, and .mp4 takes 100 a side; enlarge less" in err


@pytest.mark.parametrize("damage", ["missing", "no manifest", "bad manifest", "no graph", "corrupt graph"])
def test_bad_bundle(run: Run, own_bundle: Path, tmp_path: Path, damage: str) -> None:
    folder = own_bundle
    graph = own_bundle / "onnx" / "head.onnx"
    match damage:
        case "missing":
            folder = tmp_path / "nowhere"
        case "no manifest":
            (own_bundle / "manifest.json").unlink()
        case "bad manifest":
            (own_bundle / "manifest.json").write_text('{"format": ')
        case "no graph":
            graph.unlink()
        case "corrupt graph":
            graph.write_bytes(bytes(reversed(graph.read_bytes())))
    code, out, err = run("generate", folder, "--prompt", "digit", "--out", tmp_path / "clip.mp4")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert not (tmp_path / "clip.mp4").exists()


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_between_steps(bundle_path: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, or a polite kill, in a real process: code 130, no traceback, no file."""
    command = [
        sys.executable,
        "-m",
        "stiv_deploy.runtime.command.main",
        "generate",
        str(bundle_path),
        "--prompt",
        "digit",
    ]
    command += ["--steps", "10000", "--solver", "heun", "--out", str(tmp_path / "clip.mp4")]
    # made to believe in a terminal, the progress bar tells when the steps have begun
    environment = os.environ | {"FORCE_COLOR": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    seen = b""
    deadline = time.monotonic() + 60
    while b"/10000" not in seen and time.monotonic() < deadline and process.poll() is None:
        seen += os.read(process.stderr.fileno(), 4096)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in seen + err
    assert err.rstrip().endswith(b"interrupted")
    assert out == b""
    assert list(tmp_path.iterdir()) == []
