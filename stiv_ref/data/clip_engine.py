"""The data engine: measures the clips of raw videos once, and decides by thresholds which of them are training data.

Measuring decodes every frame and takes long, so that each video's result is stored as soon as it is there: a run that
was stopped goes on, and other thresholds decide anew within a second. No video is copied or encoded again.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from pydantic import ValidationError

from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.data.captions import ClipKey, known_captions, read_clip_captions
from stiv_deploy.stiv_ref.data.clips import INDEX_NAME, Clip, write_clips, write_whole
from stiv_deploy.stiv_ref.data.decode import frames_of, probe
from stiv_deploy.stiv_ref.data.filters import SHORT_SIDE, Meter, Thresholds
from stiv_deploy.stiv_ref.data.pool import run_jobs
from stiv_deploy.stiv_ref.data.scenes import SceneCutter, SceneSettings
from stiv_deploy.stiv_ref.data.video_files import VideoFiles, find_videos
from stiv_deploy.stiv_ref.errors import CaptionError, ClipsError, VideoError
from stiv_deploy.stiv_ref.files import make_writable, parse_json, read_text
from stiv_deploy.stiv_ref.progress import Progress, unheard

MEASURED_NAME = "measured.jsonl"
REPORT_NAME = "report.json"


class Scene(FrozenConfig):
    """Frames ``start`` to ``end`` (exclusive), and what :class:`Meter` says of them."""

    start: int
    end: int
    motion: float
    sharpness: float


class Measured(FrozenConfig):
    """One video with its scenes, as it was when it had that size in bytes and time of change."""

    file: str
    size: int
    modified_ns: int
    settings: SceneSettings
    width: int
    height: int
    fps: float
    interlaced: bool
    hdr: bool
    scenes: tuple[Scene, ...]

    @property
    def seconds(self) -> float:
        """Duration of the video."""
        return self.scenes[-1].end / self.fps


class Broken(FrozenConfig):
    """A video that was skipped, and why."""

    file: str
    error: str


class Report(FrozenConfig):
    """What ``stiv data cut`` found; durations are in seconds. ``dropped`` counts clips by reason, some have several.

    ``interlaced`` and ``hdr`` count videos, kept or not; ``left_out`` are the files whose names are no videos'.
    """

    source: str
    videos: int
    interlaced: int = 0
    hdr: int = 0
    measured_now: int
    seconds: float
    clips: int
    kept: int
    kept_seconds: float
    captioned: int
    dropped: dict[str, int]
    settings: SceneSettings
    thresholds: Thresholds
    broken: tuple[Broken, ...]
    left_out: tuple[str, ...] = ()


class Job(NamedTuple):
    """A video to measure: its name in results, and where it is."""

    file: str
    path: Path
    settings: SceneSettings

    def __str__(self) -> str:
        return str(self.path)


def measure(job: Job) -> Measured:
    """Decode a video once, find its scenes and measure each; raises :class:`VideoError` if it is broken."""
    info = probe(job.path)
    state = job.path.stat()
    cutter, meter = SceneCutter(job.settings, info.fps), Meter(info.fps)
    for image in frames_of(job.path, SHORT_SIDE):
        cutter.add(image)
        meter.add(image)
    scenes = []
    for start, end in cutter.scenes():
        motion, sharpness = meter.of_scene(start, end)
        scenes.append(Scene(start=start, end=end, motion=round(motion, 3), sharpness=round(sharpness, 2)))
    return Measured(
        file=job.file,
        size=state.st_size,
        modified_ns=state.st_mtime_ns,
        settings=job.settings,
        width=info.width,
        height=info.height,
        fps=info.fps,
        interlaced=info.interlaced,
        hdr=info.hdr,
        scenes=tuple(scenes),
    )


def cut_videos(
    source: Path,
    out: Path,
    *,
    settings: SceneSettings,
    thresholds: Thresholds,
    captions: Path | None = None,
    clip_captions: Path | None = None,
    workers: int = 1,
    progress: Progress = unheard,
) -> Report:
    """Index the clips of all videos under ``source`` in the folder ``out``, with ``workers`` processes.

    Writes ``clips.jsonl`` and ``report.json``, and as it goes ``measured.jsonl``, from which a stopped run goes on.
    Captions come from sidecars or the JSONL file ``captions`` (of videos), and for single clips, before those, from the
    JSONL file ``clip_captions``, where there are any. Broken videos are in the report. Raises :class:`VideoError` if
    there are no videos, :class:`CaptionError` for captions that do not fit, :class:`ClipsError` if ``out`` cannot be
    written.
    """
    import cv2  # noqa: F401 (what is missing is said now, not by every worker)
    import scenedetect  # noqa: F401

    listed = find_videos(source)
    files = listed.videos
    texts = known_captions(source, files, captions)
    clip_texts = read_clip_captions(clip_captions) if clip_captions is not None else {}
    prepare(out)
    measured = {file: kept for file, kept in _measured(out).items() if _is_current(source / file, kept, settings)}
    jobs = [Job(file, source / file, settings) for file in files if file not in measured]
    found, broken = _measure_all(jobs, out / MEASURED_NAME, workers, len(files), progress)
    videos = {file: each for file in files if (each := found.get(file) or measured.get(file))}
    clips = _with_captions(list(_clips(source, out, videos.values(), texts, thresholds)), clip_texts, clip_captions)
    report = _report(source, listed, clips, videos, broken, settings, thresholds, measured_now=len(found))
    write_clips(out / INDEX_NAME, clips)
    write_whole(out / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
    return report


def prepare(out: Path) -> None:
    """Make the folder ``out`` and prove that it can be written; raises :class:`ClipsError`."""
    try:
        make_writable(out)
    except OSError as error:
        raise ClipsError(f"{out}: cannot be written ({error.strerror}); choose another folder") from None


def _measured(out: Path) -> dict[str, Measured]:
    """What was measured before, by file; the last line of a file counts, a torn line not at all."""
    path = out / MEASURED_NAME
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        try:
            each = Measured.model_validate_json(line)
        except ValidationError:
            continue
        found[each.file] = each
    return found


def _is_current(path: Path, measured: Measured, settings: SceneSettings) -> bool:
    try:
        state = path.stat()
    except OSError:
        return False
    now = (state.st_size, state.st_mtime_ns, settings)
    return now == (measured.size, measured.modified_ns, measured.settings)


def _measure_all(
    jobs: Sequence[Job], store: Path, workers: int, total: int, progress: Progress
) -> tuple[dict[str, Measured], tuple[Broken, ...]]:
    """Measure the videos of ``jobs`` and append each to ``store``; those that cannot be, with their errors."""
    found, broken = {}, []
    known = total - len(jobs)
    progress("", known, total)
    for done, (job, result) in enumerate(run_jobs(measure, jobs, workers, expected=VideoError), 1):
        if isinstance(result, VideoError):
            broken.append(Broken(file=job.file, error=str(result)))
        else:
            found[job.file] = result
            _append(store, result.model_dump_json())
        progress(job.file, known + done, total)
    return found, tuple(sorted(broken, key=lambda each: each.file))


def _append(store: Path, line: str) -> None:
    """Add a line at once; also after one that a killed run left without its end."""
    try:
        with store.open("ab", buffering=0) as file:
            file.write(f"\n{line}\n".encode())
    except OSError as error:
        raise ClipsError(f"{store}: cannot be written ({error.strerror}); the same command goes on from here") from None


def _clips(
    source: Path, out: Path, videos: Iterable[Measured], texts: Mapping[str, str], thresholds: Thresholds
) -> Iterator[Clip]:
    """Every scene as a clip, in the order of the videos, with the reasons to drop it."""
    way = Path(os.path.relpath(source.resolve(), out.resolve()))
    for video in videos:
        for scene in video.scenes:
            clip = Clip(
                file=(way / video.file).as_posix(),
                **scene.model_dump(),
                fps=video.fps,
                width=video.width,
                height=video.height,
                interlaced=video.interlaced,
                hdr=video.hdr,
                caption=texts.get(video.file),
            )
            yield clip.model_copy(update={"dropped": thresholds.reasons(clip)})


def _visible(file: str, start: int, end: int) -> ClipKey:
    """The key of a clip, its file as it looks: letters with marks have several spellings."""
    return normalize("NFC", file), start, end


def _with_captions(clips: list[Clip], texts: Mapping[ClipKey, str], source: Path | None) -> list[Clip]:
    """``clips`` with those captions of their own that ``texts`` has; each of these must find its clip."""
    texts = {_visible(*key): text for key, text in texts.items()}
    lost = texts.keys() - {_visible(clip.file, clip.start, clip.end) for clip in clips}
    if lost:
        (file, start, end), more = min(lost), f" and {len(lost) - 1} others" if len(lost) > 1 else ""
        raise CaptionError(f"{source}: no clip is {file!r} {start}-{end}{more}; take the lines of the clips.jsonl here")
    own = (texts.get(_visible(clip.file, clip.start, clip.end)) for clip in clips)
    return [clip.model_copy(update={"caption": text}) if text else clip for clip, text in zip(clips, own, strict=True)]


def _report(
    source: Path,
    listed: VideoFiles,
    clips: Sequence[Clip],
    videos: Mapping[str, Measured],
    broken: tuple[Broken, ...],
    settings: SceneSettings,
    thresholds: Thresholds,
    *,
    measured_now: int,
) -> Report:
    kept = [clip for clip in clips if clip.kept]
    return Report(
        source=str(source),
        videos=len(videos),
        interlaced=sum(video.interlaced for video in videos.values()),
        hdr=sum(video.hdr for video in videos.values()),
        measured_now=measured_now,
        seconds=round(sum(video.seconds for video in videos.values()), 3),
        clips=len(clips),
        kept=len(kept),
        kept_seconds=round(sum(clip.seconds for clip in kept), 3),
        captioned=sum(clip.caption is not None for clip in kept),
        dropped=dict(Counter(reason for clip in clips for reason in clip.dropped).most_common()),
        settings=settings,
        thresholds=thresholds,
        broken=broken,
        left_out=tuple(listed.others),
    )


def read_report(folder: Path) -> Report | None:
    """The report beside an index, if there is one that this version can read."""
    try:
        return Report.model_validate(parse_json(read_text(folder / REPORT_NAME)))
    except ValueError:
        return None
