"""Which files of a folder are videos, by their names, and which are not."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from stiv_deploy.stiv_ref.errors import VideoError

SUFFIXES = frozenset(
    (
        ".3g2",
        ".3gp",
        ".asf",
        ".avi",
        ".f4v",
        ".flv",
        ".gif",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".mxf",
        ".ogm",
        ".ogv",
        ".ts",
        ".vob",
        ".webm",
        ".wmv",
    )
)
COMPANIONS = frozenset((".txt", ".json", ".jsonl"))
"""Suffixes of captions and facts, which nobody takes for videos."""
NAMED = 3  # files of a suffix that a message names; the others are counted


@dataclass(frozen=True)
class VideoFiles:
    """Paths relative to a folder with '/', sorted: ``videos`` by their suffix, and ``others``, without companions."""

    videos: Sequence[str]
    others: Sequence[str]

    def left_out(self) -> dict[str, str]:
        """What is said of ``others``, by suffix."""
        groups = groupby(sorted(self.others, key=_suffix), _suffix)
        return {f"*{suffix}": _counted(list(names)) for suffix, names in groups}


def find_videos(folder: Path) -> VideoFiles:
    """All files under ``folder`` and under folders linked there; names with a leading dot are left out.

    A folder that is met twice, by a link, counts once, under its own path if that is inside. Raises
    :class:`VideoError` if there is no such folder or no video in it.
    """
    if not folder.is_dir():
        raise VideoError(f"{folder}: no such folder; give a folder of videos")
    names = sorted(path.relative_to(folder).as_posix() for path in _files(folder))
    videos = [name for name in names if _suffix(name) in SUFFIXES]
    found = VideoFiles(videos, [name for name in names if _suffix(name) not in SUFFIXES | COMPANIONS])
    if not videos:
        there = "".join(f"; {name}: {reason}" for name, reason in list(found.left_out().items())[:NAMED])
        raise VideoError(f"{folder}: no videos in this folder; wanted are {', '.join(sorted(SUFFIXES))}{there}")
    return found


def list_videos(folder: Path) -> list[str]:
    """The videos of :func:`find_videos`."""
    return list(find_videos(folder).videos)


def _suffix(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


def _counted(names: Sequence[str]) -> str:
    first = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{len(names)} left out, as no video is called so ({first})"


def _files(top: Path) -> Iterator[Path]:
    """All files under ``top``, those of linked folders last; a folder that cannot be read is given as a file."""
    seen: set[tuple[int, int]] = set()
    own, linked = deque([top]), deque[Path]()
    while own or linked:
        place = own.popleft() if own else linked.popleft()
        try:
            state = place.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue
            entries = [entry for entry in place.iterdir() if not entry.name.startswith(".")]
            kinds = [entry.is_dir() for entry in entries]
        except OSError:
            yield place
            continue
        seen.add((state.st_dev, state.st_ino))
        yield from (entry for entry, folder in zip(entries, kinds, strict=True) if not folder)
        for entry in (entry for entry, folder in zip(entries, kinds, strict=True) if folder):
            (linked if entry.is_symlink() else own).append(entry)
