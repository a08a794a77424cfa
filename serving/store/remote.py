"""Files of results in any place that fsspec knows: S3, Google's and Azure's object stores, and many more.

Such a place has no rename. A file is there, whole, once it has been put, and a job's video is put last: where it is,
the others are. Who asks for a file asks for that of a completed job, which was all put before.
"""

import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from stiv_deploy.runtime.errors import OutputError, one_line
from stiv_deploy.runtime.files import draft
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.store.files import VIDEO

BLOCK = 2**18
"""Bytes that are read at a time."""
JOB = re.compile(r"video_[0-9a-f]{32}")
"""What a job's folder is called; nothing else in the place is ours to remove."""
log = logging.getLogger(__name__)


class FsspecFile:
    """The file ``path`` of ``system``; ``FileNotFoundError`` if it is not there."""

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self.size = int(system.info(path)["size"])
        self.tag = str(system.ukey(path))

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """As the protocol says."""
        for at in range(start, stop, BLOCK):
            yield self._system.cat_file(self._path, start=at, end=min(at + BLOCK, stop))

    def fetch(self, target: Path) -> None:
        """As the protocol says."""
        self._system.get_file(self._path, str(target))


class FsspecFiles:
    """:class:`~stiv_deploy.serving.store.files.ResultFiles` at ``url``; what is being made is in the folder ``drafts``.

    Raises :class:`~stiv_deploy.serving.errors.ServeError` if nothing can be put there.
    """

    def __init__(self, url: str, drafts: Path) -> None:
        if urlsplit(url).password is not None:
            raise ServeError("--results: no secret may be in its URL, where others see it; set the library's variables")
        self._drafts = drafts
        try:
            self._system, root = fsspec.core.url_to_fs(url, use_listings_cache=False, skip_instance_cache=True)
            self._root = root.rstrip("/")
            self._try_out()
        except Exception as error:  # each library has its own
            raise ServeError(f"--results {url}: nothing can be put there ({one_line(str(error))})") from None

    def _try_out(self) -> None:
        path = f"{self._root}/.{secrets.token_hex(4)}"
        if "/" in self._root.strip("/"):  # else it is a bucket, which its owner makes
            self._make(self._root)
        self._system.pipe_file(path, b"")
        self._system.rm_file(path)

    def _make(self, folder: str) -> None:
        """Make ``folder`` in a place that has folders; nothing above it, and no bucket."""
        with suppress(FileExistsError):
            self._system.mkdir(folder, create_parents=False)

    def _place(self, job: str) -> str:
        return f"{self._root}/{job}"

    @contextmanager
    def writing(self, job: str) -> Iterator[Path]:
        """As the protocol says."""
        with draft(self._drafts / job) as folder:
            folder.mkdir()
            yield folder
            try:
                self._put(folder, job)
            except Exception as error:  # each library has its own
                raise OutputError(f"{self._place(job)}: cannot be written ({one_line(str(error))})") from None

    def _put(self, folder: Path, job: str) -> None:
        self._make(self._place(job))
        for file in sorted(folder.iterdir(), key=lambda file: file.name == VIDEO):
            self._system.put_file(str(file), f"{self._place(job)}/{file.name}")

    def link(self, made: str, job: str) -> bool:
        """As the protocol says; they are copied there."""
        try:
            names = [Path(path).name for path in self._system.ls(self._place(made), detail=False)]
            self._make(self._place(job))
            for name in sorted(names, key=lambda name: name == VIDEO):
                self._system.cp_file(f"{self._place(made)}/{name}", f"{self._place(job)}/{name}")
        except FileNotFoundError:
            return False
        return VIDEO in names

    def bytes(self, job: str) -> int:
        """As the protocol says."""
        return int(self._system.du(self._place(job)))

    def get(self, job: str, name: str) -> FsspecFile | None:
        """As the protocol says."""
        try:
            return FsspecFile(self._system, f"{self._place(job)}/{name}")
        except FileNotFoundError:
            return None

    def remove(self, job: str) -> None:
        """As the protocol says; what cannot be removed now is swept at the next start."""
        try:
            self._system.rm(self._place(job), recursive=True)
        except FileNotFoundError:
            return
        except Exception as error:  # each library has its own
            log.warning("the files of %s are still at %s (%s)", job, self._root, one_line(str(error)))

    def list(self) -> list[str]:
        """As the protocol says."""
        try:
            names = [Path(path).name for path in self._system.ls(self._root, detail=False)]
        except FileNotFoundError:  # there are no empty folders in an object store
            names = []
        return [name for name in names if JOB.fullmatch(name)]
