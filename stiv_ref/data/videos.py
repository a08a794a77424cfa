"""Training clips cut from videos: sampling stride, start, resize and crop, micro-conditions; and folders of videos."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.buckets import Size, draw_crop, fit, micro_conditions, nearest_bucket
from stiv_deploy.stiv_ref.data.captions import known_captions, read_captions
from stiv_deploy.stiv_ref.data.clips import read_clips
from stiv_deploy.stiv_ref.data.decode import VideoInfo, probe, read_frames
from stiv_deploy.stiv_ref.data.loader import DamagedSampleError, Sample
from stiv_deploy.stiv_ref.data.video_files import find_videos
from stiv_deploy.stiv_ref.errors import CaptionError, DataError, VideoError
from stiv_deploy.stiv_ref.files import is_file, same_name
from stiv_deploy.stiv_ref.recipe import VideoData

SCANNERS = 4  # threads that look into videos when a folder is opened: they wait for the disk


@contextmanager
def naming_nothing(path: Path) -> Iterator[None]:
    """Take the name of ``path`` off :class:`VideoError` from inside: lists of broken videos name them themselves."""
    try:
        yield
    except VideoError as error:
        raise VideoError(str(error).removeprefix(f"{path}: ")) from None


@dataclass(frozen=True, kw_only=True)
class VideoClip(ABC):
    """A video, or ``frames`` frames of it from frame ``first`` on, wherever its bytes are.

    ``name`` is what messages and lists call it, ``caption`` what it shows, ``size`` its height and width, upright.
    """

    name: str
    caption: str
    size: Size
    frames: int
    first: int = 0

    @abstractmethod
    def read(self, start: int, count: int, stride: int) -> NDArray[np.uint8]:
        """Frames uint8 [count, H, W, 3]; raises :class:`VideoError` if they cannot be decoded."""


@dataclass(frozen=True, kw_only=True)
class FileClip(VideoClip):
    """A clip of a video file."""

    path: Path

    def read(self, start: int, count: int, stride: int) -> NDArray[np.uint8]:
        """As :class:`VideoClip` says."""
        with naming_nothing(self.path):
            return read_frames(self.path, self.first + start, count, stride)


@dataclass(frozen=True)
class Listing:
    """Videos found: those that can be read, faults of the others by name, and the captions of all.

    ``left_out`` are whole videos that are no training data as they are, by name; ``others`` are files that are no
    videos, by suffix.
    """

    title: str
    clips: Sequence[VideoClip]
    broken: dict[str, str]
    captions: Sequence[str]
    left_out: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All videos found."""
        return len(self.clips) + len(self.broken) + len(self.left_out)


@dataclass(frozen=True)
class Unfit:
    """A video that is ``broken``, or else left out, and why."""

    name: str
    reason: str
    broken: bool = False


def unfit_for_training(info: VideoInfo) -> str:
    """Why a video is left out unless an index keeps it; empty if it is not."""
    if info.interlaced:
        return "is interlaced; deinterlace it, or index it with: stiv data cut --keep-interlaced"
    return "is HDR; convert it to SDR, or index it with: stiv data cut --keep-hdr" if info.hdr else ""


def clip_suffix(start: int, end: int) -> str:
    """What the name of a clip has after the name of its video."""
    return f"[{start}:{end}]"


def span(frames: int, stride: int) -> int:
    """How many frames of a video ``frames`` frames at ``stride`` take."""
    return (frames - 1) * stride + 1


class VideoDataset:
    """Clips of ``frames`` frames drawn from videos, a :class:`~stiv_deploy.stiv_ref.data.loader.ClipDataset` of pixels.

    Each sample draws a stride among the ``strides`` that the video is long enough for, then a start and a crop. Single
    frames have stride 1. Every video belongs to the bucket of ``sizes`` that is nearest.
    """

    def __init__(self, listing: Listing, *, sizes: Sequence[Size], frames: int, strides: Sequence[int] = (1,)) -> None:
        self.listing, self.sizes, self.frames = listing, tuple(sizes), frames
        self.strides = tuple(sorted(set(strides))) if frames > 1 else (1,)
        self.title, self.total = listing.title, listing.total
        self.captions, self.broken = listing.captions, listing.broken
        self.left_out = listing.left_out | listing.others
        self.groups: list[list[int]] = [[] for _ in self.sizes]
        for number, clip in enumerate(listing.clips):
            least = span(frames, self.strides[0])
            if clip.frames < least:
                self.left_out[clip.name] = f"has {clip.frames} frames; {self._wanted()} take {least}"
            else:
                self.groups[nearest_bucket(clip.size, self.sizes)].append(number)

    def load(self, group: int, number: int, generator: torch.Generator) -> Sample:
        """As :class:`~stiv_deploy.stiv_ref.data.loader.ClipDataset` says: video fp32 [F, 3, H, W] in [-1, 1]."""
        clip, bucket = self.listing.clips[number], self.sizes[group]
        possible = [stride for stride in self.strides if span(self.frames, stride) <= clip.frames]
        stride = possible[_integer(len(possible), generator)]
        start = _integer(clip.frames - span(self.frames, stride) + 1, generator)
        crop = draw_crop(clip.size, bucket, generator)
        try:
            pixels = clip.read(start, self.frames, stride)
        except VideoError as error:
            raise DamagedSampleError(clip.name, str(error)) from None
        if pixels.shape[1:3] != clip.size:
            found, listed = ("x".join(map(str, size)) for size in (pixels.shape[1:3], clip.size))
            raise DamagedSampleError(
                clip.name, f"its frames are {found} pixels, it is listed with {listed}; list it anew"
            )
        return Sample(
            name=clip.name,
            caption=clip.caption,
            video=fit(pixels, bucket, crop),
            micro=micro_conditions(clip.size, crop, stride, self.frames),
        )

    def stills(self) -> "VideoDataset":
        """As :class:`~stiv_deploy.stiv_ref.data.loader.ClipDataset` says: in the first of the sizes."""
        return VideoDataset(self.listing, sizes=self.sizes[:1], frames=1)

    def _wanted(self) -> str:
        return f"{self.frames} frames at stride {self.strides[0]}"


def list_videos_of(data: VideoData) -> Listing:
    """The videos of ``data``: a folder, all of whose videos are looked into, or an index of clips (``clips.jsonl``).

    Raises :class:`VideoError` if the folder is missing or has no videos, :class:`CaptionError` if captions are missing,
    :class:`~stiv_deploy.stiv_ref.errors.ClipsError` if the index is not valid.
    """
    return _listed_clips(data) if data.path.is_file() else _listed_folder(data)


def _listed_folder(data: VideoData) -> Listing:
    files = find_videos(data.path)
    captions = read_captions(data.path, data.captions, files.videos)
    with ThreadPoolExecutor(SCANNERS) as pool:
        found = list(pool.map(lambda item: _look(data.path, *item), captions.items()))
    clips = [each for each in found if isinstance(each, FileClip)]
    unfit = [each for each in found if isinstance(each, Unfit)]
    broken, left_out = ({each.name: each.reason for each in unfit if each.broken is kind} for kind in (True, False))
    return Listing(str(data.path), clips, broken, list(captions.values()), left_out, files.left_out())


def _look(folder: Path, name: str, caption: str) -> FileClip | Unfit:
    """The clip, or what is wrong with it."""
    path = folder / name
    try:
        state = path.stat()
        with naming_nothing(path):
            info = _facts(path, state.st_size, state.st_mtime_ns)
    except VideoError as error:
        return Unfit(name, str(error), broken=True)
    except OSError as error:
        return Unfit(name, f"cannot be read ({error.strerror})", broken=True)
    if reason := unfit_for_training(info):
        return Unfit(name, reason)
    return FileClip(path=path, name=name, caption=caption, size=(info.height, info.width), frames=info.frames)


@lru_cache(maxsize=1_000_000)
def _facts(path: Path, _size: int, _modified: int) -> VideoInfo:
    """Looked for once, however many stages have the same videos."""
    return probe(path)


def _listed_clips(data: VideoData) -> Listing:
    """The clips that an index keeps. It has their sizes and frames, so the videos are not looked into."""
    entries, folder = read_clips(data.path, kept_only=True), data.path.parent
    if not entries:
        raise DataError(f"{data.path}: keeps no clips; make it again with weaker filters")
    given = {} if data.captions is None else known_captions(folder, {each.file for each in entries}, data.captions)
    captions = [given.get(each.file, each.caption) for each in entries]
    missing = [each.file for each, caption in zip(entries, captions, strict=True) if not caption]
    if missing:
        raise CaptionError(
            f"{data.path}: {len(missing)} of {len(entries)} clips have no caption (first: {missing[0]}); write "
            "captions beside the videos and cut them again, or give a JSONL file of captions"
        )
    paths = {file: same_name(folder / file) for file in {each.file for each in entries}}
    there = {file: is_file(path) for file, path in paths.items()}
    broken = {file: "no such file" for file, found in there.items() if not found}
    clips = [
        FileClip(
            path=paths[each.file],
            name=each.file + clip_suffix(each.start, each.end),
            caption=caption,
            size=(each.height, each.width),
            frames=each.frames,
            first=each.start,
        )
        for each, caption in zip(entries, captions, strict=True)
        if caption and there[each.file]
    ]
    return Listing(str(data.path), clips, broken, [caption for caption in captions if caption])


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
