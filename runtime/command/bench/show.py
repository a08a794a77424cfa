"""Measurements as tables on the terminal."""

from collections.abc import Iterator, Sequence

from rich.console import Console

from stiv_deploy.runtime.command.bench.against import Against
from stiv_deploy.runtime.command.bench.compare import Comparison, Side
from stiv_deploy.runtime.command.bench.mllog import LoadgenResult
from stiv_deploy.runtime.command.bench.plan import Plan, Planned
from stiv_deploy.runtime.command.bench.record import STAGES, BenchReport, Point
from stiv_deploy.runtime.command.bench.scale import Scaled
from stiv_deploy.runtime.command.bench.statistics import Estimate
from stiv_deploy.runtime.command.terminal import table

MIB, GIGA = 2**20, 1e9


def report(found: BenchReport) -> None:
    """Print ``found``."""
    console = Console()
    _warn(console, found.invalid)
    title = f"{found.bundle.hash[:12]} ({found.bundle.precision}) on {found.backend}, {found.device}"
    names = list(found.points[0].latency)
    columns = ("work", *names, "clips/s", "step", "CPU", "others")
    console.print(table(title, columns, points_rows(found.points), columns[1:], "with intervals of 95 %"))
    columns = ("stage", *(str(point.work) for point in found.points))
    console.print(table("Medians by stage", columns, _stages(found.points), columns[1:]))
    for line in remarks(found):
        console.print(line, highlight=False, markup=False)


def _warn(console: Console, invalid: Sequence[str]) -> None:
    for reason in invalid:
        console.print(f"INVALID: {reason}", highlight=False, markup=False, style="bold red")


def points_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """Work, its percentiles, throughput, time of a step and of all threads, and what others did."""
    return [_row(point, list(points[0].latency)) for point in points]


def _row(point: Point, names: Sequence[str]) -> tuple[str, ...]:
    return (
        str(point.work),
        *(interval(point.latency.get(name)) for name in names),
        f"{point.clips_per_second:.3g}",
        seconds(point.stages["denoise"] / max(1, point.work.steps)),
        seconds(point.cpu_seconds),
        "unknown" if point.others is None else f"{point.others:.0%}",
    )


def interval(estimate: Estimate | None) -> str:
    """A time and its interval."""
    if estimate is None:
        return "too few samples"
    return f"{seconds(estimate.value)} ({seconds(estimate.low)} to {seconds(estimate.high)})"


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 else f"{1e6 * value:.0f} us"


def _stages(points: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    for name in STAGES:
        yield name, *(f"{seconds(point.stages[name])}, {share(point, name):.0%}" for point in points)


def share(point: Point, stage: str) -> float:
    """Of all stages."""
    total = sum(point.stages[name] for name in STAGES)
    return point.stages[stage] / total if total else 0.0


def remarks(found: BenchReport) -> Iterator[str]:
    """What has no table."""
    for point in found.points:
        gap = "" if point.host_gap is None else f", {point.host_gap:.1%} of the time outside them"
        yield f"{point.work}: {point.graphs} graphs in {point.launches:g} calls an evaluation{gap}; {rates(point)}"
        if point.joules is not None:
            yield f"{point.work}: {point.joules:.3g} J a clip on the GPU"
        if point.device_bytes is not None:
            yield f"{point.work}: {point.device_bytes / MIB:.0f} MiB of the GPU's memory in use"
    if found.loadgen is not None:
        yield scenario(found.loadgen)
    if found.cold is not None:
        cold = found.cold
        yield f"cold start: {seconds(cold.seconds)} to the first clip, {cold.peak_bytes / MIB:.0f} MiB at most"
    yield f"outputs {found.verification.state}: {found.verification.reason}"
    yield f"kept from sample to sample: {', '.join(found.caches) or 'nothing'}; {found.threads} threads"


def scenario(found: LoadgenResult) -> str:
    """LoadGen's account, under the label that it needs."""
    if found.scenario == "offline":
        told = f"{found.samples_per_second:.4g} samples/s"
    else:
        told = "unknown" if found.p90_seconds is None else seconds(found.p90_seconds)
        told = f"p90 {told} by early stopping ({seconds(found.measured_p90_seconds)} measured)"
    verdict = "VALID" if found.valid else "INVALID"
    return f"{found.label}: {found.scenario}, {told}; {found.queries} queries, {verdict} by LoadGen ({found.reason})"


def rates(point: Point) -> str:
    """What was reached, and of what."""
    line = point.roofline
    reached = f"{line.operations_per_second / GIGA:.3g} GFLOP/s, {line.bytes_per_second / GIGA:.3g} GB/s or more"
    return reached if line.share is None else f"{reached}, {line.share:.0%} of what this device allows"


def plan(found: Plan) -> None:
    """Print ``found``."""
    title = f"PREDICTED, not measured: {found.what}, {found.size}, {found.rows} rows, {found.evaluations} evaluations"
    beside = ["measured step"] if any(each.measured is not None for each in found.planned) else []
    columns = ["GPU", "precision", "form", "GEMMs", "attention", "memory", "predicted step", "predicted clip", *beside]
    rows = [_planned_row(each, found.evaluations)[: len(columns)] for each in found.planned]
    caption = "denoising alone, without launches (some 0.1 ms a graph that is in no CUDA graph); plugins: our kernels"
    Console().print(table(title, columns, rows, columns[3:], caption))
    if found.link is not None:
        scale(found)


def scale(found: Plan) -> None:
    """Print what several GPUs are predicted to make of it."""
    title = f"PREDICTED, not measured: one clip on several GPUs, by {found.link}"
    columns = ("GPUs", "form", "predicted step", "speedup", "exchange", "memory", "pays")
    caption = (
        "exchange: bytes that the GPU sends which sends most, and seconds of the step, not overlapped; memory of one: "
        "weights, x and the FFN's hidden layer; pays: at most 0.9 of the step with fewer"
    )
    Console().print(table(title, columns, [_scaled_row(each) for each in found.scaled], columns[2:6], caption))


def _scaled_row(each: Scaled) -> tuple[str, ...]:
    names = (f"{each.gpus} {each.gpu} {each.parallel}", f"{each.precision} {each.form}")
    moved = f"{each.sent / 1e9:.1f} GB {seconds(each.exchange)}"
    times = (seconds(each.seconds), f"{each.speedup:.2f}x", moved, f"{each.memory / 1e9:.1f} GB")
    return (*names, *times, "yes" if each.pays else "no")


def _planned_row(planned: Planned, evaluations: int) -> tuple[str, ...]:
    each = planned.prediction
    terms = (each.linear, each.attention, each.memory, each.seconds, each.seconds * evaluations)
    told = "" if planned.measured is None else f"{seconds(planned.measured)}, {planned.measured / each.seconds:.2f}x"
    return (each.gpu, each.precision, each.form, *map(seconds, terms), told)


def comparison(found: Comparison) -> None:
    """Print ``found``."""
    console = Console()
    _warn(console, found.invalid)
    for name, words in found.said.items():
        console.print(f"on purpose, {name} differ: {words}", highlight=False, markup=False)
    columns = ("work", "A", "B", "B / A", "steps only")
    rows = [
        (
            str(each.work),
            seconds(each.base_seconds),
            seconds(each.our_seconds),
            times(each.latency),
            times(each.denoise),
        )
        for each in found.points
    ]
    title = f"A {_side(found.base)}; B {_side(found.ours)}"
    console.print(table(title, columns, rows, columns[1:], "medians; intervals of 95 % by bootstrap"))
    console.print(
        "what the machine did between A and B is in the ratios; 'stiv bench against' takes turns", style="dim"
    )


def against(found: Against) -> None:
    """Print ``found``."""
    console = Console()
    _warn(console, found.invalid)
    columns = ("", "prompts to frames", "times the bundle's", "clips differ by")
    rows = [
        (each.name, interval(each.median), times(each.ratio), f"{each.difference:.2g}") for each in found.contestants
    ]
    title = f"{found.work} on {found.backend}, {found.device}, {found.threads} threads"
    console.print(
        table(
            title,
            columns,
            rows,
            columns[1:],
            f"medians by turns, {len(found.contestants[0].samples)} rounds; intervals of 95 %",
        )
    )
    console.print(f"clips of another seed differ by {found.elsewhere:.2g}", highlight=False, markup=False)


def _side(side: Side) -> str:
    return f"{side.bundle[:12]} {side.precision} on {side.backend}"


def times(estimate: Estimate) -> str:
    """A ratio and its interval."""
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"
