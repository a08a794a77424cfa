"""The parity ladder as a picture: every error on a logarithmic axis, before the gate that it must not pass.

Each row is an SVG whose places are shares of its width, so that the picture fits any screen while its words keep their
size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from stiv_deploy.export.parity.ladder import DIRECT, ParityReport
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.command.html import Html, element

LEVELS = {
    "op": "single graphs",
    "block": "blocks",
    "step": "the first step",
    "teacher_forced": "steps from the reference's latents",
    "free_run": "whole runs",
}
HEIGHT, MIDDLE, RADIUS = 22, 11, 4.5
"""Pixels: of a strip, its middle line, and of a dot."""
MOST_LABELS = 7


class Axis(NamedTuple):
    """Powers of ten, from the first to the last, over the width of a strip."""

    first: int
    last: int

    def place(self, value: float) -> str:
        """Where ``value`` is, as a share of the width; what lies beyond an end, or is no number, is at that end."""
        if math.isnan(value) or value == math.inf:
            return "100%"
        power = math.log10(value) if value > 0 else -math.inf
        share = (power - self.first) / (self.last - self.first)
        return f"{100 * min(max(share, 0.0), 1.0):.2f}%"

    @property
    def powers(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)


def axis_of(values: Sequence[float]) -> Axis:
    """The powers of ten around all positive, finite ``values``; of none, one either side of 1."""
    powers = [math.log10(value) for value in values if 0 < value < math.inf]
    if not powers:
        return Axis(-1, 1)
    first, last = math.floor(min(powers)), math.ceil(max(powers))
    return Axis(first, max(last, first + 1))


class Rung(NamedTuple):
    """A row of the ladder, and what plain PyTorch loses there."""

    row: ParityRow
    plain: float


def ladder_plot(report: ParityReport) -> Iterator[Html]:
    """For each backend its errors, level by level."""
    rungs = [Rung(*pair) for pair in zip(report.rows, report.yardsticks, strict=True)]
    axis = axis_of([value for row, plain in rungs for value in (row.rel_l2, plain, row.gate)])
    for backend in dict.fromkeys(rung.row.backend for rung in rungs):
        mine = [rung for rung in rungs if rung.row.backend == backend]
        levels = [part for level in _levels(mine) for part in _level(level, mine, axis)]
        yield element("h3", f"{backend}, {mine[0].row.precision}")
        yield element("p", _nearest([rung.row for rung in mine]))
        yield element("div", _scale(axis), *levels, class_="ladder")


def _levels(rungs: Sequence[Rung]) -> list[str]:
    """The levels, those against the fake-quantized reference last."""
    return sorted(dict.fromkeys(rung.row.level for rung in rungs), key=lambda level: level.startswith(DIRECT))


def _nearest(rows: Sequence[ParityRow]) -> str:
    """Which error comes nearest to its gate, in words."""
    worst = max(rows, key=lambda row: math.inf if math.isnan(row.rel_l2) else row.rel_l2 / row.gate)
    return f"Nearest to its gate: {worst.name} ({_title(worst.level)}), {worst.rel_l2 / worst.gate:.0%} of it."


def _title(level: str) -> str:
    plain = level.removeprefix(DIRECT)
    words = LEVELS.get(plain, plain.replace("_", " "))
    return words if plain == level else f"{words}, against the fake-quantized reference"


def _level(level: str, rungs: Sequence[Rung], axis: Axis) -> Iterator[Html]:
    yield element("h4", _title(level))
    for rung in rungs:
        if rung.row.level == level:
            yield _row(rung, axis)


def _row(rung: Rung, axis: Axis) -> Html:
    row = rung.row
    said = (
        f"{row.rel_l2:.1e}" if row.rel_l2 else "0",
        f" of {row.gate:.1e}" if row.passed else f" misses {row.gate:.1e}",
    )
    return element(
        "div",
        element("span", row.name, class_="name"),
        _strip(rung, axis),
        element("span", element("b", said[0]), said[1], class_="value"),
        class_="rung" if row.passed else "rung missed",
    )


def _strip(rung: Rung, axis: Axis) -> Html:
    """Grid, what is beyond the gate, the gate, plain PyTorch as a ring, the error as a dot."""
    row, gate = rung.row, axis.place(rung.row.gate)
    words = f"{row.name}: {row.rel_l2:.2e}; plain PyTorch {rung.plain:.2e}; gate {row.gate:.2e}"
    beyond = f"{100 - float(gate.rstrip('%')):.2f}%"
    return element(
        "svg",
        element("title", words),
        *(_line(axis.place(10.0**power), "grid") for power in axis.powers),
        element("rect", x=gate, y=0, width=beyond, height=HEIGHT, class_="beyond"),
        _line(gate, "gate"),
        element("circle", cx=axis.place(rung.plain), cy=MIDDLE, r=RADIUS, class_="plain"),
        element("circle", cx=axis.place(row.rel_l2), cy=MIDDLE, r=RADIUS, class_="error"),
        width="100%",
        height=HEIGHT,
        role="img",
    )


def _line(place: str, kind: str) -> Html:
    return element("line", x1=place, x2=place, y1=0, y2=HEIGHT, class_=kind)


def _scale(axis: Axis) -> Html:
    """The powers of ten above the strips, so many that they have room."""
    every = -(-len(axis.powers) // MOST_LABELS)
    labels = [
        element("text", f"1e{power}", x=axis.place(10.0**power), y=15, text_anchor=_anchor(power, axis))
        for power in axis.powers[::every]
    ]
    strip = element("svg", *labels, width="100%", height=HEIGHT, aria_hidden="true")
    return element("div", element("span", class_="name"), strip, element("span", class_="value"), class_="rung scale")


def _anchor(power: int, axis: Axis) -> str:
    return {axis.first: "start", axis.last: "end"}.get(power, "middle")
