"""The report of a demo: what ran where, its clips, errors before their gates, times and sizes, as one HTML page.

It is made of values alone, and whoever gets it needs nothing else: pictures, clips and style are in it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from stiv_deploy.export.demo.ladder_plot import ladder_plot
from stiv_deploy.export.demo.shown import ShownClip
from stiv_deploy.export.parity.ladder import ParityReport
from stiv_deploy.runtime.command.html import Html, data_uri, element, grid, joined, page, png_uri, section
from stiv_deploy.runtime.pipeline.animations import webp

MIB, KIB = 2**20, 2**10
CLIP_WIDTH = 256
"""Least CSS pixels of a clip's width, where the screen has them."""
LEGEND = (
    "Relative L2 error against the float64 reference, on a logarithmic axis: ",
    *(element("span", class_="key error"), " the bundle, "),
    *(element("span", class_="key plain"), " plain PyTorch in its precision, "),
    *(element("span", class_="key gate"), " the gate, and beyond it what fails."),
)


@dataclass(frozen=True, kw_only=True)
class ShownStage:
    """A stage that ran: the command that does the same, what came out, wall seconds, and whether its gates passed."""

    title: str
    command: str
    outcome: str
    seconds: float
    passed: bool = True


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """All that the page shows; ``sizes`` are bytes, ``following`` pairs of what a command does and the command.

    ``sheet``, uint8 [H, W, 3], is all clips in one picture.
    """

    title: str
    checkpoint: str
    date: str
    failed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    clips: tuple[ShownClip, ...] = ()
    sheet: np.ndarray | None = None
    parity: ParityReport | None = None
    stages: tuple[ShownStage, ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()
    machine: tuple[tuple[str, str], ...] = ()
    following: tuple[tuple[str, str], ...] = ()


def report_page(report: DemoReport) -> str:
    """``report`` as a whole HTML document; what is not there has no section."""
    verdict = _verdict(report)
    return page(
        f"{report.title}: {verdict}",
        _header(report, verdict),
        *section("All tasks", *_sheet(report.sheet)),
        *section("Clips", *map(_clip, report.clips)),
        *section("Parity", *_parity(report.parity)),
        *section("Stages", *_stages(report.stages)),
        *section("Sizes", *grid(("what", "size"), [(what, size_text(size)) for what, size in report.sizes])),
        *section("Machine and versions", *grid(("", ""), report.machine)),
        *section("What next", *(_next(*each) for each in report.following)),
    )


def size_text(count: int) -> str:
    """Bytes, in the unit that suits them."""
    return f"{count / MIB:.1f} MiB" if count >= MIB else f"{count / KIB:.1f} KiB"


def _verdict(report: DemoReport) -> str:
    return f"FAILED: {', '.join(report.failed)}" if report.failed else "all gates passed"


def _header(report: DemoReport, verdict: str) -> Html:
    badge = element("span", verdict, class_="badge missed" if report.failed else "badge")
    total = sum(stage.seconds for stage in report.stages)
    facts = f"Checkpoint {report.checkpoint}, {report.date}, {total:.0f} s in all."
    notes = (element("p", note, class_="note") for note in report.notes)
    return element("header", element("h1", report.title, " ", badge), element("p", facts), *notes)


def _sheet(sheet: np.ndarray | None) -> Iterator[Html]:
    if sheet is not None:
        yield element("p", "A row for each, frame by frame; what was given has a blue edge.")
        picture = element("img", src=png_uri(sheet), alt="all clips, a row each", width=sheet.shape[1])
        yield element("div", picture, class_="wide")


def _clip(clip: ShownClip) -> Html:
    """The clip moving, and still: its first frame where motion is not wanted, then all frames in rows that wrap."""
    stills = [png_uri(frame) for frame in clip.frames]
    _, height, width, _ = clip.frames.shape
    quiet = element("source", srcset=stills[0], media="(prefers-reduced-motion: reduce)")
    moving = data_uri("image/webp", webp(clip.frames, clip.fps, None))
    shown = max(width, CLIP_WIDTH)
    large = element("img", src=moving, alt=clip.prompt, class_="pixels", width=shown, height=shown * height // width)
    frames = [_frame(clip.label(index), still, index in clip.given) for index, still in enumerate(stills)]
    about = element("figcaption", element("b", f"“{clip.prompt}”"), element("span", clip.facts))
    return element(
        "div",
        element("h3", clip.title),
        element("figure", element("picture", quiet, large), about, element("ol", *frames, class_="frames")),
        class_="clip",
    )


def _frame(label: str, still: str, given: bool) -> Html:
    picture = element("img", src=still, alt=f"frame {label}", class_="pixels")
    return element("li", picture, element("span", label), class_="given" if given else "made")


def _parity(report: ParityReport | None) -> Iterator[Html]:
    if report is not None:
        yield element("p", *LEGEND)
        yield from ladder_plot(report)
        gates = [
            (gate.name, gate.backend, f"{gate.value:.4f}", f"{gate.gate:.2f}", "yes" if gate.passed else "NO")
            for gate in report.video
        ]
        if gates:
            yield element("h3", "Properties of the videos")
        yield from grid(("video", "backend", "value", "at least", "passed"), gates)


def _stages(stages: Sequence[ShownStage]) -> Iterator[Html]:
    """Each with its command, and a bar of its share of the time."""
    longest = max((stage.seconds for stage in stages), default=0.0)
    for stage in stages:
        share = f"width:{100 * stage.seconds / longest if longest else 0:.1f}%"
        failed = "" if stage.passed else element("span", "FAILED", class_="badge missed")
        yield element(
            "div",
            element("h3", stage.title, " ", failed),
            element("div", element("div", class_="bar", style=share), class_="bars"),
            element("p", element("b", f"{stage.seconds:.1f} s"), f"  {stage.outcome}"),
            _command(stage.command),
            class_="stage",
        )


def _next(what: str, command: str) -> Html:
    return joined(element("p", what), _command(command))


def _command(text: str) -> Html:
    return element("pre", element("code", text))
