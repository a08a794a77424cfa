"""Processes that load data ahead, for training and for pre-computing: what signals and shared memory mean to them."""

import dataclasses
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from stiv_deploy.stiv_ref.data.pool import ignore_signals, signals_held
from stiv_deploy.stiv_ref.errors import DataError

PREFETCH = 2
"""Micro-batches that each worker has ready."""
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (only looked at)
MIB = 2**20


def load_ahead(
    dataset: Dataset[Any],
    workers: int,
    title: str,
    *,
    collate: Callable[[Any], Any],
    batch_sampler: Sampler[list[Any]] | None = None,
) -> Iterator[Any]:
    """``collate`` of every list of items that ``batch_sampler`` names, or of every single item without it, in order.

    ``workers`` processes load ahead; with 0 loading happens in this one. Raises :class:`DataError`, naming the data by
    its ``title``, if one of them crashes or does not get the shared memory that hands its tensors over.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=1 if batch_sampler is not None else None,
        batch_sampler=batch_sampler,
        collate_fn=_Collate(collate),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # it draws a seed for its workers: not from the global generator
    )
    with signals_held():
        items = iter(loader)
    try:
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"{title}: {_reason(str(error))}") from error
    finally:
        _end(items)


@dataclasses.dataclass(frozen=True)
class _Collate:
    """``collate``; in a worker its tensors go to shared memory here, so that what is lacking is an error of the item.

    Left to the queue, the item would be lost in a thread of the worker, and awaited for ever.
    """

    collate: Callable[[Any], Any]

    def __call__(self, items: Any) -> Any:
        collated = self.collate(items)
        if get_worker_info() is not None:
            for tensor in tensors_of(collated):
                tensor.share_memory_()
        return collated


def tensors_of(value: object) -> Iterator[Tensor]:
    """All tensors in dataclasses, tuples and lists."""
    if isinstance(value, Tensor):
        yield value
    parts: Iterable[object] = value if isinstance(value, tuple | list) else ()
    if dataclasses.is_dataclass(value):
        parts = (getattr(value, field.name) for field in dataclasses.fields(value))
    for part in parts:
        yield from tensors_of(part)


def _reason(said: str) -> str:
    """What torch ``said`` of a worker, in words."""
    if "shared memory" in said or "Bus error" in said:
        free = shutil.disk_usage(SHARED_MEMORY).free // MIB if SHARED_MEMORY.is_dir() else 0
        return (
            f"its workers get too little shared memory ({SHARED_MEMORY} has {free} MiB free); give more (docker run "
            "--shm-size=1g), or set workers = 0, which needs none"
        )
    return (
        "a process that loads data crashed: a file breaks the decoder, or there is too little memory; with workers = 0 "
        "the crash says more"
    )


def _end(items: Iterator[Any]) -> None:
    """End the workers behind ``items``: in order if they can, which torch waits for, else at once."""
    workers = getattr(items, "_workers", ())
    if workers:
        items._shutdown_workers()  # type: ignore[attr-defined]
    for worker in workers:
        if worker.is_alive():
            worker.kill()
