"""Puts finished engines into a bundle: all of them or none, and never under their names before they are complete."""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.manifest import EngineRecord
from stiv_deploy.runtime.errors import BundleError, OutputError
from stiv_deploy.runtime.files import draft

HELD_BACK = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def staged(folder: Path, sources: dict[str, Path]) -> Iterator[dict[Path, Path]]:
    """Put ``sources`` under temporary names next to where they go; yields target by draft. Left-over drafts go away.

    They are hard links, which cost neither time nor space; copies on another file system, or one that has no links.
    """
    copies: dict[Path, Path] = {}
    try:
        with ExitStack() as drafts:
            for relative, source in sources.items():
                target = folder / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                copies[drafts.enter_context(draft(target))] = target
                linked_or_copied(source, next(reversed(copies)))
            yield copies
    except OSError as error:
        raise OutputError(f"{folder}: the engines cannot be written ({error.strerror or error})") from None


def linked_or_copied(source: Path, target: Path) -> None:
    """Make the new file ``target`` of the contents of ``source``: the same file, or where that is refused another."""
    try:
        os.link(source, target)
    except OSError:  # another file system, none with links, as many links as it can have, another owner
        shutil.copyfile(source, target)


def commit(bundle: Bundle, files: dict[Path, Path], records: Sequence[EngineRecord]) -> None:
    """Rename the copies into place and replace their records in the manifest, without Ctrl-C in between.

    Records of the same graph, bucket, backend and SM are replaced; engine files that no record names any more are
    removed. Raises :class:`BundleError` if the graphs changed while the engines were built.
    """
    with uninterrupted():
        manifest = Bundle.open(bundle.folder).manifest  # another build may have added engines meanwhile
        if manifest.graphs != bundle.manifest.graphs:
            raise BundleError(
                f"{bundle.folder}: the graphs changed while their engines were built; run the build again"
            )
        slots = {_slot(record) for record in records}
        kept = [record for record in manifest.engines if _slot(record) not in slots]
        engines = tuple(sorted([*kept, *records], key=lambda record: (record.backend, record.sm, record.file.path)))
        for copy, target in files.items():
            copy.replace(target)
        write_manifest(bundle.folder, manifest.model_copy(update={"engines": engines}))
        named = {record.file.path for record in engines}
        for record in manifest.engines:
            if record.file.path not in named:
                (bundle.folder / record.file.path).unlink(missing_ok=True)


def _slot(record: EngineRecord) -> tuple[str, str, str, str]:
    return record.graph, record.bucket, record.backend, record.sm


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block (they arrive in the main thread only)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[int] = []

    def hold(number: int, _frame: Any) -> None:
        caught.append(number)

    previous = {number: signal.signal(number, hold) for number in HELD_BACK}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt
