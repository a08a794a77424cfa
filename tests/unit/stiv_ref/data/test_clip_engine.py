"""The data engine: right clips, measured once, resumed, and never stopped by a broken video."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data import clip_engine
from stiv_deploy.stiv_ref.data.clip_engine import Job, Report, cut_videos, measure, read_report
from stiv_deploy.stiv_ref.data.clip_tables import lines_of
from stiv_deploy.stiv_ref.data.clips import Clip, read_clips, write_clips
from stiv_deploy.stiv_ref.data.decode import read_frames
from stiv_deploy.stiv_ref.data.filters import Thresholds
from stiv_deploy.stiv_ref.data.scenes import SceneSettings
from stiv_deploy.stiv_ref.errors import CaptionError, ClipsError, VideoError

pytest.importorskip("scenedetect", reason="the extra 'data' is not installed")

WriteVideo = Callable[..., Path]
Moving = Callable[..., np.ndarray]


@pytest.fixture
def source(tmp_path: Path, write_video: WriteVideo, moving: Moving) -> Path:
    """Videos: two scenes of which one stands still; one scene; a truncated one, a text file, and a folder in it."""
    still = np.repeat(moving(2, 1), 25, axis=0)
    write_video("videos/two.mp4", np.concatenate([moving(1, 20), still]))
    write_video("videos/deep/one.mkv", moving(3, 30, height=64, width=96), fps=10)
    broken = write_video("videos/torn.mp4", moving(4, 30))
    broken.write_bytes(broken.read_bytes()[:-500])
    (tmp_path / "videos" / "text.mp4").write_text("no video")
    (tmp_path / "videos" / "two.txt").write_text("tiles that move, then others that do not")
    return tmp_path / "videos"


def run(source: Path, out: Path, settings: SceneSettings | None = None, **options: Any) -> Report:
    limits = {name: options.pop(name) for name in list(options) if name.startswith(("min_", "max_"))}
    return cut_videos(source, out, settings=settings or SceneSettings(), thresholds=Thresholds(**limits), **options)


def test_clips_of_a_folder(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out", min_motion=5.0)
    one, first, second = read_clips(tmp_path / "out")
    assert (one.file, one.start, one.end, one.width, one.height) == ("../videos/deep/one.mkv", 0, 30, 96, 64)
    assert (one.fps, one.caption, one.kept) == (pytest.approx(10), None, True)
    assert [(each.file, each.start, each.end) for each in (first, second)] == [
        ("../videos/two.mp4", 0, 20),
        ("../videos/two.mp4", 20, 45),
    ]
    assert first.caption == second.caption == "tiles that move, then others that do not"
    assert (first.kept, second.kept, second.dropped, second.motion) == (True, False, ("too little motion",), 0)
    assert first.motion == pytest.approx(100 * 25 / 48, rel=0.15)  # a pixel a frame, of 48
    assert read_frames(tmp_path / "out" / second.file, second.start, 1).shape == (1, 48, 64, 3)
    assert (report.videos, report.clips, report.kept, report.captioned) == (2, 3, 2, 1)
    assert (report.seconds, report.kept_seconds) == (pytest.approx(4.8), pytest.approx(3.8))
    assert report.dropped == {"too little motion": 1}
    assert read_report(tmp_path / "out") == report


def test_broken_videos_are_listed_and_never_fatal(source: Path, tmp_path: Path) -> None:
    report = run(source, tmp_path / "out")
    assert [each.file for each in report.broken] == ["text.mp4", "torn.mp4"]
    assert all(each.error.startswith(str(source / each.file)) for each in report.broken)
    assert run(source, tmp_path / "out").broken == report.broken  # tried again


def test_interlaced_and_hdr_videos_are_marked_and_dropped(
    tmp_path: Path, write_video: WriteVideo, moving: Moving
) -> None:
    combed = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x264-params": "tff=1"}}
    source = write_video("videos/a.mp4", moving(1, 20), **combed).parent
    write_video("videos/b.mp4", moving(2, 20), transfer=16)
    write_video("videos/c.mp4", moving(3, 20))
    (source / "notes.rtf").touch()
    report = run(source, tmp_path / "out")
    clips = read_clips(tmp_path / "out")
    assert [(clip.interlaced, clip.hdr, clip.dropped) for clip in clips] == [
        (True, False, ("interlaced",)),
        (False, True, ("HDR",)),
        (False, False, ()),
    ]
    assert (report.interlaced, report.hdr, report.dropped) == (1, 1, {"interlaced": 1, "HDR": 1})
    assert report.left_out == ("notes.rtf",)
    lines = list(lines_of(clips, report))
    for line in (
        "1 videos are interlaced",
        "1 videos are HDR",
        "*.rtf: 1 left out, as no video is called so (notes.rtf)",
    ):
        assert line in lines
    kept = cut_videos(
        source,
        tmp_path / "out",
        settings=SceneSettings(),
        thresholds=Thresholds(keep_interlaced=True, keep_hdr=True),
    )
    assert (kept.measured_now, kept.kept) == (0, 3)


def test_only_broken_videos(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    report = run(tmp_path, tmp_path / "out")
    assert (report.videos, report.clips, len(report.broken)) == (0, 0, 1)
    assert read_clips(tmp_path / "out") == []


def test_nothing_is_measured_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run(source, out).measured_now == 2
    seen: list[str] = []

    def spy(job: Job) -> Any:
        seen.append(job.file)
        return measure(job)

    monkeypatch.setattr(clip_engine, "measure", spy)
    before = (out / "clips.jsonl").read_text()
    assert run(source, out).measured_now == 0
    assert (out / "clips.jsonl").read_text() == before
    assert run(source, out, min_seconds=99).kept == 0  # other thresholds only decide
    assert seen == ["text.mp4", "torn.mp4"] * 2  # the broken ones, which may have been mended
    seen.clear()
    os.utime(source / "two.mp4", (1, 1))
    assert run(source, out).measured_now == 1
    assert "two.mp4" in seen
    assert run(source, out, SceneSettings(min_seconds=0.1)).measured_now == 2  # other cuts


def test_a_video_that_went_away_leaves_the_index(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "out")
    (source / "two.mp4").unlink()
    assert run(source, tmp_path / "out").videos == 1
    assert {Path(clip.file).name for clip in read_clips(tmp_path / "out")} == {"one.mkv"}


def test_a_stopped_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the second video, and a line that a kill left torn: the first is kept, the rest is done."""

    def stop(job: Job) -> Any:
        if job.file == "two.mp4":
            raise KeyboardInterrupt
        return measure(job)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(clip_engine, "measure", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    assert not (out / "clips.jsonl").exists()
    with (out / "measured.jsonl").open("a") as file:
        file.write('{"file": "two.mp4", "si')
    assert run(source, out).measured_now == 1
    assert run(source, out).measured_now == 0
    run(source, tmp_path / "fresh")
    assert (out / "clips.jsonl").read_text() == (tmp_path / "fresh" / "clips.jsonl").read_text()


def test_several_workers_find_the_same(source: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    alone = run(source, tmp_path / "alone", progress=lambda *each: told.append(each))
    assert [each[1:] for each in told] == [(done, 4) for done in range(5)]
    assert run(source, tmp_path / "two", workers=2) == alone
    assert (tmp_path / "alone/clips.jsonl").read_text() == (tmp_path / "two/clips.jsonl").read_text()


def test_index_moves_with_its_videos(source: Path, tmp_path: Path) -> None:
    run(source, source / "index")
    shutil.move(source, tmp_path / "elsewhere")
    clip = read_clips(tmp_path / "elsewhere" / "index")[0]
    assert (tmp_path / "elsewhere" / "index" / clip.file).is_file()


def test_captions_by_jsonl(source: Path, tmp_path: Path) -> None:
    lines = tmp_path / "captions.jsonl"
    lines.write_text('{"file": "deep/one.mkv", "caption": "one"}\n')
    run(source, tmp_path / "out", captions=lines)
    assert [clip.caption for clip in read_clips(tmp_path / "out")] == ["one", None, None]
    lines.write_text("{")
    with pytest.raises(CaptionError, match="line 1: is not JSON"):
        run(source, tmp_path / "other", captions=lines)
    assert not (tmp_path / "other").exists()


def test_captions_of_single_clips(source: Path, tmp_path: Path) -> None:
    """The scenes of a video differ: a captioner fills in the lines of the index, and they come before the video's."""
    out, lines = tmp_path / "out", tmp_path / "clips.jsonl"
    run(source, out)
    entries = [json.loads(line) for line in (out / "clips.jsonl").read_text().splitlines()]
    lines.write_text(json.dumps(entries[2] | {"caption": "tiles that stand still"}))
    assert run(source, out, clip_captions=lines).captioned == 2
    assert [clip.caption for clip in read_clips(out)] == [None, entries[1]["caption"], "tiles that stand still"]
    before = (out / "clips.jsonl").read_text()
    lines.write_text("\n".join(json.dumps(each | {"caption": "x", "end": 7}) for each in entries))
    with pytest.raises(CaptionError, match=r"no clip is '\.\./videos/deep/one\.mkv' 0-7 and 2 others; take the lines"):
        run(source, out, clip_captions=lines)
    assert (out / "clips.jsonl").read_text() == before


def test_bad_folders(source: Path, tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ClipsError, match=r"text\.mp4: cannot be written \(.*\); choose another folder"):
        run(source, source / "text.mp4")
    with pytest.raises(ClipsError, match="cannot be written"):
        run(source, source / "text.mp4" / "out")


LINE = '{"file":"a.mp4","start":0,"end":5,"fps":25,"width":8,"height":8,"motion":0,"sharpness":1}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Invalid JSON"),
        ("[]", "line 2: "),
        (LINE.replace('"end":5', '"end":0'), "line 2: end 0 must be greater than start 0"),
        (LINE.replace('"fps":25', '"fps":0'), "line 2: fps: "),
        (LINE.replace('"file":"a.mp4",', ""), "line 2: file: Field required"),
    ],
)
def test_bad_index(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "clips.jsonl").write_text(f"{LINE}\n{line}\n")
    with pytest.raises(ClipsError) as caught:
        read_clips(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'clips.jsonl'}, {message}")
    assert "\n" not in str(caught.value)


def test_index_round_trip(tmp_path: Path) -> None:
    clips = [Clip.model_validate_json(LINE), Clip.model_validate(json.loads(LINE) | {"dropped": ["x"], "caption": "ä"})]
    write_clips(tmp_path / "clips.jsonl", clips)
    assert read_clips(tmp_path / "clips.jsonl") == read_clips(tmp_path) == clips
    assert read_clips(tmp_path, kept_only=True) == clips[:1]
    assert [file.name for file in tmp_path.iterdir()] == ["clips.jsonl"]
    (tmp_path / "clips.jsonl").write_text(LINE.replace("}", ', "beauty": 3}'))  # another tool's score
    assert read_clips(tmp_path) == clips[:1]
    with pytest.raises(ClipsError, match="cannot read the index of clips .*'stiv data cut' makes one"):
        read_clips(tmp_path / "other.jsonl")


def _ends(group: int) -> bool:
    """Whether all processes of a group are gone, now or within ten seconds."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_worker(
    write_video: WriteVideo, moving: Moving, tmp_path: Path, number: signal.Signals
) -> None:
    """Ctrl-C reaches every process of the terminal, a polite kill only the first; both end all, with code 130."""
    one = write_video("videos/0.mp4", moving(1, 100))
    for name in range(1, 2000):
        one.with_name(f"{name}.mp4").hardlink_to(one)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "stiv_deploy.runtime.command.main",
        "data",
        "cut",
        one.parent,
        out,
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (out / "measured.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    if number is signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.rstrip().endswith(f"stopped; the same command goes on from {out / 'measured.jsonl'}\ninterrupted")
    assert not (out / "clips.jsonl").exists()
    assert _ends(process.pid)
    lines = (out / "measured.jsonl").read_text().split("\n")
    assert all(json.loads(line)["scenes"] for line in lines if line)


def test_an_index_with_a_byte_order_mark_is_read_and_one_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    clip = Clip(file="a.mp4", start=0, end=9, fps=25, width=16, height=16, motion=1, sharpness=1)
    index = tmp_path / "clips.jsonl"
    index.write_bytes(f"\ufeff{clip.model_dump_json()}\n".encode())
    assert read_clips(index) == [clip]
    index.write_bytes(b"\xff\xfe{")
    with pytest.raises(ClipsError, match=r"clips\.jsonl: cannot read the index .* not UTF-8 text, its byte 0 is 0xff"):
        read_clips(index)
