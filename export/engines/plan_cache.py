"""Plans by content: the same graph, weights, shapes, builder and target are never built twice.

A cache is a folder ``plans/<first two digits>/<key>.plan`` with a ``.json`` beside each plan. It may be shared by
bundles and by processes, and deleted at any time. Files appear under their names only when complete; drafts that a
killed process left are removed by the next one.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stiv_deploy.runtime import files
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import sha256, write_text

OWNER = "owner"
"""File in the folder of a draft: machine and process that write it."""
DAY = 86_400.0
"""Seconds after which a draft is nobody's any more, whoever began it: no plan takes so long."""


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/stiv-deploy``, by default ``~/.cache/stiv-deploy``; :class:`OutputError` without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "stiv-deploy"
    except RuntimeError:
        raise OutputError("there is no home folder for the plan cache; give --cache DIR, or set HOME") from None


def plan_key(**parts: Any) -> str:
    """SHA-256 (hex) of everything that decides what a plan contains; the values must be JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class CachedPlan:
    """A plan in the cache: its file, content hash, size, and the seconds its build took."""

    path: Path
    sha256: str
    bytes: int
    build_seconds: float


class PlanCache:
    """The cache in ``folder``; raises :class:`OutputError` if that cannot be written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            for name in ("plans", "timing"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
            self._sweep()
        except OSError as error:
            raise OutputError(
                f"the plan cache {folder} cannot be written ({error.strerror}); give --cache DIR"
            ) from None

    def _sweep(self) -> None:
        """Remove the drafts of processes that are no more."""
        for draft in self.folder.glob("plans/*/.*.partial"):
            if not _abandoned(draft):
                continue
            if draft.is_dir():
                shutil.rmtree(draft, ignore_errors=True)
            else:
                draft.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / "plans" / key[:2] / f"{key}.plan"

    def find(self, key: str) -> CachedPlan | None:
        """The plan of ``key``, or ``None`` if it was never stored or is damaged."""
        path = self._path(key)
        try:
            facts = json.loads(path.with_suffix(".json").read_text())
            plan = CachedPlan(path=path, **facts)
            intact = path.stat().st_size == plan.bytes and sha256(path) == plan.sha256
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        return plan if intact else None

    @contextmanager
    def draft(self, key: str) -> Iterator[Path]:
        """A path to write the plan of ``key`` to; what is there at the end is removed unless :meth:`keep` took it."""
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        with files.draft(path) as file:
            (file.parent / OWNER).write_text(f"{os.getpid()} {platform.node()}", encoding="utf-8")
            yield file

    def keep(self, key: str, file: Path, build_seconds: float, digest: str) -> CachedPlan:
        """Store the finished draft ``file``, of the SHA-256 ``digest``, under ``key``."""
        path = self._path(key)
        plan = CachedPlan(path=path, sha256=digest, bytes=file.stat().st_size, build_seconds=build_seconds)
        file.replace(path)
        write_text(path.with_suffix(".json"), json.dumps({k: v for k, v in asdict(plan).items() if k != "path"}))
        return plan

    def timing(self, name: str) -> Path:
        """Where the timing cache called ``name`` lives."""
        return self.folder / "timing" / f"{name}.cache"


def _abandoned(draft: Path) -> bool:
    """Whether nobody writes ``draft`` any more: its process has ended, or it is of yesterday."""
    try:
        if draft.stat().st_mtime < time.time() - DAY:
            return True
        process, _, machine = (draft / OWNER).read_text(encoding="utf-8").partition(" ")
        return machine == platform.node() and not _alive(int(process))
    except (OSError, ValueError, OverflowError):
        return False  # it has just begun, or has just gone


def _alive(process: int) -> bool:
    if sys.platform == "win32":
        return True  # where asking so would send it Ctrl-C: its draft goes when it is a day old
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's
    return True
