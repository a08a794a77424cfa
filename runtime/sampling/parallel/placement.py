"""Which devices make a clip together, and how: ``cfg2xdsp4`` is two groups for guidance branches, of four each."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, ModelFacts
from stiv_deploy.runtime.errors import BackendError, RequestError, briefly, few
from stiv_deploy.runtime.sampling.parallel.shards import group_rows

MOST_DEVICES = 64
CPU = "cpu"
FORM = re.compile(r"(?:cfg(?P<guidance>\d{1,2}))?x?(?:dsp(?P<sequence>\d{1,2}))?")
EXAMPLE = "--devices 0,1,2,3, or cpu,cpu"


class Layout(NamedTuple):
    """Groups for guidance branches, and devices in each."""

    guidance: int
    sequence: int

    def __str__(self) -> str:
        return f"cfg{self.guidance}xdsp{self.sequence}"


def layout(devices: int, *, branches: bool) -> Layout:
    """Guidance first, where there are ``branches`` of it and the number of devices is even."""
    guidance = 2 if branches and devices % 2 == 0 else 1
    return Layout(guidance, devices // guidance)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """``devices`` in the order of their ranks: ``cpu``, or a GPU's index in digits; the first one leads.

    Rows of the model, one for each guidance branch of a clip, are dealt out to ``guidance`` groups of ``sequence``
    devices, which share the frames and positions of theirs. ``chosen`` was named by the user, and is not changed.
    """

    devices: tuple[str, ...]
    guidance: int
    sequence: int
    chosen: bool = False

    def __post_init__(self) -> None:
        assert self.guidance * self.sequence <= len(self.devices)

    @property
    def size(self) -> int:
        """How many devices take part."""
        return self.guidance * self.sequence

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Ranks of each group."""
        ranks = range(self.size)
        return tuple(tuple(ranks[start : start + self.sequence]) for start in ranks[:: self.sequence])

    def group_of(self, rank: int) -> int:
        """The group that ``rank`` is of."""
        return rank // self.sequence

    def __str__(self) -> str:
        return str(Layout(self.guidance, self.sequence))

    def fitting(self, frames: int, tokens: int) -> "Placement":
        """This one for clips of so many token frames, of so many tokens each.

        With no more devices in a group than there are frames and positions; :class:`RequestError` where that number was
        chosen.
        """
        most = min(frames, tokens)
        if self.sequence <= most:
            return self
        if self.chosen:
            raise RequestError(
                f"{frames} token frames of {tokens} tokens cannot be shared by {self.sequence} devices; give "
                f"--parallel with dsp{most} or less, or leave it out"
            )
        return replace(self, sequence=most)

    def check_rows(self, rungs: Iterable[int], least: int) -> None:
        """:class:`RequestError` if a call of one of ``rungs`` rows leaves a group fewer than ``least``, but some."""
        shares = {group_rows(rows, self.guidance, group) for rows in rungs for group in range(self.guidance)}
        fewest = min(shares - {0})
        if fewest < least:
            raise RequestError(
                f"a group of devices would have {fewest} of the model's rows, and graphs of this size take no fewer "
                f"than {least}; give --parallel dsp{self.size}, or more videos at a time"
            )


def parse_devices(text: str) -> tuple[str, ...]:
    """``0,1,2,3`` or ``cpu,cpu``: devices by rank; :class:`BackendError` for what is none."""
    names = tuple(part.strip().lower() for part in text.split(","))
    wrong = [name for name in names if not (name == CPU or (name.isdecimal() and len(name) <= 4))]
    if wrong or len(names) > MOST_DEVICES:
        what = few(list(map(briefly, wrong))) or f"{len(names)} devices"
        raise BackendError(f"--devices: {what}; give at most {MOST_DEVICES} indices of GPUs, or cpu, as {EXAMPLE}")
    names = tuple(name if name == CPU else str(int(name)) for name in names)
    check_devices(names)
    return names


def check_devices(names: Sequence[str]) -> None:
    """:class:`BackendError` where GPUs and the CPU are mixed, or a GPU is named twice."""
    gpus = [name for name in names if name != CPU]
    if gpus and len(gpus) < len(names):
        raise BackendError(f"--devices {','.join(names)}: devices must be alike, all GPUs or all cpu; give {EXAMPLE}")
    twice = sorted({name for name in gpus if gpus.count(name) > 1})
    if twice:
        raise BackendError(f"--devices {','.join(names)}: GPU {twice[0]} is named twice; name each once")


def place(devices: Sequence[str], parallel: str | None, model: ModelFacts, mode: str) -> Placement:
    """How ``devices`` share the work: as ``parallel`` says, else guidance is split first.

    ``mode`` is the guidance mode that requests of the bundle have by default; a model that has guidance in one row
    leaves all to the sequence. Raises :class:`BackendError`.
    """
    names = tuple(devices)
    if parallel is not None:
        guidance, sequence = parse_parallel(parallel, len(names))
        return Placement(devices=names, guidance=guidance, sequence=sequence, chosen=True)
    guidance, sequence = layout(len(names), branches=mode != "none" and model.student is None)
    return Placement(devices=names, guidance=guidance, sequence=sequence)


def parse_parallel(text: str, devices: int) -> Layout:
    """Groups, and devices in each, of ``cfg2xdsp4``, ``cfg2`` or ``dsp4``; :class:`BackendError`."""
    found = FORM.fullmatch(text.strip().lower())
    if found is None or not any(found.groups()):
        raise BackendError(f"--parallel {briefly(text)}: no such form; give cfg2, dsp4 or cfg2xdsp2")
    guidance, sequence = (int(found[name] or 1) for name in ("guidance", "sequence"))
    if not 1 <= guidance <= SAMPLE_ROWS or sequence < 1:
        raise BackendError(
            f"--parallel {text}: a clip has 1 to {SAMPLE_ROWS} guidance branches to put on devices; give cfg1 to "
            f"cfg{SAMPLE_ROWS}, and dsp1 or more"
        )
    if guidance * sequence != devices:
        raise BackendError(
            f"--parallel {text} is of {guidance * sequence} devices, --devices names {devices}; make them agree"
        )
    return Layout(guidance, sequence)
