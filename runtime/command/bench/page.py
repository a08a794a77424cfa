"""A measurement as a page of its own: every sample as a dot, percentiles with their intervals, stages as bars."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from stiv_deploy.runtime.command.bench.record import STAGES, BenchReport, Point
from stiv_deploy.runtime.command.bench.show import interval, points_rows, remarks, seconds, share
from stiv_deploy.runtime.command.bench.statistics import Estimate
from stiv_deploy.runtime.command.html import Html, element, grid, page, section
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import check_file, check_no_bundle

SUFFIX = ".html"
HEIGHT, MIDDLE, RADIUS = 44, 22, 4
"""Pixels: of a strip, its middle line, and of a dot."""
LANES = 5
"""Heights that dots take in turns, so that those of equal samples are seen."""
COLOURS = ("#8a6d00", "#2f8f5b", "#7a4fbf", "#1f5fbf", "#c0582b", "#5c5f66", "#b0b3ba")
"""Of :data:`~stiv_deploy.runtime.command.bench.record.STAGES`."""


class Axis(NamedTuple):
    """Seconds from 0 to ``most`` over the width of a strip."""

    most: float

    def place(self, value: float) -> str:
        """Where ``value`` is, as a share of the width."""
        return f"{100 * min(value / self.most, 1.0):.2f}%" if self.most else "0%"


def check_page(out: Path | None, json: Path | None) -> None:
    """Raise :class:`~stiv_deploy.runtime.errors.OutputError` if ``--html`` names what cannot become a page."""
    if out is None:
        return
    if out.suffix != SUFFIX:
        raise OutputError(f"{out}: the page is an HTML file; give a name that ends in {SUFFIX}")
    if json is not None and json.absolute() == out.absolute():
        raise OutputError(f"{out}: named by both --html and --json; choose two names")
    check_file(out)
    check_no_bundle(out)


def bench_page(report: BenchReport) -> str:
    """``report`` as a whole HTML document."""
    title = f"stiv bench: {report.bundle.model.name} on {report.backend}"
    names = list(report.points[0].latency)
    return page(
        title,
        _header(title, report),
        *section("Latency", *_latency(report.points, names)),
        *section("Stages", *_stages(report.points)),
        *section("More", *(element("p", line) for line in remarks(report))),
        *section("Machine and versions", *grid(("", ""), facts(report))),
        *section("Command", element("pre", element("code", report.command))),
    )


def _header(title: str, report: BenchReport) -> Html:
    words, kind = ("INVALID", "badge missed") if report.invalid else ("fair", "badge")
    told = f"Bundle {report.bundle.hash[:12]}, {report.bundle.precision}, {report.device}, {report.date}."
    reasons = (element("p", f"INVALID: {reason}", class_="note") for reason in report.invalid)
    heading = element("h1", title, " ", element("span", words, class_=kind))
    return element("header", heading, element("p", told), *reasons)


def _latency(points: Sequence[Point], names: Sequence[str]) -> Iterator[Html]:
    yield from grid(("work", *names, "clips/s", "step", "CPU", "others"), points_rows(points))
    axis = Axis(1.05 * max(each.seconds for point in points for each in point.samples))
    yield element("p", "Seconds of each sample; lines are percentiles, bands their intervals of 95 %.")
    strips = [_strip_row(point, axis) for point in points]
    yield element("div", _scale(axis), *strips, class_="ladder")


def _strip_row(point: Point, axis: Axis) -> Html:
    median = point.latency.get("p50")
    told = f"{len(point.samples)} samples" if median is None else seconds(median.value)
    name = element("span", str(point.work), class_="name")
    return element("div", name, _strip(point, axis), element("span", told, class_="value"), class_="rung")


def _strip(point: Point, axis: Axis) -> Html:
    marks = [part for name, each in point.latency.items() if each is not None for part in _mark(name, each, axis)]
    return element(
        "svg",
        element("title", f"{point.work}: {len(point.samples)} samples"),
        *marks,
        *(_dot(index, each.seconds, axis) for index, each in enumerate(point.samples)),
        width="100%",
        height=HEIGHT,
        role="img",
    )


def _mark(name: str, estimate: Estimate, axis: Axis) -> Iterator[Html]:
    """A percentile's interval and its line."""
    width = f"{100 * (estimate.high - estimate.low) / axis.most:.2f}%"
    band = element("title", f"{name}: {interval(estimate)}")
    yield element("rect", band, x=axis.place(estimate.low), y=0, width=width, height=HEIGHT, class_="band")
    place = axis.place(estimate.value)
    yield element("line", x1=place, x2=place, y1=0, y2=HEIGHT, class_="gate")


def _dot(index: int, value: float, axis: Axis) -> Html:
    lane = MIDDLE + (index % LANES - LANES // 2) * RADIUS * 1.6
    told = element("title", f"sample {index + 1}: {seconds(value)}")
    return element("circle", told, cx=axis.place(value), cy=lane, r=RADIUS, class_="error", fill_opacity=0.6)


def _scale(axis: Axis) -> Html:
    ends = ((0.0, "start"), (axis.most / 2, "middle"), (axis.most, "end"))
    labels = [element("text", seconds(at), x=axis.place(at), y=15, text_anchor=anchor) for at, anchor in ends]
    strip = element("svg", *labels, width="100%", height=24, aria_hidden="true")
    return element("div", element("span", class_="name"), strip, element("span", class_="value"), class_="rung scale")


def _stages(points: Sequence[Point]) -> Iterator[Html]:
    """A bar of each point, parts as long as they take, and the key."""
    longest = max(_total(point) for point in points)
    for point in points:
        bar = element("svg", *_parts(point, Axis(longest)), width="100%", height=MIDDLE, role="img")
        name = element("span", str(point.work), class_="name")
        value = element("span", seconds(_total(point)), class_="value")
        yield element("div", name, bar, value, class_="rung")
    rows = [
        (name, *(f"{seconds(point.stages[name])}, {share(point, name):.0%}" for point in points)) for name in STAGES
    ]
    yield from grid(("median", *(str(point.work) for point in points)), rows)
    yield element("p", *(part for pair in zip(STAGES, COLOURS, strict=True) for part in _key(*pair)))


def _total(point: Point) -> float:
    return sum(point.stages[name] for name in STAGES)


def _parts(point: Point, axis: Axis) -> Iterator[Html]:
    start = 0.0
    for name, colour in zip(STAGES, COLOURS, strict=True):
        took = point.stages[name]
        told = element("title", f"{name}: {seconds(took)}, {share(point, name):.0%}")
        yield element("rect", told, x=axis.place(start), y=2, width=axis.place(took), height=MIDDLE - 4, fill=colour)
        start += took


def _key(name: str, colour: str) -> Iterator[Html]:
    swatch = element("rect", width=10, height=10, y=1, fill=colour)
    yield element("svg", swatch, width=12, height=12, aria_hidden="true")
    yield element("span", f" {name}  ")


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """Where and by what it was measured, a row each."""
    machine, clocks = report.machine, report.points[0].clocks
    memory = "unknown" if machine.memory_gib is None else f"{machine.memory_gib} GiB"
    clock = f"{clocks.governor or 'governor unknown'}, up to {clocks.cpu_most_mhz or 'unknown'} MHz"
    return [
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {report.threads} threads used, {clock}"),
        ("memory", memory),
        ("GPU", "; ".join(machine.gpus) or "none"),
        ("system", machine.system),
        ("bundle", report.bundle.hash),
        *report.versions.items(),
    ]
