"""The index of clips, ``clips.jsonl``: which frames of which videos are training data, and which are not and why."""

from collections.abc import Iterable
from pathlib import Path

from pydantic import ConfigDict, Field, ValidationError, model_validator

from stiv_deploy.stiv_ref.bounds import Frame, Measure, Size
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.errors import ClipsError
from stiv_deploy.stiv_ref.files import INDEX_LIMIT, read_text, write_text

INDEX_NAME = "clips.jsonl"


class Clip(FrozenConfig):
    """Frames ``start`` to ``end`` (exclusive) of a video, without a cut inside.

    ``file`` is relative to the folder of the index, with '/'. Width and height are in pixels, upright. ``motion`` is
    the mean optical flow in percent of the shorter side per second, ``sharpness`` the variance of the Laplacian (see
    ``filters.py``). ``interlaced`` and ``hdr`` are marks of the video. ``caption`` is that of the video, if it has one.
    ``dropped`` says why a clip is not kept.
    """

    model_config = ConfigDict(extra="ignore")  # other tools add scores of theirs

    file: str
    start: Frame
    end: Frame
    fps: float = Field(gt=0, le=1e6)
    width: Size
    height: Size
    motion: Measure
    sharpness: Measure
    interlaced: bool = False
    hdr: bool = False
    caption: str | None = None
    dropped: tuple[str, ...] = Field(default=(), max_length=100)

    @model_validator(mode="after")
    def _check(self) -> "Clip":
        if self.end <= self.start:
            raise ValueError(f"end {self.end} must be greater than start {self.start}")
        return self

    @property
    def kept(self) -> bool:
        """Whether it is training data."""
        return not self.dropped

    @property
    def frames(self) -> int:
        """Number of frames."""
        return self.end - self.start

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.frames / self.fps


def index_path(path: Path) -> Path:
    """The index itself, given as a file or as the folder that it is in."""
    return path / INDEX_NAME if path.is_dir() else path


def read_clips(path: Path, *, kept_only: bool = False) -> list[Clip]:
    """Clips of the index ``path`` (a file, or its folder) in order; raises :class:`ClipsError` naming a bad line."""
    index = index_path(path)
    try:
        lines = read_text(index, INDEX_LIMIT).split("\n")
    except ValueError as error:
        raise ClipsError(f"{index}: cannot read the index of clips ({error}); 'stiv data cut' makes one") from None
    clips = [_parse(line, f"{index}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    return [clip for clip in clips if clip.kept or not kept_only]


def _parse(line: str, where: str) -> Clip:
    try:
        return Clip.model_validate_json(line)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in fault["loc"])
        reason = fault["msg"].removeprefix("Value error, ")
        raise ClipsError(f"{where}: {name + ': ' if name else ''}{reason}; make the index again") from None


def write_clips(path: Path, clips: Iterable[Clip]) -> None:
    """Write the index file ``path``, whole or not at all."""
    write_whole(path, "".join(clip.model_dump_json() + "\n" for clip in clips))


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises :class:`ClipsError` if it cannot be written."""
    try:
        write_text(path, text)
    except OSError as error:
        raise ClipsError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None
