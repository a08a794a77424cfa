"""Captions of a folder of videos: a text file beside each video, or one JSON line for each."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from unicodedata import normalize

from stiv_deploy.stiv_ref.data.video_files import list_videos
from stiv_deploy.stiv_ref.errors import CaptionError
from stiv_deploy.stiv_ref.files import INDEX_LIMIT, parse_json, read_text, same_name

LINE = '{"file": "clip.mp4", "caption": "..."}'
CLIP_LINE = '{"file": "../videos/clip.mp4", "start": 0, "end": 48, "caption": "..."}'
NAMED = 3  # missing ones that an error names; the others are counted

ClipKey = tuple[str, int, int]
"""File relative to the index of clips, first frame, end (exclusive)."""


def read_captions(folder: Path, jsonl: Path | None = None, videos: Sequence[str] | None = None) -> dict[str, str]:
    """Caption of every video under ``folder``, by its path relative to that ('/' between folders), sorted.

    ``videos`` are such paths, those that :func:`~stiv_deploy.stiv_ref.data.video_files.list_videos` finds if left out.

    From the sidecar ``clip.txt`` beside ``clip.mp4``; or, with ``jsonl``, from lines of
    ``{"file": "clip.mp4", "caption": "..."}``, whose other keys are ignored. White space is collapsed. Raises
    :class:`CaptionError` for a video without caption, an empty caption, a line that is not valid or names no video of
    the folder; :class:`~stiv_deploy.stiv_ref.errors.VideoError` for a folder without videos.
    """
    videos = list_videos(folder) if videos is None else videos
    captions = known_captions(folder, videos, jsonl)
    missing = [video for video in videos if video not in captions]
    if missing:
        raise CaptionError(_lacking(folder, missing, len(videos), jsonl))
    return captions


def known_captions(folder: Path, videos: Iterable[str], jsonl: Path | None = None) -> dict[str, str]:
    """As :func:`read_captions`, for ``videos`` (paths relative to ``folder``); those without caption are left out."""
    if jsonl is not None:
        listed = _read_lines(folder, jsonl, set(videos))
        return dict(sorted(listed.items()))
    sidecars = ((video, same_name((folder / video).with_suffix(".txt"))) for video in videos)
    return {video: _read_sidecar(path) for video, path in sidecars if path.is_file()}


def _lacking(folder: Path, missing: list[str], videos: int, jsonl: Path | None) -> str:
    names = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
    sidecar = PurePosixPath(missing[0]).with_suffix(".txt")
    line = json.dumps({"file": missing[0], "caption": "..."})
    remedy = f"write {folder / sidecar}" if jsonl is None else f"add {line} to {jsonl}"
    return f"{folder}: {len(missing)} of {videos} videos have no caption ({names}); {remedy}, or move the video away"


def _text(path: Path) -> str:
    try:
        return read_text(path, INDEX_LIMIT)
    except ValueError as error:
        raise CaptionError(f"{path}: cannot read the captions ({error}); give a UTF-8 text file") from None


def _read_sidecar(path: Path) -> str:
    caption = " ".join(_text(path).split())
    if not caption:
        raise CaptionError(f"{path}: the caption is empty; write what the video shows")
    return caption


def read_clip_captions(jsonl: Path) -> dict[ClipKey, str]:
    """Captions of single clips of an index, by file, start and end as those are in it.

    From lines of ``{"file": "../videos/a.mp4", "start": 0, "end": 48, "caption": "..."}``, whose other keys are
    ignored: the lines of ``clips.jsonl`` with captions filled in are such. A caption may be null, which says nothing.
    Raises :class:`CaptionError`.
    """
    captions: dict[ClipKey, str] = {}
    for entry, where in _entries(jsonl, CLIP_LINE):
        if entry.get("caption", "") is None:
            continue
        file, caption = _file_and_caption(entry, where, CLIP_LINE)
        start, end = entry.get("start"), entry.get("end")
        if type(start) is not int or type(end) is not int:
            raise CaptionError(f"{where}: start and end are {start!r} and {end!r}; want {CLIP_LINE}")
        if (file, start, end) in captions:
            raise CaptionError(f"{where}: {file!r} {start}-{end} has a caption already; remove one of the lines")
        captions[file, start, end] = caption
    return captions


def _read_lines(folder: Path, jsonl: Path, videos: set[str]) -> dict[str, str]:
    captions: dict[str, str] = {}
    visible = {normalize("NFC", video): video for video in videos}
    for entry, where in _entries(jsonl, LINE):
        file, caption = _file_and_caption(entry, where, LINE)
        file = file if file in videos else visible.get(normalize("NFC", file), file)
        if file not in videos:
            raise CaptionError(f"{where}: there is no video {file!r} in {folder}; correct or remove the line")
        if file in captions:
            raise CaptionError(f"{where}: {file!r} has a caption already; remove one of the lines")
        captions[file] = caption
    return captions


def _entries(jsonl: Path, wanted: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The JSON object of every line that is not blank, and where it is."""
    for number, line in enumerate(_text(jsonl).split("\n"), 1):  # not splitlines: JSON may hold what that cuts at
        if not line.strip():
            continue
        where = f"{jsonl}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise CaptionError(f"{where}: is not JSON ({error}); want {wanted}") from None
        if not isinstance(entry, dict):
            raise CaptionError(f"{where}: got {line.strip()[:80]}; want {wanted}")
        yield entry, where


def _file_and_caption(entry: dict[str, Any], where: str, wanted: str) -> tuple[str, str]:
    file, caption = entry.get("file"), entry.get("caption")
    if not isinstance(file, str) or not isinstance(caption, str):
        raise CaptionError(f"{where}: got {json.dumps(entry)[:80]}; want {wanted}")
    if not caption.strip():
        raise CaptionError(f"{where}: the caption of {file!r} is empty; write what the video shows")
    return PurePosixPath(file).as_posix(), " ".join(caption.split())
