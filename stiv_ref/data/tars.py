"""Shards in the WebDataset format: tar files in which ``key.mp4``, ``key.txt`` and ``key.json`` are one sample.

Written by the webdataset library. It reads them as a stream only; training wants any sample at any time, so that its
order is a function of the step: here they are indexed once with tarfile, by offset. (The library's former random
access, wids, is no part of it any more and unpickles what it reads.)
"""

import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.files import replaced_file

BLOCK = 512
EXTRA = "writing shards needs the webdataset library, which is not installed; run: pip install 'stiv-deploy[data]'"


@dataclass(frozen=True)
class Member:
    """A file in a shard: where its bytes are."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes; :class:`DataError` if the shard cannot be read."""
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                found = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.shard}: cannot be read ({error.strerror})") from None
        if len(found) != self.size:
            raise DataError(f"{self.shard}: is shorter than when it was opened")
        return found


@dataclass(frozen=True)
class Record:
    """One sample of a shard: its files by extension, in lower case, without the first dot."""

    shard: Path
    key: str
    members: dict[str, Member]

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"{self.shard.name}/{self.key}"


def shard_paths(pattern: str) -> list[Path]:
    """Shards named by a file, a folder, or a pattern with ``*``; sorted. :class:`DataError` if there are none."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    folder, names = (path, "*.tar") if path.is_dir() else (Path(path.anchor), str(path.relative_to(path.anchor)))
    paths = sorted(each for each in folder.glob(names) if each.is_file() and not each.name.startswith("."))
    if not paths:
        raise DataError(f"{pattern}: no shards there; give a .tar file, a folder of them, or a pattern with *")
    return paths


def read_shard(path: Path) -> tuple[list[Record], str | None]:
    """Samples of a shard in order, and what is wrong with it.

    Of a damaged shard there are those before the damage without the last, which may lack files.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return _records(path, tar)
    except tarfile.ReadError as error:
        return [], f"is not an uncompressed tar file ({error})"
    except OSError as error:
        return [], f"cannot be read ({error.strerror})"


def _records(path: Path, tar: tarfile.TarFile) -> tuple[list[Record], str | None]:
    records: dict[str, Record] = {}
    length, whole = path.stat().st_size, False
    try:
        for info in tar:
            key, extension = split_name(info.name)
            if info.isreg() and not info.issparse() and extension and info.offset_data + info.size <= length:
                members = records.setdefault(key, Record(path, key, {})).members
                members[extension] = Member(path, info.offset_data, info.size)
        whole = _ends(path, tar.offset)
    except tarfile.TarError:
        pass
    found = list(records.values())
    return (found, None) if whole else (found[:-1], f"is truncated or damaged after {len(found[:-1])} whole samples")


def _ends(path: Path, offset: int) -> bool:
    """Whether a block of zeros ends the tar file at ``offset``: tarfile takes a file that just stops for whole."""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(BLOCK) == bytes(BLOCK)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them: the name is cut at the first dot after the last slash."""
    match = re.match(r"^((?:.*/|)[^./]+)[.]([^/]+)$", name)
    return (match[1], match[2].lower()) if match else (name, "")


def write_shard(path: Path, samples: Iterable[Mapping[str, bytes]]) -> int:
    """Write a shard of samples, bytes by extension, under a temporary name first; returns how many there were.

    Keys are numbers after the shard's name; times are left out: equal samples make an equal file. Raises
    :class:`DataError` if it cannot be written, or without the webdataset library.
    """
    try:
        from webdataset import TarWriter
    except ImportError:
        raise DataError(EXTRA) from None

    count = 0
    try:
        with (
            replaced_file(path) as temporary,
            temporary.open("wb") as file,
            TarWriter(file, encoder=False, mtime=0, user="", group="") as tar,
        ):
            for sample in samples:
                tar.write({"__key__": f"{path.stem}-{count:06d}", **sample})
                count += 1
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror}); give another folder") from None
    return count
