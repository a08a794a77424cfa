"""A source of training batches over any dataset whose samples load by number, in worker processes or in this one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from stiv_deploy.stiv_ref.data.order import Order
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.data.workers import load_ahead
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.text import TextStates

NAMED = 3  # broken samples that an error names

Key = tuple[int, int]
"""(step, number in the step's batch) of a sample."""


class DamagedSampleError(Exception):
    """The sample ``name`` cannot be loaded, for the reason ``fault``. Another takes its place."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(name, fault)
        self.name, self.fault = name, fault


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What :class:`Batch` holds of one sample, without the batch dimension."""

    name: str
    caption: str
    micro: Tensor
    video: Tensor | None = None
    latents: Tensor | None = None
    text: TextStates | None = None


class ClipDataset(Protocol):
    """Training samples by number, in groups that stack (one for each resolution bucket)."""

    @property
    def title(self) -> str:
        """What an error calls it: its path."""

    @property
    def groups(self) -> Sequence[Sequence[int]]:
        """Numbers of the samples in each group."""

    @property
    def captions(self) -> Sequence[str]:
        """All captions, also of samples that are in no group."""

    @property
    def total(self) -> int:
        """Samples found, with those that are broken or left out."""

    @property
    def broken(self) -> dict[str, str]:
        """Name and fault of those that were found broken when the dataset was opened."""

    @property
    def left_out(self) -> dict[str, str]:
        """Name and reason of whole samples that this stage cannot use."""

    def load(self, group: int, number: int, generator: torch.Generator) -> Sample:
        """Sample ``number`` of ``group``, cut as ``generator`` draws; :class:`DamagedSampleError` if it is broken."""

    def stills(self) -> "ClipDataset":
        """The same data as single frames of one size; :class:`DataError` if there are no pixels in it."""


@dataclass(frozen=True)
class _Loaded:
    """A micro-batch, or None if nothing could be loaded; and the faults of the samples met on the way, by name."""

    batch: Batch | None
    faults: dict[str, str]


class _Items(Dataset[tuple[Sample | None, dict[str, str]]]):
    """Samples by :data:`Key`, with the next ones of the order in place of broken ones."""

    def __init__(self, dataset: ClipDataset, order: Order, seed: int, stage: int) -> None:
        self.dataset, self.order, self.seed, self.stage = dataset, order, seed, stage
        self.faults: dict[int, tuple[str, str]] = {}

    def __getitem__(self, key: Key) -> tuple[Sample | None, dict[str, str]]:
        step, index = key
        group = self.order.bucket(step)
        met: dict[str, str] = {}
        for place in self.order.candidates(step, index):
            number = self.dataset.groups[group][place]
            if number not in self.faults:
                # The generator of a sample goes on to draw its noise and time, so its picture takes another one.
                generator = sample_generator(self.seed + 1, self.stage, step, index)
                try:
                    return self.dataset.load(group, number, generator), met
                except DamagedSampleError as error:
                    self.faults[number] = (error.name, error.fault)
            name, fault = self.faults[number]
            met[name] = fault
        return None, met


@dataclass(frozen=True)
class _Keys(Sampler[list[Key]]):
    """Keys of every micro-batch: the ``parts`` of each of the ``steps``."""

    steps: range
    parts: Sequence[range]

    def __iter__(self) -> Iterator[list[Key]]:
        for step in self.steps:
            yield from ([(step, index) for index in part] for part in self.parts)


class DatasetSource:
    """A :class:`~stiv_deploy.stiv_ref.data.source.Source` over a dataset.

    ``workers`` processes load ahead; with 0 loading happens in this one. :meth:`batches` raises :class:`DataError` once
    more than ``max_broken`` of all samples were found broken.
    """

    def __init__(
        self, dataset: ClipDataset, *, seed: int, stage: int, batch: int, workers: int = 0, max_broken: float = 0.5
    ) -> None:
        self.dataset, self.workers, self.max_broken = dataset, workers, max_broken
        self.seed, self.stage = seed, stage
        self._broken = dict(dataset.broken)
        self._check_broken()
        self._check_groups()
        self.order = Order([len(group) for group in dataset.groups], seed=seed, stage=stage, batch=batch)

    def words(self) -> Sequence[str]:
        """Sorted words and punctuation marks of all captions, in lower case, as the word tokenizer splits them."""
        from tokenizers import normalizers, pre_tokenizers

        lower, split = normalizers.Lowercase(), pre_tokenizers.Whitespace()
        parts = (split.pre_tokenize_str(lower.normalize_str(caption)) for caption in set(self.dataset.captions))
        return sorted({word for part in parts for word, _ in part})

    def batches(self, steps: range, parts: Sequence[range]) -> Iterator[list[Batch]]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says. :class:`DataError` if too much is broken."""
        loaded = self._load(_Keys(steps, parts))
        for _ in steps:
            yield [self._checked(next(loaded)) for _ in parts]

    def stills(self, count: int) -> Tensor:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says: random frames, in an order of their own."""
        dataset, workers, broken = self.dataset.stills(), self.workers, self.max_broken
        source = DatasetSource(dataset, seed=self.seed, stage=0, batch=count, workers=workers, max_broken=broken)
        size = max(1, -(-count // max(1, 4 * self.workers)))
        parts = [range(at, min(at + size, count)) for at in range(0, count, size)]
        batches = next(source.batches(range(1), parts))
        self._broken |= source._broken
        return torch.cat([batch.video[:, 0] for batch in batches if batch.video is not None])

    def broken(self) -> list[str]:
        """As :class:`~stiv_deploy.stiv_ref.data.source.Source` says, then what the stage cannot use otherwise."""
        return [f"{name}: {fault}" for name, fault in sorted(self._broken.items())] + [
            f"{name}: {reason}" for name, reason in sorted(self.dataset.left_out.items())
        ]

    def _load(self, keys: _Keys) -> Iterator[_Loaded]:
        items = _Items(self.dataset, self.order, self.seed, self.stage)
        return load_ahead(items, self.workers, self.dataset.title, collate=_collate, batch_sampler=keys)

    def _checked(self, loaded: _Loaded) -> Batch:
        if loaded.faults:
            self._broken |= loaded.faults
            self._check_broken()
        if loaded.batch is None:
            raise DataError(f"{self.dataset.title}: no sample of a bucket can be read; {self._first_broken()}")
        return loaded.batch

    def _check_broken(self) -> None:
        count, total = len(self._broken), self.dataset.total
        if count > self.max_broken * total:
            raise DataError(
                f"{self.dataset.title}: {count} of {total} samples are broken, more than max_broken = "
                f"{self.max_broken:g} allows; {self._first_broken()}. Mend or remove them, or raise max_broken"
            )

    def _first_broken(self) -> str:
        lines = [f"{name}: {fault}" for name, fault in sorted(self._broken.items())]
        return "; ".join(lines[:NAMED]) + ("; ..." if len(lines) > NAMED else "")

    def _check_groups(self) -> None:
        if any(self.dataset.groups):
            return
        reasons = [f"{name}: {reason}" for name, reason in sorted((self._broken | self.dataset.left_out).items())]
        raise DataError(
            f"{self.dataset.title}: none of its {self.dataset.total} samples can be used; {'; '.join(reasons[:NAMED])}"
            f"{'; ...' if len(reasons) > NAMED else ''}"
        )


def _collate(items: list[tuple[Sample | None, dict[str, str]]]) -> _Loaded:
    faults = {name: fault for _, met in items for name, fault in met.items()}
    samples = [sample for sample, _ in items if sample is not None]
    if len(samples) < len(items):
        return _Loaded(None, faults)
    return _Loaded(stack(samples), faults)


def stack(samples: Sequence[Sample]) -> Batch:
    """A batch of samples that have the same parts in the same shapes."""
    texts = [sample.text for sample in samples if sample.text is not None]
    return Batch(
        video=_stacked([sample.video for sample in samples]),
        latents=_stacked([sample.latents for sample in samples]),
        captions=[sample.caption for sample in samples],
        text=TextStates(*(torch.stack(parts) for parts in zip(*texts, strict=True))) if texts else None,
        micro=torch.stack([sample.micro for sample in samples]),
        names=[sample.name for sample in samples],
    )


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.stack(there) if there else None
