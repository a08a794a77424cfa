"""WebDataset shards of videos with captions: packing them, and reading them as training data.

A sample is ``key.mp4`` (or another container), its caption ``key.txt``, and ``key.json`` with the facts that spare the
reader a look into the video. In shards of others captions may be in the json, and facts are found by looking.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

from stiv_deploy.stiv_ref.bounds import Count, Frame, Size
from stiv_deploy.stiv_ref.data.decode import probe, read_frames
from stiv_deploy.stiv_ref.data.tars import Member, Record, read_shard, write_shard
from stiv_deploy.stiv_ref.data.video_files import SUFFIXES
from stiv_deploy.stiv_ref.data.videos import (
    SCANNERS,
    FileClip,
    Listing,
    Unfit,
    VideoClip,
    clip_suffix,
    naming_nothing,
    unfit_for_training,
)
from stiv_deploy.stiv_ref.errors import CaptionError, DataError, VideoError
from stiv_deploy.stiv_ref.files import parse_json, replaced_folder
from stiv_deploy.stiv_ref.progress import Progress, unheard


class VideoFacts(BaseModel):
    """``key.json`` of a packed video: its name before, upright size in pixels, and which frames are training data.

    Those are the first ``frames``, or the ``clips`` [start, end). Keys of others are ignored.
    """

    name: str
    width: Size
    height: Size
    frames: Count
    clips: tuple[tuple[Frame, Frame], ...] = Field(default=(), max_length=10**6)


@dataclass(frozen=True, kw_only=True)
class ShardClip(VideoClip):
    """A clip of a video in a shard."""

    video: Member
    suffix: str

    def read(self, start: int, count: int, stride: int) -> NDArray[np.uint8]:
        """As :class:`VideoClip` says."""
        with unpacked(self.video, self.suffix) as path:
            return read_frames(path, self.first + start, count, stride)


@contextmanager
def unpacked(video: Member, suffix: str) -> Iterator[Path]:
    """A video of a shard as a temporary file; raises :class:`VideoError` if the shard cannot be read."""
    with tempfile.NamedTemporaryFile(prefix="stiv-", suffix=suffix) as file:
        try:
            file.write(video.read())
        except DataError as error:
            raise VideoError(str(error)) from None
        file.flush()
        with naming_nothing(Path(file.name)):
            yield Path(file.name)


def list_video_shards(pattern: str, shards: Sequence[Path]) -> Listing:
    """The videos of all ``shards``; ``pattern`` is what messages call them.

    Raises :class:`DataError` if there are none, :class:`CaptionError` if one has no caption.
    """
    records, broken = _video_records(pattern, shards)
    captions = [_caption(record) for record in records]
    missing = [record.name for record, caption in zip(records, captions, strict=True) if not caption]
    if missing:
        raise CaptionError(
            f"{pattern}: {len(missing)} of {len(records)} videos have no caption (first: {missing[0]}); a caption is a "
            ".txt of the same key, or 'caption' in its .json"
        )
    with ThreadPoolExecutor(SCANNERS) as pool:
        looked = list(pool.map(_look, records, captions))
    clips: list[ShardClip] = []
    left_out: dict[str, str] = {}
    for record, each in zip(records, looked, strict=True):
        if isinstance(each, Unfit):
            (broken if each.broken else left_out)[record.name] = each.reason
        else:
            clips += each
    return Listing(pattern, clips, broken, captions, left_out)


def _video_records(pattern: str, shards: Sequence[Path]) -> tuple[list[Record], dict[str, str]]:
    """All samples with a video, and faults of shards by name; :class:`DataError` if there is no such sample."""
    records, broken, latents = [], {}, False
    for path in shards:
        found, fault = read_shard(path)
        records += [record for record in found if _video_of(record)]
        latents |= any("safetensors" in record.members for record in found)
        if fault:
            broken[path.name] = fault
    if latents and not records:
        raise DataError(f"{pattern}: these are shards of latents, not of videos, or their shards.json is missing")
    if not records:
        raise DataError(f"{pattern}: no videos in these shards{_why(broken)}")
    return records, broken


def _why(broken: dict[str, str]) -> str:
    return "".join(f"; {name} {fault}" for name, fault in broken.items())


def _video_of(record: Record) -> str | None:
    """The extension of the record's video."""
    return next((each for each in record.members if Path(f"x.{each}").suffix in SUFFIXES), None)


def _json_of(record: Record) -> dict[str, Any]:
    """What the record's json holds; nothing if that is no JSON object."""
    if "json" not in record.members:
        return {}
    try:
        values = parse_json(record.members["json"].read())
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _caption(record: Record) -> str:
    if "txt" in record.members:
        text: object = record.members["txt"].read().decode("utf-8-sig", errors="replace")
    else:
        text = _json_of(record).get("caption")
    return " ".join(text.split()) if isinstance(text, str) else ""


def _look(record: Record, caption: str) -> list[ShardClip] | Unfit:
    """The clips of a record, or what is wrong with its video."""
    extension = _video_of(record)
    assert extension is not None
    video, suffix = record.members[extension], Path(f"x.{extension}").suffix
    try:
        facts = VideoFacts.model_validate(_json_of(record))
    except ValidationError:
        try:
            with unpacked(video, suffix) as path:
                info = probe(path)
        except VideoError as error:
            return Unfit(record.name, str(error), broken=True)
        if reason := unfit_for_training(info):
            return Unfit(record.name, reason)
        facts = VideoFacts(name=record.name, width=info.width, height=info.height, frames=info.frames)
    whole = ShardClip(
        video=video,
        suffix=suffix,
        name=facts.name,
        caption=caption,
        size=(facts.height, facts.width),
        frames=facts.frames,
    )
    return [
        replace(whole, name=facts.name + clip_suffix(start, end), frames=end - start, first=start)
        for start, end in facts.clips
    ] or [whole]


def pack_videos(listing: Listing, out: Path, per_shard: int, progress: Progress = unheard) -> int:
    """Write the videos of ``listing`` (files) to shards of ``per_shard`` in the new folder ``out``; returns how many.

    A video with several clips is packed once, with all of them. :class:`DataError` if ``out`` holds something, or if
    nothing in ``listing`` can be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; give a new folder, or remove it")
    clips = sorted((clip for clip in listing.clips if isinstance(clip, FileClip)), key=_origin)
    videos = [list(group) for _, group in groupby(clips, _origin)]
    if not videos:
        raise DataError(f"{listing.title}: no video of it can be read{_why(listing.broken)}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(out) as folder:
        for number, at in enumerate(range(0, len(videos), per_shard)):
            shard = folder / f"videos-{number:06d}.tar"
            write_shard(shard, map(_packed, videos[at : at + per_shard]))
            progress(shard.name, min(at + per_shard, len(videos)), len(videos))
    return len(videos)


def _origin(clip: FileClip) -> tuple[str, str]:
    return str(clip.path), clip.caption


def _packed(clips: Sequence[FileClip]) -> dict[str, bytes]:
    """The sample of one video with its clips."""
    first = clips[0]
    spans = tuple((clip.first, clip.first + clip.frames) for clip in clips)
    name = first.name.removesuffix(clip_suffix(*spans[0]))
    facts = VideoFacts(
        name=name,
        width=first.size[1],
        height=first.size[0],
        frames=max(end for _, end in spans),
        clips=() if name == first.name else spans,
    )
    return {
        first.path.suffix.lower().removeprefix("."): first.path.read_bytes(),
        "txt": first.caption.encode(),
        "json": facts.model_dump_json().encode(),
    }
