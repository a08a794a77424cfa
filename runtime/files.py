"""Files and folders that stand under their names whole or not at all, and the SHA-256 of a file.

What is being written lies in a hidden folder beside its place, ``.<name>...partial``, under its own name (encoders look
at suffixes), until it is complete and renamed. Only the standard library is imported: builder processes start through
this file.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stiv_deploy.runtime.errors import OutputError


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex; ``OSError`` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Yield a path that nobody else has, from which a file or folder can be renamed to ``target``.

    What was not renamed by the end is removed. ``OSError`` if nothing can be written beside ``target``.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}-", suffix=".partial", dir=target.parent))
    try:
        yield folder / target.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_file(target: Path, remedy: str = "") -> Iterator[Path]:
    """Yield a path for a new file, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    An ``OSError`` becomes an :class:`OutputError`, which ends with ``remedy``.
    """
    with _told(target, remedy), draft(target) as temporary:
        yield temporary
        temporary.replace(target)


@contextmanager
def replaced_folder(target: Path, remedy: str = "") -> Iterator[Path]:
    """Yield a new folder, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    Its parents are made. The old folder ``target`` goes when the new one has its place, as does what a killed process
    left. Errors as of :func:`replaced_file`.
    """
    place = target.resolve()
    hidden = place.with_name(f".{place.name}.partial")
    with _told(target, remedy):
        shutil.rmtree(hidden, ignore_errors=True)
        temporary = hidden / place.name
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _put_in_place(temporary, place)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _put_in_place(new: Path, target: Path) -> None:
    """Rename the folder ``new`` to ``target``; an old folder of that name comes to lie beside ``new``, or stays."""
    old = new.with_name(f"{new.name}.old")
    try:
        if target.is_dir():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


@contextmanager
def _told(target: Path, remedy: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = f"; {remedy}" if remedy else ""
        raise OutputError(f"{target}: cannot be written ({error.strerror or error}){advice}") from None


def write_text(target: Path, text: str, remedy: str = "") -> None:
    """Write a UTF-8 text file whole and to the disk, or not at all; raises :class:`OutputError`."""
    with replaced_file(target, remedy) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
