"""Two measurements side by side: ratios with intervals, where they may be compared."""

import statistics
from collections.abc import Sequence

from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.command.bench.record import STAGES, BenchReport, Point, Sample, Work
from stiv_deploy.runtime.command.bench.refusals import SAID, differences, pair_faults, refuse
from stiv_deploy.runtime.command.bench.statistics import Estimate, ratio
from stiv_deploy.runtime.errors import RequestError, briefly

LEAST = 1e-9
"""Seconds that stand for none, where they are divided by."""


class Compared(Frozen):
    """One piece of work: seconds of B over those of A, so that below 1 is faster; stages by their medians."""

    work: Work
    base_seconds: float
    our_seconds: float
    latency: Estimate
    denoise: Estimate
    stages: dict[str, float | None]


class Side(Frozen):
    """What was measured on one side, in words, and when."""

    bundle: str
    backend: str
    precision: str
    date: str


class Comparison(Frozen):
    """B against A; ``said`` are differences that were meant, ``invalid`` why it should not be believed."""

    base: Side
    ours: Side
    points: tuple[Compared, ...]
    said: dict[str, str]
    invalid: tuple[str, ...] = ()


def compare(base: BenchReport, ours: BenchReport, said: Sequence[str] = (), *, anyway: bool = False) -> Comparison:
    """``ours`` against ``base``; raises :class:`~stiv_deploy.runtime.errors.MeasurementError` where that is unfair.

    ``said`` names differences that are meant, of :data:`~stiv_deploy.runtime.command.bench.refusals.SAID`;
    :class:`RequestError` for others.
    """
    for name in said:
        if name not in SAID:
            raise RequestError(f"--differ {briefly(name)}: what may differ, if it is meant, are {', '.join(SAID)}")
    found = pair_faults(base, ours, said)
    refuse(found, anyway=anyway)
    told = differences(base, ours)
    return Comparison(
        base=_side(base),
        ours=_side(ours),
        points=tuple(_compared(*pair) for pair in zip(base.points, ours.points, strict=False)),
        said={name: told[name] for name in said if name in told},
        invalid=tuple(found),
    )


def _side(report: BenchReport) -> Side:
    bundle = report.bundle
    precision = bundle.precision if bundle.quantization is None else f"{bundle.quantization} in {bundle.precision}"
    return Side(bundle=bundle.hash, backend=report.backend, precision=precision, date=report.date)


def _compared(base: Point, ours: Point) -> Compared:
    stages = {name: ours.stages[name] / base.stages[name] if base.stages[name] else None for name in STAGES}
    return Compared(
        work=ours.work,
        base_seconds=statistics.median(each.seconds for each in base.samples),
        our_seconds=statistics.median(each.seconds for each in ours.samples),
        latency=ratio(_seconds(ours.samples), _seconds(base.samples)),
        denoise=ratio(_denoise(ours.samples), _denoise(base.samples)),
        stages=stages,
    )


def _seconds(samples: Sequence[Sample]) -> list[float]:
    return [each.seconds for each in samples]


def _denoise(samples: Sequence[Sample]) -> list[float]:
    return [max(each.stages["denoise"], LEAST) for each in samples]
