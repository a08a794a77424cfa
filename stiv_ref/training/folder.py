"""The folder of a run: proven writable, of one training at a time, swept of what killed ones left, gone if it is empty.

Only names of a run's own files are touched: a checkpoint or bundle is refused as a run's folder.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.files import make_writable, told
from stiv_deploy.stiv_ref.training import log
from stiv_deploy.stiv_ref.training.pictures import FOLDER as SAMPLES
from stiv_deploy.stiv_ref.training.run import TOKENIZER_FILE, VAE_FILE
from stiv_deploy.stiv_ref.training.stages import LORA_FILE, STAGES
from stiv_deploy.stiv_ref.training.state import OLD, PARTIAL, STATE, find_state

LOCK = ".lock"
CHECKPOINT = "checkpoint"
BROKEN = "broken.txt"
"""What could not be read of a run's data, and why."""
FILES = (log.FILE, TOKENIZER_FILE, VAE_FILE, LORA_FILE, BROKEN)
FOLDERS = (CHECKPOINT, STAGES, SAMPLES, STATE, PARTIAL, OLD, log.EVENTS)
FOREIGN = ("config.json", "manifest.json")
"""Files of a checkpoint and of a bundle."""
REMEDY = "the last saved state is kept: mend that, and the same command goes on from it"


@contextmanager
def run_folder(out: Path, first: bool = True) -> Iterator[None]:
    """Hold the folder ``out`` for a training; the process that is not the ``first`` leaves that to the first.

    Raises :class:`StivRefError` if it cannot be written, now or, as on a full disk, later; if another training runs in
    it; or if it holds something else. A run that fails before its first step leaves nothing of its own.
    """
    if not first:
        yield
        return
    before = _names(out)
    made = _make(out)
    try:
        with told(out, REMEDY), _locked(out):
            _check(out)
            _sweep(out)
            yield
    except BaseException:
        _clear(out, made, before)
        raise


def _make(out: Path) -> Path | None:
    """Make ``out`` and prove that it can be written; the outermost folder that was not there."""
    try:
        missing = [each for each in (out, *out.parents) if not each.exists()]
        make_writable(out)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StivRefError(f"{out}: cannot write the run there ({reason}); choose another --out") from None
    return missing[-1] if missing else None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    try:
        lock = FileLock(out / LOCK).acquire(blocking=False)
    except Timeout:
        raise StivRefError(
            f"{out}: another training runs in this folder; wait for its end, stop it, or choose another --out"
        ) from None
    with lock:
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)  # while it is held: one that is gone is taken by nobody


def _check(out: Path) -> None:
    """:class:`StivRefError` if something else is in the place of a file or folder of the run."""
    for name in FOREIGN:
        if (out / name).exists():
            raise StivRefError(f"{out}: holds {name}, it is not the folder of a run; choose another --out")
    for names, wanted, fits in ((FILES, "file", Path.is_file), (FOLDERS, "folder", Path.is_dir)):
        for path in (out / name for name in names):
            if path.exists() and not fits(path):
                raise StivRefError(f"{path}: is no {wanted}, as a run has there; remove it, or choose another --out")


def _sweep(out: Path) -> None:
    """Remove what killed trainings left half-written."""
    for folder in (out, out / STAGES, out / SAMPLES):
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)
    for probe in out.glob(".writable-*"):
        probe.unlink(missing_ok=True)
    shutil.rmtree(out / PARTIAL, ignore_errors=True)


def _names(out: Path) -> set[str]:
    try:
        return {path.name for path in out.iterdir()}
    except (OSError, ValueError):
        return set()


def _clear(out: Path, made: Path | None, before: set[str]) -> None:
    """Remove what a run without a step put into its folder, which it ``made``, or found with the names ``before``."""
    written = out / log.FILE
    if find_state(out) is not None or (written.is_file() and written.stat().st_size):
        return
    if made is not None:
        shutil.rmtree(made, ignore_errors=True)
        return
    for name in {*FILES, LOCK} - before:
        (out / name).unlink(missing_ok=True)
