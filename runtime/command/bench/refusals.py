"""What makes a measurement unfair, and two of them incomparable; judged by the record alone, so at any later time."""

from collections.abc import Iterator, Sequence

from stiv_deploy.runtime.command.bench.record import BenchReport, Clocks, Point, Verification, share_of
from stiv_deploy.runtime.command.bench.statistics import least_samples
from stiv_deploy.runtime.errors import MeasurementError

LOAD_LIMIT = 0.05
"""Of all cores, what others may keep busy."""
KEPT = 0.9
"""If every request that came again took less than this share of the fastest new one, results are kept.

With six of each this happens by chance in one of 924 probes at most."""
CLOCK_LIMIT = 0.02
"""How much the clocks of a GPU may differ between two measurements."""
ANYWAY = "--anyway measures all the same and marks the result invalid"


def refuse(reasons: Sequence[str], *, anyway: bool) -> None:
    """Raise :class:`~stiv_deploy.runtime.errors.MeasurementError` for ``reasons``, unless asked for ``anyway``."""
    if reasons and not anyway:
        more = f"; and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise MeasurementError(f"{reasons[0]}{more}; {ANYWAY}")


def loaded(others: float | None, what: str = "this machine's cores") -> Iterator[str]:
    """Whether other processes are at work."""
    if others is None:
        yield "what else this machine does is not known"
    elif others > LOAD_LIMIT:
        yield (
            f"other processes keep {others:.0%} of {what} busy, {LOAD_LIMIT:.0%} are allowed; end them, or measure "
            "when it is quiet"
        )


def too_few(count: int, percentiles: Sequence[float]) -> Iterator[str]:
    """Percentiles that ``count`` samples are too few for."""
    for share in percentiles:
        least = least_samples(share)
        if count < least:
            yield f"{count} samples are too few for the percentile {100 * share:g}; take {least} or more"


def unproven(verification: Verification) -> Iterator[str]:
    """Whether nobody knows that the outputs are right: a wrong engine can be fast."""
    if verification.state != "verified":
        yield f"the outputs are {verification.state}: {verification.reason}; run 'stiv verify' on the bundle here"


def faults(report: BenchReport) -> list[str]:
    """Every reason not to believe ``report``."""
    found = [*unproven(report.verification)]
    found += [fault for point in report.points for fault in _point_faults(point)]
    if report.probe is not None and max(report.probe.repeated) < KEPT * min(report.probe.fresh):
        found.append(
            f"a request that comes again takes {report.probe.ratio.value:.0%} of the time of a new one: results are "
            "kept somewhere"
        )
    if report.loadgen is not None and not report.loadgen.valid:
        found.append(f"LoadGen calls it INVALID: {report.loadgen.reason}")
    return list(dict.fromkeys(found))


def _point_faults(point: Point) -> Iterator[str]:
    yield from too_few(len(point.samples), [share_of(name) for name in point.latency])
    if point.warm_up.work != point.work:
        yield f"the warm-up was {point.warm_up.work}, what was measured {point.work}; warm up with the same"
    elif any(each.bound for each in point.samples):
        yield f"samples of {point.work} had to load graphs or make buffers: the warm-up was of another size"
    if not point.warm_up.stable:
        count = len(point.warm_up.seconds)
        yield f"after {count} samples of warm-up those of {point.work} still got faster; measure when it is quiet"
    yield from loaded(point.others)


SAID = ("steps", "guidance", "solver", "caches", "machine")
"""Differences that may be meant, and then stand in every output."""
WORK = {
    "steps": ("steps",),
    "guidance": ("guidance",),
    "solver": ("solver",),
    "size": ("batch", "frames", "height", "width"),
    "given pictures": ("given",),
    "tiles": ("decode_tile",),
}
"""Names of differences, and the fields of the work that they are in."""


def differences(base: BenchReport, ours: BenchReport) -> dict[str, str]:
    """What two measurements have not in common, in words by name; bundle, backend and versions may differ."""
    found = {
        "transport": (base.transport, ours.transport),
        "model": (base.bundle.model.name, ours.bundle.model.name),
        "caches": (", ".join(base.caches) or "none", ", ".join(ours.caches) or "none"),
        "ranges of NVTX": ("with" if base.nvtx else "without", "with" if ours.nvtx else "without"),
        "threads": (str(base.threads), str(ours.threads)),
        "machine": (_machine(base), _machine(ours)),
        "scenario": (_scenario(base), _scenario(ours)),
        "number of points": (str(len(base.points)), str(len(ours.points))),
    }
    if base.bundle.model != ours.bundle.model and base.bundle.model.name == ours.bundle.model.name:
        found["model"] = ("of one shape", "of another")
    told = {name: f"{one} against {other}" for name, (one, other) in found.items() if one != other}
    for one, other in zip(base.points, ours.points, strict=False):
        told |= _work_differences(one, other) | _clock_difference(one.clocks, other.clocks)
    return told


def _scenario(report: BenchReport) -> str:
    return "none" if report.loadgen is None else report.loadgen.scenario


def _machine(report: BenchReport) -> str:
    machine = report.machine
    return f"{machine.cpu}, {machine.cores} cores, {', '.join(machine.gpus) or 'no GPU'}"


def _work_differences(base: Point, ours: Point) -> dict[str, str]:
    found = {}
    for name, fields in WORK.items():
        one, other = ("x".join(str(getattr(point.work, field)) for field in fields) for point in (base, ours))
        if one != other:
            found[name] = f"{one} against {other}"
    return found


def _clock_difference(base: Clocks, ours: Clocks) -> dict[str, str]:
    if (base.governor, base.cpu_most_mhz) != (ours.governor, ours.cpu_most_mhz):
        return {"clocks": f"CPU {_cpu(base)} against {_cpu(ours)}"}
    for one, other in ((base.gpu_mhz, ours.gpu_mhz), (base.gpu_memory_mhz, ours.gpu_memory_mhz)):
        if one is None or other is None:
            if one != other:
                return {"clocks": f"GPU {one or 'unknown'} against {other or 'unknown'} MHz"}
        elif abs(one - other) > CLOCK_LIMIT * one:
            return {"clocks": f"GPU {one} against {other} MHz"}
    return {}


def _cpu(clocks: Clocks) -> str:
    return f"{clocks.governor or 'governor unknown'} up to {clocks.cpu_most_mhz or 'unknown'} MHz"


def pair_faults(base: BenchReport, ours: BenchReport, said: Sequence[str] = ()) -> list[str]:
    """Every reason not to compare: what is invalid itself, and differences that are not among ``said``."""
    both = (("A", base), ("B", ours))
    found = [f"{name} is invalid: {each.invalid[0]}" for name, each in both if each.invalid]
    found += [f"{name}: {fault}" for name, each in both if not each.invalid for fault in faults(each)]
    for name, words in differences(base, ours).items():
        if name not in said:
            meant = f"; if that is meant, say --differ {name}" if name in SAID else ""
            found.append(f"A and B differ in {name} ({words}){meant}")
    return found
