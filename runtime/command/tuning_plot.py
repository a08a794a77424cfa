"""What was tried in tuning as a picture: evaluations of the model against latent error, both on logarithmic axes."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from stiv_deploy.runtime.pipeline.tuning import TuneReport
from stiv_deploy.runtime.sampling.settings import Solver
from stiv_deploy.runtime.sampling.tuning import Point

WIDTH, HEIGHT = 720, 460
LEFT, RIGHT, TOP, BOTTOM = 70, 700, 60, 400
"""Edges of the field that points lie in."""
GREY = "#808080"
LEAST_ERROR = 1e-9
APART = 30
"""Least pixels between the numbers of evaluations that are written below."""
LETTER, GAP = 7, 10
"""Pixels for a letter of 12, of any usual font, and between two names."""


class Series(NamedTuple):
    """Grids that are drawn alike: a solver's, by its own weights or ``fitted`` ones, with ``skips`` or without."""

    solver: Solver
    colour: str
    fitted: bool = False
    skips: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.solver}{', fitted' if self.fitted else ''}{', skips' if self.skips else ''}"

    def has(self, point: Point) -> bool:
        """Whether ``point`` is one of it."""
        own = point.grid.solver, bool(point.grid.solver_weights), bool(point.grid.skipped_steps)
        return own == (self.solver, self.fitted, self.skips)


SERIES = (
    Series(Solver.EULER, "#c0392b"),
    Series(Solver.HEUN, "#b8860b"),
    Series(Solver.AB2, "#1f5fbf"),
    Series(Solver.AB2, "#1e8449", fitted=True),
    Series(Solver.AB2, "#7d3c98", fitted=True, skips=True),
)


class Scale(NamedTuple):
    """Logarithms of values from ``low`` to ``high`` onto pixels from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Where ``value`` lies, in pixels."""
        share = (math.log10(max(value, LEAST_ERROR)) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


def pareto_svg(report: TuneReport) -> str:
    """A whole SVG file; dots are grids that were tried, a line joins the best of each series, a ring is what was."""
    points = (*report.tried, *(each.point for each in report.skips), report.own)
    across, up = _across([each.evaluations for each in points]), _up([*(each.error for each in points)])
    parts = [
        *_frame(sorted({each.evaluations for each in points}), across, up),
        *_reference(report, up),
        *(part for series in SERIES for part in _series(series, points, across, up)),
        _dot(report.own, across, up, 7, f'fill="none" stroke="{GREY}" stroke-width="2"', "the requests' own: "),
        *_words(report, points),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
    return "\n".join([f'{head} font-size="12">', '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def _across(counts: Sequence[int]) -> Scale:
    low, high = math.log10(min(counts)), math.log10(max(counts))
    room = max(0.03, 0.03 * (high - low))
    return Scale(low - room, high + room, LEFT, RIGHT)


def _up(errors: Sequence[float]) -> Scale:
    """Whole powers of ten around all ``errors``; up is large."""
    powers = [math.log10(max(each, LEAST_ERROR)) for each in errors]
    low, high = math.floor(min(powers)), math.ceil(max(powers))
    return Scale(low, max(high, low + 1), BOTTOM, TOP)


def _frame(counts: Sequence[int], across: Scale, up: Scale) -> Iterator[str]:
    """Grid lines with what they stand for; of evaluations, those that were tried and have room."""
    for power in range(int(up.low), int(up.high) + 1):
        y = up(10.0**power)
        yield f'<path d="M{LEFT} {y}H{RIGHT}" stroke="#ddd"/>{_text(LEFT - 8, y + 4, f"1e{power}", "end")}'
    last = -math.inf
    for count in counts:
        x = across(count)
        if x - last >= APART:
            last = x
            yield f'<path d="M{x} {TOP}V{BOTTOM}" stroke="#eee"/>{_text(x, BOTTOM + 18, str(count), "middle")}'


def _reference(report: TuneReport, up: Scale) -> Iterator[str]:
    """Below this line errors say nothing."""
    power = math.log10(max(report.reference_error, LEAST_ERROR))
    if up.low <= power <= up.high:
        y = up(report.reference_error)
        yield f'<path d="M{LEFT} {y}H{RIGHT}" stroke="{GREY}" stroke-dasharray="5 4"/>'
        yield _text(RIGHT, y - 5, "error of the reference", "end", GREY)


def _series(series: Series, points: Sequence[Point], across: Scale, up: Scale) -> Iterator[str]:
    """Dots of all its grids, and a line through the best of each number of evaluations."""
    mine = sorted((each for each in points if series.has(each)), key=lambda each: each.evaluations)
    best = {each.evaluations: each for each in sorted(mine, key=lambda each: each.tried, reverse=True)}
    line = " ".join(f"{across(count)},{up(best[count].error)}" for count in sorted(best))
    yield f'<polyline points="{line}" fill="none" stroke="{series.colour}" stroke-width="2"/>'
    for each in mine:
        yield _dot(each, across, up, 4 if best[each.evaluations] == each else 2, f'fill="{series.colour}"')


def _dot(point: Point, across: Scale, up: Scale, radius: int, style: str, words: str = "") -> str:
    grid = point.grid
    title = f"{words}{grid.solver}, {grid.steps} steps, {grid.times}: {point.error:.2e}"
    place = f'cx="{across(point.evaluations)}" cy="{up(point.error)}" r="{radius}"'
    return f"<circle {place} {style}><title>{escape(title)}</title></circle>"


def _words(report: TuneReport, points: Sequence[Point]) -> Iterator[str]:
    """Title, names of the axes, and which colour is which solver."""
    clips = f"bundle {report.bundle[:12]}, {report.clips} clips"
    yield _text(LEFT, 22, f"Relative L2 error of latents against the exact flow ({clips})")
    yield _text((LEFT + RIGHT) / 2, HEIGHT - 18, "evaluations of the model, guidance branches counted as one", "middle")
    x = LEFT
    for series in SERIES:
        if any(map(series.has, points)):
            yield _text(x, 44, series.name, colour=series.colour)
            x += LETTER * len(series.name) + GAP
    yield _text(RIGHT, 44, "large: best times; ring: the requests' own", "end", GREY)


def _text(x: float, y: float, words: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'
