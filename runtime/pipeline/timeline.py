"""Latents of a long video on disk: finished chunks in files, so that memory does not grow, and a killed run goes on."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.files import make_folder, read_json, replaced_file, write_text
from stiv_deploy.runtime.pipeline.recent import Recent

WHAT = "chunks.json"
LOCK = "chunks.lock"
KEPT_FILES = 4
"""Files of chunks that stay in memory."""


@dataclass(frozen=True)
class Piece:
    """A file of latents fp32 [N, C, h, w]: those of ``positions``, ascending."""

    file: str
    positions: tuple[int, ...]


class Timeline:
    """Latent frames by position: in ``pieces``, and those that ``known`` says, by theirs in an earlier timeline.

    A piece that is not there is yet to be made. What is read and written is fp32 [C, h, w] a frame.
    """

    def __init__(
        self,
        folder: Path,
        pieces: Sequence[Piece],
        before: "Timeline | None" = None,
        known: Mapping[int, int] | None = None,
    ) -> None:
        self._folder, self.pieces = folder, list(pieces)
        self._before, self._known = before, dict(known or {})
        self._places = {position: (piece, row) for piece in self.pieces for row, position in enumerate(piece.positions)}
        self._open: Recent[np.ndarray] = Recent(KEPT_FILES)

    def __len__(self) -> int:
        return len(self._places) + len(self._known)

    def owner(self, position: int) -> str:
        """What the frame at ``position`` is from: a file of this timeline, or, of all that were known, one word."""
        return "known" if position in self._known else self._places[position][0].file

    def path(self, piece: Piece) -> Path:
        """Where ``piece`` is, or will be."""
        return self._folder / piece.file

    def has(self, piece: Piece) -> bool:
        """Whether ``piece`` is finished; a file that was not is refused by :meth:`read`."""
        return self.path(piece).is_file()

    def keep(self, piece: Piece, latents: np.ndarray) -> None:
        """Write ``latents`` fp32 [N, C, h, w], whole or not at all."""
        remedy = "make room; what is finished is kept"
        with replaced_file(self.path(piece), remedy) as temporary, temporary.open("wb") as file:
            np.save(file, latents)

    def read(self, position: int) -> np.ndarray:
        """The frame at ``position``."""
        if position in self._known:
            assert self._before is not None
            return self._before.read(self._known[position])
        piece, row = self._places[position]
        found: np.ndarray = self._open.get(piece.file, lambda: self._load(piece))[row]
        return found

    def window(self, positions: Iterable[int]) -> np.ndarray:
        """The frames at ``positions``, fp32 [N, C, h, w]."""
        return np.stack([self.read(position) for position in positions])

    def windows(self, frames: int) -> Iterator[np.ndarray]:
        """All of it, at most ``frames`` at a time."""
        for start in range(0, len(self), frames):
            yield self.window(range(start, min(start + frames, len(self))))

    def _load(self, piece: Piece) -> np.ndarray:
        path = self.path(piece)
        try:
            latents = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise RequestError(f"{path}: cannot be read as a finished chunk; remove it to make it again") from None
        if latents.dtype != np.float32 or latents.ndim != 4 or len(latents) != len(piece.positions):
            raise RequestError(f"{path}: is no finished chunk of this video; remove it to make it again")
        array: np.ndarray = latents
        return array


def open_folder(folder: Path, what: Mapping[str, Any]) -> None:
    """Make ``folder`` for the chunks of the video that ``what`` describes, or go on in it.

    Raises :class:`RequestError` if it holds those of another video, or something else.
    """
    made = folder / WHAT
    if made.is_file():
        if _read(made) != json.loads(json.dumps(what)):
            raise RequestError(f"{folder}: holds finished chunks of another video; remove it, or choose another")
        return
    if folder.is_dir() and any(each.name != LOCK for each in folder.iterdir()):
        raise RequestError(f"{folder}: is not empty, and holds no chunks of a video; choose another folder")
    make_folder(folder)
    write_text(made, json.dumps(what, indent=2) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have ``folder``, which is made, for this run alone; :class:`RequestError` if another makes a video there."""
    make_folder(folder)
    try:
        lock = FileLock(folder / LOCK).acquire(blocking=False)
    except Timeout:
        raise RequestError(
            f"{folder}: another run makes a video there; wait for its end, stop it, or choose another folder"
        ) from None
    with lock:
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)  # while it is held: one that is gone is taken by nobody


def begun_seed(folder: Path, seed: int | None) -> int | None:
    """The seed of the video whose chunks ``folder`` holds; ``seed`` if it holds none."""
    what = _read(folder / WHAT)
    template = what.get("template") if isinstance(what, dict) else None
    found = template.get("seed") if isinstance(template, dict) else None
    return found if isinstance(found, int) else seed


def _read(path: Path) -> Any:
    try:
        return read_json(path)
    except (OSError, ValueError):
        return None
