"""Files and folders that stand under their names whole or not at all, the SHA-256 of a file, and where a run can write.

What is being written lies in a hidden folder beside its place, ``.<name>...partial``, under its own name (writers look
at suffixes), until it is complete and renamed. The runtime has the same for itself.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stiv_deploy.stiv_ref.errors import OutputError

NAME_LIMIT = 200
"""Bytes of a name that leave room for what a hidden name adds; file systems take 255."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex; ``OSError`` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: Path) -> bool:
    """Whether ``path`` is a file; one whose name no file system takes is none."""
    try:
        return path.is_file()
    except OSError:
        return False


def _shortened(name: str) -> str:
    """``name``, or its start and hash where a hidden name around it would be longer than file systems take."""
    raw = os.fsencode(name)
    if len(raw) <= NAME_LIMIT:
        return name
    return f"{raw[: NAME_LIMIT - 17].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


def refuse_device(target: Path) -> None:
    """``OSError`` if ``target`` is a device or a pipe, which a file must not replace."""
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(errno.EINVAL, "it is a device or a pipe")


@contextmanager
def told(where: Path, remedy: str) -> Iterator[None]:
    """Turn an ``OSError`` from inside, as of a full disk, into an :class:`OutputError` that names ``where``."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"{where}: cannot be written ({error.strerror or error}); {remedy}") from None


@contextmanager
def replaced_file(target: Path) -> Iterator[Path]:
    """Yield a path for a new file, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    A link stays and what it names is replaced; an old file's mode stays. ``OSError`` if a device stands there.
    """
    place = target.resolve() if target.is_symlink() else target
    refuse_device(place)
    folder = Path(tempfile.mkdtemp(prefix=f".{_shortened(place.name)}-", suffix=".partial", dir=place.parent))
    try:
        yield folder / target.name
        if place.exists():
            shutil.copymode(place, folder / target.name)
        (folder / target.name).replace(place)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    Its parents are made. The old folder ``target`` goes when the new one has its place, as does what a killed process
    left.
    """
    hidden = target.with_name(f".{_shortened(target.name)}.partial")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        temporary = hidden / "new" / target.name
        temporary.mkdir(parents=True)
        yield temporary
        _put_in_place(temporary, target)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _put_in_place(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``; an old folder of that name goes to the hidden one, or stays."""
    old = new.parents[1] / "old"
    try:
        if target.is_dir():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with replaced_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_writable(folder: Path) -> None:
    """Make ``folder`` if need be and prove that it can be written in; ``OSError`` if not."""
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".writable-{os.getpid()}"
    probe.touch()
    probe.unlink()
