"""A report of recorded values as a page: nothing else is needed, all text is escaped, dots lie as errors do."""

import base64
import dataclasses
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.export.demo.ladder_plot import Axis, axis_of
from stiv_deploy.export.demo.report import DemoReport, ShownClip, ShownStage, report_page, size_text
from stiv_deploy.export.demo.shown import EDGE, GIVEN, tasks_sheet
from stiv_deploy.export.parity.ladder import ParityReport, VideoGate
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.command.html import POLICY, VOID, element

HOSTILE = "<script>alert(\"1\")</script> & 'more'"
ERRORS = {
    ("op", "text_encoder.states"): (2.1e-7, 1.9e-7, 6.2e-7),
    ("op", "embed.hidden"): (9.3e-8, 8.8e-8, 4.1e-7),
    ("op", "decoder.video"): (5.1e-7, 5.0e-7, 1.2e-6),
    ("block", "block_00"): (3.1e-7, 2.9e-7, 8.2e-7),
    ("block", "block_01"): (0.0, 2.9e-7, 8.2e-7),
    ("step", "t2v, jit"): (8.3e-7, 7.1e-7, 1.7e-6),
    ("teacher_forced", "t2v, jit"): (2.4e-6, 2.2e-6, 4.6e-6),
    ("free_run", "t2v, jit"): (3.9e-5, 1.9e-5, 7.6e-5),
    ("direct_block", "block_00"): (2.1e-3, 2.0e-3, 4.2e-3),
}


def clip(frames: int = 8, size: int = 32) -> np.ndarray:
    """A bright bar that moves right, uint8 [F, H, W, 3]."""
    made = np.zeros((frames, size, size, 3), np.uint8)
    for index in range(frames):
        made[index, 8:24, 3 * index + 1 : 3 * index + 7] = (240, 240, 200)
    return made


def parity(worse: float = 1.0) -> ParityReport:
    """A ladder on two backends whose errors are ``worse`` times those recorded."""
    rows = [
        ParityRow(
            level=level,
            name=name,
            backend=backend,
            precision="float32",
            rel_l2=error * worse,
            max_abs=error,
            gate=gate,
            passed=error * worse <= gate,
        )
        for backend in ("onnxruntime", "tensorrt-rtx")
        for (level, name), (error, _, gate) in ERRORS.items()
    ]
    plain = [plain for _ in range(2) for _, plain, _ in ERRORS.values()]
    gates = (VideoGate("t2v, jit: finite share", "onnxruntime", 1.0, 1.0),)
    return ParityReport(rows=tuple(rows), yardsticks=tuple(plain), video=gates)


def report(worse: float = 1.0, prompt: str = "a cyan ring moving down") -> DemoReport:
    """All sections filled."""
    ladder = parity(worse)
    failed = () if ladder.passed else ("parity",)
    stages = (
        ShownStage(title="Export", command="stiv export a --out 'b c'", outcome="19 graphs, 17.5 MB", seconds=21.3),
        ShownStage(title="Parity", command="stiv parity b", outcome="18 errors", seconds=95.1, passed=not failed),
        ShownStage(title="Generate", command="stiv generate b", outcome="t2v.mp4 in 1.2 s", seconds=2.9),
    )
    return DemoReport(
        title="STIV demo",
        checkpoint="checkpoints/world",
        date="2026-11-28",
        failed=failed,
        notes=("No engines were built: tensorrt_rtx is not installed.",),
        clips=(
            ShownClip(title="Text to video", prompt=prompt, frames=clip(), fps=8, facts="seed 7"),
            ShownClip(
                title="Image to video", prompt=prompt, frames=clip(), fps=8, facts="seed 7", given=frozenset({0})
            ),
        ),
        parity=ladder,
        stages=stages,
        sizes=(("checkpoints/world", 8_204_000), ("t2v.mp4", 11_300)),
        machine=(("CPU", "Some processor at 2.60GHz, 2 cores"), ("Python", "3.11.7")),
        following=(("See what is in the bundle:", "stiv inspect out/demo/bundle"),),
    )


class Page(HTMLParser):
    """Elements of a page with their attributes, and its text; that they are closed in order is asserted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, kind: str = "") -> list[dict[str, str]]:
        """Attributes of each ``tag`` of the class ``kind``."""
        kinds = [(name, found, found.get("class", "").split(" ")) for name, found in self.elements]
        return [found for name, found, has in kinds if name == tag and (not kind or kind in has)]


@pytest.fixture(scope="module")
def shown() -> Page:
    return Page(report_page(report()))


def decoded(uri: str) -> Image.Image:
    """The picture in a data address."""
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(";base64,")[2])))


def test_nothing_is_loaded_from_elsewhere(shown: Page) -> None:
    links = [found[key] for _, found in shown.elements for key in ("src", "href", "srcset") if key in found]
    assert len(links) > 16
    assert all(link.startswith("data:") for link in links)
    assert not {"script", "iframe", "object"} & {name for name, _ in shown.elements}
    assert {"http-equiv": "Content-Security-Policy", "content": POLICY} in [found for _, found in shown.elements]
    style = shown.text[: shown.text.index("STIV demo", 20)]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_all_text_is_escaped() -> None:
    page = Page(report_page(report(prompt=HOSTILE)))
    assert page.text.count(HOSTILE) == 2
    assert page.all("script") == []
    assert [found["alt"] for found in page.all("img", "pixels")].count(HOSTILE) == 2
    assert Page(element("p", HOSTILE, title=HOSTILE)).elements == [("p", {"title": HOSTILE})]


def test_the_clip_moves_and_is_exact(shown: Page) -> None:
    moving = decoded(next(found["src"] for found in shown.all("img") if "image/webp" in found["src"]))
    assert (getattr(moving, "n_frames", 1), moving.info["loop"]) == (8, 0)
    stills = [decoded(found["src"]) for found in shown.all("img") if found["alt"].startswith("frame ")]
    for index, frame in enumerate(clip()):
        moving.seek(index)
        moving.load()
        assert np.array_equal(np.asarray(moving.convert("RGB")), frame)
        assert np.array_equal(np.asarray(stills[index]), frame)
        assert moving.info["duration"] == 125


def test_small_clips_are_enlarged_with_hard_pixels_and_given_frames_are_marked(shown: Page) -> None:
    first = next(found for found in shown.all("img", "pixels") if "webp" in found["src"])
    assert (first["width"], first["height"]) == ("256", "256")
    assert ".pixels { image-rendering: pixelated" in shown.text
    assert len(shown.all("li", "given")) == 1
    assert "0, given" in shown.text


def test_all_tasks_are_on_one_sheet_with_given_frames_marked() -> None:
    made = report()
    longer = ShownClip(title="Longer", prompt="p", frames=clip(11), fps=8, facts="", given=frozenset(range(0, 11, 2)))
    sheet = tasks_sheet([*made.clips, longer])
    assert sheet is not None
    assert tasks_sheet([]) is None
    marks = (sheet == GIVEN).all(-1)
    ring = 4 * EDGE * (32 + EDGE)
    assert marks.sum() == (1 + 6) * ring  # the first frame of the second clip, every other one of the third
    top, left = np.argwhere(marks)[0] + EDGE
    assert np.array_equal(sheet[top : top + 32, left : left + 32], made.clips[1].frames[0])
    page = Page(report_page(dataclasses.replace(made, sheet=sheet)))
    (picture,) = [found for found in page.all("img") if found["alt"] == "all clips, a row each"]
    assert np.array_equal(np.asarray(decoded(picture["src"])), sheet)


@pytest.mark.parametrize("worse", [1.0, 2.5, math.nan, math.inf])
def test_a_dot_lies_beyond_its_gate_just_where_it_failed(worse: float) -> None:
    page = Page(report_page(report(worse)))
    gates = [float(found["x1"].rstrip("%")) for found in page.all("line", "gate")]
    dots = [float(found["cx"].rstrip("%")) for found in page.all("circle", "error")]
    rows = parity(worse).rows
    assert len(gates) == len(dots) == len(rows)
    by_gate = sorted(not row.passed for row in rows)
    assert sorted(dot > gate for dot, gate in zip(dots, gates, strict=True)) == by_gate
    assert len(page.all("div", "missed")) == sum(by_gate)
    assert ("FAILED: parity" in page.text) == any(by_gate)


@given(
    st.lists(st.floats(1e-30, 1e30), min_size=1), st.floats(1e-30, 1e30), st.sampled_from([0.0, -1.0, math.inf, 1e-300])
)
def test_places_are_ordered_as_values_are(known: list[float], value: float, odd: float) -> None:
    axis = axis_of([*known, odd])
    places = [float(axis.place(each).rstrip("%")) for each in sorted([*known, value])]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 100


def test_places_by_hand() -> None:
    axis = axis_of([2e-7, 3e-5])
    assert axis == Axis(-7, -4)
    assert [axis.place(value) for value in (1e-7, 1e-6, 1e-4)] == ["0.00%", "33.33%", "100.00%"]
    assert [axis.place(value) for value in (0.0, math.nan, math.inf)] == ["0.00%", "100%", "100%"]


def test_what_is_not_there_has_no_section() -> None:
    page = Page(report_page(DemoReport(title="Demo", checkpoint="c", date="2026-11-28")))
    assert page.all("section") == []
    assert "all gates passed" in page.text


def test_sizes_have_the_unit_that_suits_them() -> None:
    assert (size_text(512), size_text(3 * 2**20)) == ("0.5 KiB", "3.0 MiB")
