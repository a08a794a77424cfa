"""Files and folders that stand under their names whole or not at all; text and JSON that are read with bounds.

What is being written lies in a hidden folder beside its place, ``.<name>...partial``, under its own name (encoders look
at suffixes), until it is complete and renamed. Only the standard library is imported: builder processes start through
this file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiv_deploy.runtime.errors import OutputError, one_line

MIB = 2**20
TEXT_LIMIT = 256 * MIB
"""Most bytes of a text file: more than any manifest, or request with all its pictures, has."""
NAME_LIMIT = 200
"""Bytes of a name that leave room for what a hidden name adds; file systems take 255."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex; ``OSError`` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder; one whose name no file system takes is none."""
    try:
        return path.is_dir()
    except OSError:
        return False


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    """UTF-8 text of a file, without its byte-order mark; ``ValueError`` says in words why there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from None
    if len(content) > limit:
        raise ValueError(f"it is larger than {limit // MIB} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, its byte {error.start} is 0x{content[error.start]:02x}") from None


def parse_json(text: str | bytes) -> Any:
    """The values of JSON ``text``; ``ValueError`` says in words why there are none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(one_line(str(error), 200)) from None


def read_json(path: Path, limit: int = TEXT_LIMIT) -> Any:
    """The values of a JSON file; errors as of :func:`read_text` and :func:`parse_json`."""
    return parse_json(read_text(path, limit))


def _shortened(name: str) -> str:
    """``name``, or its start and hash where a hidden name around it would be too long."""
    raw = os.fsencode(name)
    if len(raw) <= NAME_LIMIT:
        return name
    return f"{raw[: NAME_LIMIT - 17].decode(errors='ignore')}-{hashlib.sha256(raw).hexdigest()[:16]}"


@contextmanager
def draft(target: Path) -> Iterator[Path]:
    """Yield a path that nobody else has, from which a file or folder can be renamed to ``target``.

    What was not renamed by the end is removed. ``OSError`` if nothing can be written beside ``target``.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{_shortened(target.name)}-", suffix=".partial", dir=target.parent))
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
    hidden = place.with_name(f".{_shortened(place.name)}.partial")
    with _told(target, remedy):
        shutil.rmtree(hidden, ignore_errors=True)
        temporary = hidden / "new" / place.name
        try:
            temporary.mkdir(parents=True)
            yield temporary
            _put_in_place(temporary, place)
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
