"""All files of jobs: results, previews, and latents to go on from."""

import logging
import shutil
import time
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from stiv_deploy.runtime.files import replaced_file
from stiv_deploy.serving.store.files import VIDEO, FolderFiles, ResultFiles
from stiv_deploy.serving.store.jobs import JobStore, State
from stiv_deploy.serving.store.previews import Previews

log = logging.getLogger(__name__)
ABANDONED = 3600.0
"""Seconds after which what is half-written belongs to nobody any more."""
RESULT, LATENTS = (State.COMPLETED,), (State.QUEUED,)
"""States, besides that of being in progress, in which a job has a use for its files."""


class Results:
    """Below ``folder``: ``latents/ID.npz``, ``previews``, and ``results/ID`` with what a completed job has made.

    Unless that is in other ``files``; then ``results`` has what is being made.
    """

    def __init__(self, folder: Path, files: ResultFiles | None = None) -> None:
        self._drafts, self._latents = folder / "results", folder / "latents"
        self.files = files or FolderFiles(self._drafts)
        """Those of results."""
        self.previews = Previews(folder / "previews")
        for each in (self._drafts, self._latents):
            each.mkdir(parents=True, exist_ok=True)

    def free_bytes(self) -> int:
        """Free bytes of the disk that ``folder`` is on."""
        return shutil.disk_usage(self._drafts).free

    def remove(self, job: str) -> None:
        """Remove all files of a job."""
        self.files.remove(job)
        self.forget_latents(job)

    def save_latents(self, job: str, **arrays: np.ndarray) -> None:
        """Keep ``arrays``, from which another worker can go on with a job."""
        with replaced_file(self._saved(job)) as temporary:
            np.savez(temporary, allow_pickle=False, **arrays)

    def latents(self, job: str) -> dict[str, np.ndarray] | None:
        """The arrays that were kept; ``None`` if there are none, or they cannot be read."""
        try:
            with np.load(self._saved(job), allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the latents of %s cannot be read (%s); it begins again", job, error)
            return None

    def forget_latents(self, job: str) -> None:
        """Remove what :meth:`save_latents` kept, and the preview."""
        self._saved(job).unlink(missing_ok=True)
        self.previews.forget(job)

    def _saved(self, job: str) -> Path:
        return self._latents / f"{job}.npz"

    def _hidden(self) -> Iterator[Path]:
        """What is half-written."""
        for folder in (self._drafts, self._latents):
            yield from (file for file in folder.iterdir() if file.name[0] == ".")

    def sweep_abandoned(self) -> None:
        """Remove what killed processes left half-written, while others write."""
        for file in [*self._hidden(), *self.previews]:
            with suppress(FileNotFoundError):  # somebody has finished it
                if file.stat().st_mtime < time.time() - ABANDONED:
                    _remove(file)

    def sweep(self, store: JobStore) -> int:
        """Remove files whose job is gone or has no use for them, and tell the store of results that are; how many."""
        results, hidden = self.files.list(), [*self._hidden()]
        latents = [file for file in self._latents.iterdir() if file.name[0] != "."]
        states = store.states()  # after the files: what was made since then is in none of them
        orphans = [name for name in results if name[0] != "." and not _wanted(name, states, RESULT)]
        useless = [file for file in hidden if not _wanted(file.name, states, ())]
        useless += [file for file in self.previews if states.get(file.stem) != State.IN_PROGRESS]
        useless += [file for file in latents if not _wanted(file.name, states, LATENTS)]
        for name in orphans:
            self.files.remove(name)
        for file in useless:
            _remove(file)
        there = set(results)
        for job, state in states.items():
            if state == State.COMPLETED and job not in there and self.files.get(job, VIDEO) is None:
                store.lose(job)
        return len(orphans) + len(useless)


def _remove(file: Path) -> None:
    shutil.rmtree(file, ignore_errors=True) if file.is_dir() else file.unlink(missing_ok=True)


def _wanted(name: str, states: Mapping[str, State], wanted: Collection[State]) -> bool:
    """Whether a file or folder is of a job in a ``wanted`` state, or of one in progress, which may need it yet."""
    state = states.get(name.removeprefix(".").partition(".")[0].partition("-")[0])
    return state == State.IN_PROGRESS or state in wanted
