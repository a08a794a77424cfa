"""Video decoding by PyAV: facts of a file, any frames of it by number, and all of them in a stream.

Frame numbers are exact for every container and for variable frame rates: they count the packets' presentation times,
which takes one pass over the file without decoding. That pass also finds files that end too early. What an edit list
cuts off is not shown, and not counted.
"""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.errors import VideoError

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

SEEK_GAIN = 16  # frames that a seek must save to be worth it: it drops what the decoder holds
# The containers with an index. In MPEG streams a seek is a guess, and what is decoded after it can be another frame.
SEEKABLE = frozenset(("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi"))
HDR_TRANSFERS = (16, 18)  # PQ and HLG, as ITU-T H.273 numbers them
SHORTFALL = 0.1  # share of the stated duration that may be missing: containers round it, and count the other streams

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a video: upright size in pixels, frames (counted, not estimated), mean frames per second, seconds.

    ``interlaced`` and ``hdr`` (PQ or HLG) are marks of its first frame; frames are read as they are stored.
    """

    path: Path
    width: int
    height: int
    frames: int
    fps: float
    seconds: float
    interlaced: bool = False
    hdr: bool = False


class Turn(NamedTuple):
    """From stored to upright pixels: whether rows become columns; then the steps through both, -1 for backwards."""

    transposed: bool = False
    down: int = 1
    across: int = 1


@dataclass(frozen=True)
class _Index:
    """Presentation times of all frames, int64 [F] ascending, and of the K key frames, with where to seek for those.

    A key frame that is not shown, for an edit list cuts it off, is one too: others are decoded from it.
    """

    path: Path
    times: NDArray[np.int64]
    keys: NDArray[np.int64]
    seeks: NDArray[np.int64]
    turn: Turn = Turn()


def probe(path: Path) -> VideoInfo:
    """Facts of the video ``path``; raises :class:`VideoError` if it is damaged or no video.

    Reads the whole file once, decodes its first frame, and remembers the answer until the file changes.
    """
    return _look_into(path)[0]


def read_frames(path: Path, start: int, count: int, stride: int = 1) -> Pixels:
    """Frames start, start + stride, ... of ``path`` as RGB, uint8 [count, H, W, 3], upright.

    Seeks to the key frame before them in MP4, MOV, Matroska, WebM and AVI; decodes from the beginning in other files.
    Raises :class:`VideoError` if the video has not that many frames or they cannot be decoded.
    """
    info, index = _look_into(path)
    last = start + (count - 1) * stride
    if start < 0 or count < 1 or stride < 1 or last >= info.frames:
        asked = f"{count} frames from {start} in steps of {stride}"
        raise VideoError(f"{path}: has {info.frames} frames, asked for {asked}")
    wanted = np.arange(start, last + 1, stride, dtype=np.int64)
    out = np.empty((count, info.height, info.width, 3), np.uint8)
    with _opened(path) as (container, stream):
        at = 0
        for run in _runs(index, wanted):
            for image in _decode_run(container, stream, index, run):
                _check_size(path, image, out[at])
                out[at] = image
                at += 1
    return out


def key_frames(path: Path) -> NDArray[np.int64]:
    """Numbers int64 [K] of the frames that are cheap to read alone, ascending; raises :class:`VideoError`."""
    index = _look_into(path)[1]
    numbers = np.unique(index.times.searchsorted(index.keys))
    return numbers[numbers < len(index.times)]


def frames_of(path: Path, short_side: int | None = None) -> Iterator[Pixels]:
    """All frames of ``path`` in order as RGB, uint8 [H, W, 3] each, upright, one in memory at a time.

    ``short_side`` shrinks larger frames so that their shorter side has that many pixels. Raises :class:`VideoError`,
    possibly after some frames, if one of them cannot be decoded or has another size.
    """
    index = _look_into(path)[1]
    with _opened(path) as (container, stream):
        first = None
        for frame in _exactly(index, container.decode(stream), np.arange(len(index.times))):
            image = _picture(frame, index.turn, short_side)
            first = image if first is None else first
            _check_size(path, image, first)
            yield image


@contextmanager
def _opened(path: Path) -> Iterator[tuple["InputContainer", "VideoStream"]]:
    """The container and its video stream; whatever PyAV raises inside becomes a :class:`VideoError`."""
    import av
    from av.stream import Disposition

    try:
        # Only local files: what calls itself .mp4 may be a playlist that points anywhere.
        source, options = f"file:{path}", {"protocol_whitelist": "file"}
        with av.open(source, options=options, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream) or Disposition.attached_pic in stream.disposition:
                raise VideoError(f"{path}: has no video stream; give a video file")  # a song's cover is none
            if stream.codec_context is None:
                raise VideoError(f"{path}: no decoder for its video; re-encode it, for example with H.264")
            stream.codec_context.thread_count = 1  # many videos at a time, in processes, is what scales
            yield container, stream
    except VideoError:
        raise
    except (av.FFmpegError, OSError, ValueError, EOFError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: cannot be read as a video ({reason}); it is damaged or no video") from None


def _look_into(path: Path) -> tuple[VideoInfo, _Index]:
    try:
        state = path.stat()
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror})") from None
    if not path.is_file():
        raise VideoError(f"{path}: is not a file; give a video file")
    return _looked_into(os.fspath(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=512)
def _looked_into(name: str, size: int, _modified: int) -> tuple[VideoInfo, _Index]:
    """Facts and index of a file in the state given by its size in bytes and its time of change."""
    from av.video.reformatter import VideoReformatter

    path = Path(name)
    if size == 0:
        raise VideoError(f"{path}: the file is empty; give a video file")
    with _opened(path) as (container, stream):
        times, keys, seeks = _scan(path, container, stream)
        fps = _frame_rate(stream, times)
        _check_whole(path, container, stream, times, fps)
    index = _Index(path, times, keys, seeks)
    with _opened(path) as (container, stream):
        first = next(_exactly(index, container.decode(stream), np.zeros(1, np.int64)))
        VideoReformatter().reformat(first, format="rgb24")  # fails now, if it does
        index = replace(index, turn=_turn_of(first))
        upright = (first.height, first.width) if index.turn.transposed else (first.width, first.height)
        marks = first.interlaced_frame, stream.codec_context.color_trc in HDR_TRANSFERS
    return VideoInfo(path, *upright, len(times), fps, len(times) / fps, *marks), index


def _scan(path: Path, container: "InputContainer", stream: "VideoStream") -> tuple[NDArray[np.int64], ...]:
    """Presentation times of the frames, those of the key frames, and their decoding times, without decoding."""
    times: list[int] = []
    keys: list[int] = []
    seeks: list[int] = []
    for packet in container.demux(stream):
        if not packet.size or not (keys or packet.is_keyframe):
            continue
        if packet.is_corrupt:
            raise VideoError(f"{path}: frame {len(times)} is incomplete: the file is truncated; copy it again")
        if packet.pts is None:
            raise VideoError(f"{path}: has frames without a time; run: ffmpeg -fflags +genpts -i IN -c copy OUT.mkv")
        if not packet.is_discard:
            times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
            seeks.append(packet.pts if packet.dts is None else min(packet.pts, packet.dts))
    if not (keys and times):
        raise VideoError(f"{path}: has no frames; it is truncated or empty")
    # Frames shown before the first key frame refer to what is not there.
    found = np.unique(np.array(times, np.int64))
    entries = (
        1 if any(after < before for before, after in pairwise(keys)) else len(keys)
    )  # parts of an edit list overlap
    return found[found >= keys[0]], np.array(keys[:entries], np.int64), np.array(seeks[:entries], np.int64)


def _frame_rate(stream: "VideoStream", times: NDArray[np.int64]) -> float:
    """Mean frames per second; what the file states if it has a single frame."""
    if len(times) > 1 and stream.time_base is not None:
        return float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))
    return float(stream.average_rate or stream.base_rate or 1)


def _check_whole(
    path: Path, container: "InputContainer", stream: "VideoStream", times: NDArray[np.int64], fps: float
) -> None:
    """Raise :class:`VideoError` if the frames end well before the duration that the file states."""
    if stream.duration is not None and stream.time_base is not None:
        stated = float(stream.duration * stream.time_base)
    elif container.duration is not None and len(container.streams) == 1:
        stated = container.duration / 1_000_000
    else:
        return
    there = len(times) / fps
    if there < stated * (1 - SHORTFALL) - 2 / fps:
        raise VideoError(f"{path}: states {stated:.2f} s and ends after {there:.2f} s: it is truncated; copy it again")


def _exactly(index: _Index, frames: Iterator["VideoFrame"], numbers: NDArray[np.int64]) -> Iterator["VideoFrame"]:
    """Those of ``frames`` that have the ascending ``numbers``; :class:`VideoError` if one is missing or damaged."""
    times, at = index.times[numbers], 0
    for frame in frames:
        if frame.pts is not None and frame.pts < times[at]:
            continue
        if frame.pts != times[at] or frame.is_corrupt:
            break
        yield frame
        at += 1
        if at == len(times):
            return
    raise VideoError(f"{index.path}: frame {numbers[at]} cannot be decoded: the file is damaged; copy it again")


def _runs(index: _Index, wanted: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Frame numbers ``wanted``, cut where a seek to the next key frame saves decoding what nobody asked for."""
    key_of = index.times.searchsorted(index.keys)[index.keys.searchsorted(index.times[wanted], side="right") - 1]
    cuts = [at + 1 for at, (here, _) in enumerate(pairwise(wanted)) if key_of[at + 1] - here > SEEK_GAIN]
    return np.split(wanted, cuts)


def _decode_run(
    container: "InputContainer", stream: "VideoStream", index: _Index, run: NDArray[np.int64]
) -> Iterator[Pixels]:
    """The frames with the ascending numbers ``run``, decoded from the key frame before the first."""
    key = index.keys.searchsorted(index.times[run[0]], side="right") - 1
    if key and container.format.name in SEEKABLE:
        container.seek(int(index.seeks[key]), stream=stream)
        frames = container.decode(stream)
        first, shown = next(frames, None), index.times[index.times.searchsorted(index.keys[key])]
        if first is not None and first.pts is not None and first.pts <= shown:
            yield from (_picture(frame, index.turn) for frame in _exactly(index, chain([first], frames), run))
            return
    with _opened(index.path) as (again, beginning):  # no index in the container, or one that leads elsewhere
        yield from (_picture(frame, index.turn) for frame in _exactly(index, again.decode(beginning), run))


def _picture(frame: "VideoFrame", turn: Turn, short_side: int | None = None) -> Pixels:
    """RGB pixels, uint8 [H, W, 3], turned as the file says, shrunk to ``short_side`` if larger."""
    size: dict[str, Any] = {}
    if short_side is not None and min(frame.width, frame.height) > short_side:
        ratio = short_side / min(frame.width, frame.height)
        size = {"width": round(frame.width * ratio), "height": round(frame.height * ratio), "interpolation": "AREA"}
    image: Pixels = np.asarray(frame.to_ndarray(format="rgb24", **size), np.uint8)
    return _turned(image, turn)


def _turn_of(frame: "VideoFrame") -> Turn:
    """How the display matrix of its file turns and mirrors ``frame``, to the nearest quarter.

    A pixel at (x, y) goes to (a x + c y, b x + d y), where the matrix begins with a, b, -, c, d (ISO/IEC 14496-12).
    Only for a frame that is not converted: with its side data it waits for the garbage collector, and that must not
    meet the threads of a conversion in a forked loader worker.
    """
    from av.sidedata.sidedata import Type

    sides: Any = frame.side_data  # typed as a mapping of names; iterating gives the values
    matrix = next((bytes(each) for each in sides if each.type == Type.DISPLAYMATRIX), None)
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else struct.unpack_from("=5i", matrix)
    lies = abs(a) + abs(d) < abs(b) + abs(c)
    across, down = (c, b) if lies else (a, d)
    return Turn(lies, -1 if down < 0 else 1, -1 if across < 0 else 1)


def _turned(image: Pixels, turn: Turn) -> Pixels:
    upright: Pixels = image.swapaxes(0, 1) if turn.transposed else image
    return np.ascontiguousarray(upright[:: turn.down, :: turn.across])


def _check_size(path: Path, image: Pixels, expected: Pixels) -> None:
    if image.shape != expected.shape:
        sizes = f"{expected.shape[1]}x{expected.shape[0]} to {image.shape[1]}x{image.shape[0]}"
        raise VideoError(f"{path}: its frames change from {sizes}; cut it into files of one size")
