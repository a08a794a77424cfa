"""``stiv data``: what a user sees, and one line for everything that is wrong."""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime.command import main as main_module
from stiv_deploy.stiv_ref.data import clip_plots
from stiv_deploy.stiv_ref.data.clips import Clip, read_clips
from stiv_deploy.stiv_ref.data.filters import Thresholds

pytest.importorskip("scenedetect", reason="the extra 'data' is not installed")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run ``stiv data`` in this process: exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", "data", *map(str, arguments)])
        code = main_module.main()
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def videos(tmp_path: Path, write_video: Callable[..., Path], moving: Callable[..., np.ndarray]) -> Path:
    """Two scenes in one video, the second of which stands still; one that is broken."""
    still = np.repeat(moving(2, 1), 25, axis=0)
    write_video("videos/two.mp4", np.concatenate([moving(1, 20), still]))
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    return tmp_path / "videos"


def test_a_terminal_shows_how_far_a_cut_is(
    run: Run, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stderr = run("cut", videos, tmp_path / "out", "--no-pictures", "--workers", 1)[2]
    assert "videos" in stderr
    assert "2/2" in stderr


def test_cut_and_show(run: Run, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, stdout, stderr = run("cut", videos, out, "--min-motion", 3, "--workers", 1)
    assert code == 0
    assert stderr == ""
    lines = [
        "1 videos, 2 clips (1.8 s), kept 1 (0.8 s)",
        "dropped 1: too little motion",
        "1 of the kept clips have no caption",
        "1 broken videos skipped:",
        f"  {videos / 'text.mp4'}: cannot be read as a video",
    ]
    assert all(f"{line}" in stdout for line in lines)
    assert f"index {out / 'clips.jsonl'}, report {out / 'report.json'}" in stdout
    assert {file.name for file in out.iterdir()} == {
        "clips.jsonl",
        "clips.png",
        "measured.jsonl",
        "report.json",
        "scores.png",
    }
    assert json.loads((out / "report.json").read_text())["thresholds"]["min_motion"] == 3
    for index in (out, out / "clips.jsonl"):
        code, shown, stderr = run("show", index)
        assert (code, stderr) == (0, "")
        assert shown in stdout


def test_options_reach_the_engine(run: Run, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stiv_deploy.stiv_ref.data import clip_engine

    seen: dict[str, object] = {}
    original = clip_engine.cut_videos

    def spy(source: Path, out: Path, **options: object) -> object:
        seen.update(options)
        return original(source, out, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(clip_engine, "cut_videos", spy)
    (tmp_path / "captions.jsonl").write_text('{"file": "two.mp4", "caption": "tiles"}')
    (tmp_path / "clips.jsonl").touch()
    given = {
        "--detector": "content",
        "--cut-threshold": 20.0,
        "--min-scene": 0.4,
        "--min-seconds": 0.5,
        "--max-seconds": 9.0,
        "--min-side": 16,
        "--max-side": 512,
        "--min-motion": 1.0,
        "--max-motion": 300.0,
        "--min-sharpness": 2.0,
        "--captions": tmp_path / "captions.jsonl",
        "--clip-captions": tmp_path / "clips.jsonl",
        "--workers": 1,
    }
    flat = [item for pair in given.items() for item in pair] + ["--keep-interlaced", "--keep-hdr"]
    assert run("cut", videos, tmp_path / "out", *flat, "--quiet", "--no-pictures")[::2] == (0, "")
    limits = [given[f"--{name}"] for name in ("min-seconds", "max-seconds", "min-side", "max-side")]
    limits += [given[f"--{name}"] for name in ("min-motion", "max-motion", "min-sharpness")]
    assert list(seen["thresholds"].model_dump().values()) == [*limits, True, True]  # type: ignore[attr-defined]
    assert list(seen["settings"].model_dump().values()) == ["content", 20.0, 0.4]  # type: ignore[attr-defined]
    assert (seen["captions"], seen["workers"]) == (tmp_path / "captions.jsonl", 1)
    assert seen["clip_captions"] == tmp_path / "clips.jsonl"
    assert not list((tmp_path / "out").glob("*.png"))


def test_nothing_at_all_still_tells(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    code, stdout, _ = run("cut", tmp_path, tmp_path / "out")
    assert code == 0
    assert "0 videos, 0 clips (0.0 s), kept 0 (0.0 s)" in stdout
    assert "1 broken videos skipped:" in stdout


BAD = [
    (["cut", "nowhere", "out"], "nowhere: no such folder; give a folder of videos"),
    (["cut", "empty", "out"], "empty: no videos in this folder"),
    (["cut", "videos", "file"], "file: cannot be written"),
    (["cut", "videos", "out", "--min-motion", "-1"], "thresholds: min_motion: "),
    (["cut", "videos", "out", "--min-seconds", "3", "--max-seconds", "2"], "nothing would be kept"),
    (["cut", "videos", "out", "--cut-threshold", "0"], "scene cuts: threshold: "),
    (["cut", "videos", "out", "--detector", "magic"], "--detector"),
    (["cut", "videos", "out", "--workers", "0"], "--workers"),
    (["cut", "videos", "out", "--captions", "none.jsonl"], "none.jsonl: cannot read the captions"),
    (["cut", "videos"], "Missing argument 'OUT'"),
    (["show", "nowhere"], "nowhere: cannot read the index of clips"),
    (["show", "empty"], "clips.jsonl: cannot read the index of clips"),
    (["show", "file"], "file, line 1: Invalid JSON"),
    (["sample-clips", "file"], "file: cannot be written"),
    (["nothing"], "No such command 'nothing'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(each[0]) for each in BAD])
def test_bad_input(
    run: Run, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """Each is refused with code 2 and one line, and writes nothing."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.strip().startswith("error: ")
    assert err.strip().count("\n") == 0
    assert message in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("module", ["scenedetect", "cv2"])
def test_missing_library_is_said_before_the_work(
    run: Run, videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)

    class Blocked:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == module:
                raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    monkeypatch.setattr(sys, "meta_path", [Blocked(), *sys.meta_path])
    code, _, err = run("cut", videos, tmp_path / "out", "--quiet", "--no-pictures")
    assert (code, err) == (2, f"error: {module} is not installed; run: pip install 'stiv-deploy[data]'\n")
    assert not (tmp_path / "out").exists()


def test_help_lists_the_commands_of_the_group(run: Run) -> None:
    code, out, _ = run("--help")
    assert code == 0
    assert all(name in out for name in ("cut", "show", "sample-clips"))
    assert run() == (0, out, "")
    assert "Usage: stiv data cut" in run("cut", "--help")[1]


def clip(number: int, folder: Path, dropped: tuple[str, ...]) -> Clip:
    file = Path(os.path.relpath(folder / "two.mp4", folder.parent)).as_posix()
    scores = {"motion": 0.0 if number % 3 == 0 else 2.0**number, "sharpness": 10.0 * number, "dropped": dropped}
    return Clip.model_validate({"file": file, "start": 0, "end": 20, "fps": 25, "width": 64, "height": 48} | scores)


def test_sheet_frames_the_kept_green_and_the_dropped_red(videos: Path, tmp_path: Path) -> None:
    clips = [clip(0, videos, ()), clip(1, videos, ("too blurred",)), clip(2, videos, ())]
    gone = clips[2].model_copy(update={"file": "videos/gone.mp4"})
    out = tmp_path / "sheet.png"
    clip_plots.clip_sheet(tmp_path, [*clips[:2], gone], out)
    pixels = np.asarray(Image.open(out))
    y = 20 + clip_plots.TEXT - 2
    colours = [tuple(pixels[y, x * (clip_plots.TILE[0] + 8) + 50].tolist()) for x in range(3)]
    green, red = (tuple(bytes.fromhex(each[1:])) for each in (clip_plots.KEPT, clip_plots.DROPPED))
    assert colours == [green, red, green]
    assert len(np.unique(pixels[y + 40 : y + 80, 20:200])) > 10  # a picture
    assert np.unique(pixels[y + 40 : y + 80, 436:600]).tolist() == [128]  # that cannot be read


def test_sheet_of_very_many_clips_shows_some(videos: Path, tmp_path: Path) -> None:
    one = clip(1, videos, ())
    clip_plots.clip_sheet(tmp_path, [one] * 500, tmp_path / "sheet.png")
    rows = clip_plots.SHOWN // clip_plots.COLUMNS
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.height == rows * (clip_plots.TILE[1] + clip_plots.TEXT + 8) + 20


@pytest.mark.parametrize("count", [1, 2, 30])
def test_scores_of_any_kind_are_drawn(videos: Path, tmp_path: Path, count: int) -> None:
    """Zeros, one clip, all dropped: a picture each time."""
    clips = [clip(number, videos, ("too blurred",) if number % 2 else ()) for number in range(count)]
    clip_plots.plot_scores(clips, Thresholds(min_motion=1, min_sharpness=0), tmp_path / "scores.png")
    with Image.open(tmp_path / "scores.png") as picture:
        assert picture.size == (1200, 320)


def test_sample_clips_are_data(run: Run, real_clips: dict[str, Path], tmp_path: Path) -> None:
    """From the wheel to an index with captions."""
    code, stdout, _ = run("sample-clips", tmp_path / "real")
    assert code == 0
    names = ["bigbuckbunny.mp4", "bikes.mp4", "carphone_distorted.mp4", "carphone_pristine.mp4"]
    assert stdout.split() == [str(tmp_path / "real" / name) for name in names]
    for name in names[:2]:  # the large ones take seconds
        (tmp_path / "real" / name).unlink()
    out = tmp_path / "out"
    assert run("cut", tmp_path / "real", out, "--min-sharpness", 500, "--quiet", "--workers", 1)[0] == 0
    distorted, pristine = read_clips(out)
    assert (distorted.dropped, pristine.kept) == (("too blurred",), True)
    assert "red bow tie" in (pristine.caption or "")
