"""Files and folders that stand under their names whole or not at all; text and JSON that are read with bounds.

What is being written lies in a hidden folder beside its place, ``.<name>...partial``, under its own name (encoders look
at suffixes), until it is complete and renamed. Only the standard library is imported: builder processes start through
this file.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
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


def exists(path: Path) -> bool:
    """Whether there is anything; nothing has a name that no file system takes."""
    try:
        return path.exists()
    except OSError:
        return False


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
def draft(target: Path, name: str | None = None) -> Iterator[Path]:
    """Yield a path that nobody else has, from which a file or folder can be renamed to ``target``.

    Its last part is ``name``, by default that of ``target``. What was not renamed by the end is removed. ``OSError`` if
    nothing can be written beside ``target``.
    """
    folder = Path(tempfile.mkdtemp(prefix=f".{_shortened(target.name)}-", suffix=".partial", dir=target.parent))
    try:
        yield folder / (name or target.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replaced_file(target: Path, remedy: str = "") -> Iterator[Path]:
    """Yield a path for a new file, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    A link stays and what it names is replaced; an old file's mode stays. An ``OSError`` becomes an
    :class:`OutputError`, which ends with ``remedy``.
    """
    with told(target, remedy):
        place = _place(target)
        with draft(place, target.name) as temporary:
            yield temporary
            if place.exists():
                _refuse_device(target, place, remedy)
                shutil.copymode(place, temporary)
            temporary.replace(place)


@contextmanager
def replaced_folder(target: Path, remedy: str = "") -> Iterator[Path]:
    """Yield a new folder, which becomes ``target`` if the block succeeds, and vanishes on any failure.

    Its parents are made. The old folder ``target`` goes when the new one has its place, as does what a killed process
    left. Errors as of :func:`replaced_file`.
    """
    place = _place(target)
    hidden = place.with_name(f".{_shortened(place.name)}.partial")
    with told(target, remedy):
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
def told(target: Path, remedy: str) -> Iterator[None]:
    """An ``OSError`` of writing ``target`` as an :class:`OutputError`, which ends with ``remedy``."""
    try:
        yield
    except OSError as error:
        advice = f"; {remedy}" if remedy else ""
        raise OutputError(f"{one_line(str(target))}: cannot be written ({error.strerror or error}){advice}") from None


def write_text(target: Path, text: str, remedy: str = "") -> None:
    """Write a UTF-8 text file whole and to the disk, or not at all; raises :class:`OutputError`."""
    with replaced_file(target, remedy) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_file(target: Path, remedy: str = "choose another name") -> None:
    """Prove, before anything expensive, that the file ``target`` can be written: :class:`OutputError` if not.

    It names a file in a folder that exists and takes files, and what stands there, links followed, is a file too.
    """
    with told(target, remedy):
        place = _place(target)
        if place.is_dir():
            raise OutputError(f"{target}: cannot be written, it is a folder; {remedy}")
        if not place.parent.is_dir():
            raise OutputError(f"{target}: cannot be written, the folder {target.parent} does not exist; make it first")
        _refuse_device(target, place, remedy)
        _try(target, place.parent, remedy)


def check_folder(target: Path, remedy: str = "choose another folder") -> None:
    """Prove, before anything expensive, that a new folder can take the place ``target``: :class:`OutputError` if not.

    Its parents may be missing. The folder that the process is in, one above it, and a mounted one keep their places.
    """
    with told(target, remedy):
        place = _place(target)
        if Path.cwd().is_relative_to(place):
            raise OutputError(f"{target}: is the folder that you are in, or above it; {remedy}")
        if place.exists() and not place.is_dir():
            raise OutputError(f"{target}: this is a file and a folder is wanted; {remedy}")
        if place.is_mount():
            raise OutputError(f"{target}: is a mounted folder, which cannot be replaced; name a folder in it")
        _try(target, next(folder for folder in place.parents if folder.exists()), remedy)


def make_folder(target: Path, remedy: str = "choose another folder") -> None:
    """Make ``target`` and its parents if need be, and prove that it takes files: :class:`OutputError` if not."""
    with told(target, remedy):
        target.mkdir(parents=True, exist_ok=True)
        _try(target, target, remedy)


def check_apart(outputs: Iterable[Path | None], inputs: Iterable[Path | None]) -> None:
    """:class:`OutputError` if writing one of ``outputs`` would replace one of ``inputs``, or a folder that holds it."""
    read = {each: _place(each) for each in inputs if each is not None}
    for target in outputs:
        for given, place in read.items() if target is not None else ():
            if target is not None and place.is_relative_to(_place(target)):
                raise OutputError(f"{target}: would replace {given}, which is read; choose another name")


def check_no_bundle(target: Path) -> None:
    """:class:`OutputError` if ``target`` lies in a bundle, however deep: that folder holds its own files only."""
    with told(target, ""):
        bundle = next(filter(_is_bundle, _place(target).parents), None)
    if bundle is not None:
        raise OutputError(f"{target}: is in the bundle {bundle}, which holds its own files only; choose another place")


def _is_bundle(folder: Path) -> bool:
    """Whether the manifest of ``folder`` is one of a bundle, not of something else that has such a file."""
    try:
        values = read_json(folder / "manifest.json")
    except ValueError:
        return False
    return isinstance(values, dict) and {"format_version", "graphs"} <= values.keys()


def _try(target: Path, folder: Path, remedy: str) -> None:
    """:class:`OutputError` if ``folder`` takes no files; only trying also knows read-only mounts, and root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"the folder {folder} takes no files ({error.strerror})"
        raise OutputError(f"{target}: cannot be written, {reason}; {remedy}") from None


def _place(target: Path) -> Path:
    """Where ``target`` lies, all links followed; ``OSError`` if no file can be called so."""
    try:
        return target.resolve()
    except (RuntimeError, ValueError) as error:  # links in a circle, a NUL
        raise OSError(errno.EINVAL, one_line(str(error), 200)) from None


def _refuse_device(target: Path, place: Path, remedy: str) -> None:
    """:class:`OutputError` if a device or a pipe stands at ``place``: a file must not replace it."""
    if place.exists() and not (place.is_file() or place.is_dir()):
        raise OutputError(f"{target}: cannot be written, it is a device or a pipe; {remedy}")
