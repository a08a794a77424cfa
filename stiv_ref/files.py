"""Files and folders that stand under their names whole or not at all; text and JSON that are read with bounds.

What is being written lies in a hidden folder beside its place, ``.<name>...partial``, under its own name (writers look
at suffixes), until it is complete and renamed. The runtime has the same for itself.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stiv_deploy.stiv_ref.errors import OutputError, one_line

MIB = 2**20
TEXT_LIMIT = 64 * MIB
"""Most bytes of a recipe, a config, or a list of prompts."""
INDEX_LIMIT = 2**34
"""Most bytes of a file with a line for every clip."""
NAME_LIMIT = 200
"""Bytes of a name that leave room for what a hidden name adds; file systems take 255."""


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hex; ``OSError`` if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def same_name(path: Path) -> Path:
    """``path``, or the file that is there under the same visible name: letters with marks have several spellings."""
    forms = (path.with_name(unicodedata.normalize(form, path.name)) for form in ("NFC", "NFD"))
    return path if is_file(path) else next((each for each in forms if is_file(each)), path)


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


def refuse_bundle(target: Path) -> None:
    """``OSError`` if ``target`` lies in a bundle, a folder of files that its ``manifest.json`` names."""
    for folder in target.resolve().parents:
        try:
            values = parse_json(read_text(folder / "manifest.json"))
        except ValueError:
            continue
        if isinstance(values, dict) and {"format_version", "graphs"} <= values.keys():
            raise OSError(errno.EINVAL, f"it is in the bundle {folder}, which holds its own files only")


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
