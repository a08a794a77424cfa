"""What both demos are made of: requests run in order, each under its title, timed; the clips; the report's parts."""

import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from stiv_deploy.calibration.cli import summary as calibrated
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.stage import calibrate
from stiv_deploy.export.audit.audit import AuditRequest, audit_bundle
from stiv_deploy.export.audit.cli import show as show_audit
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.build import BuildRequest, build_engines
from stiv_deploy.export.engines.cli import show as show_engines
from stiv_deploy.export.parity.cli import show as show_parity
from stiv_deploy.export.parity.files import report_json
from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.command.cli import print_clips
from stiv_deploy.runtime.command.terminal import progress_bar
from stiv_deploy.runtime.files import write_text
from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.stage import ClipsReport, ClipsRequest, make_clips
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.runtime.tensorrt_library import Flavour, missing_library
from stiv_deploy.stiv_ref.data.moving_digits import DIGIT, DIGIT_WORDS, MovingDigits
from stiv_deploy.stiv_ref.digit_canvas import SIZE

BACKEND: Flavour = "tensorrt-rtx"
UPSCALE = 8
STILL = ("three", "left")
"""Digit and direction of the image-to-video clip; the image is a held-out handwriting sample."""
PROMPT = "digit seven moving down"
SEED = 7
FIRST = "first.png"


class Kind(NamedTuple):
    """What is done with a kind of request, how its report is shown, and how it is written as JSON."""

    name: str
    run: Callable[[Any, Progress], Any]
    show: Callable[[Any], None]
    to_json: Callable[[Any], str] = lambda report: report.model_dump_json(indent=1)


KINDS = {
    CalibrationRequest: Kind("calibrate", calibrate, lambda report: typer.echo(calibrated(report))),
    ExportRequest: Kind("export", export_bundle, typer.echo),
    BuildRequest: Kind("build", build_engines, show_engines),
    AuditRequest: Kind("audit", audit_bundle, show_audit, lambda report: report.to_json()),
    ParityRequest: Kind("parity", run_parity, show_parity, report_json),
    ClipsRequest: Kind("generate", make_clips, print_clips, lambda report: report.to_json()),
}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A request under its title, with the words of the command that makes it, and where its report goes as JSON."""

    title: str
    words: tuple[object, ...]
    request: Any
    json: Path | None = None

    @property
    def kind(self) -> Kind:
        """What becomes of the request."""
        return KINDS[type(self.request)]

    @property
    def command(self) -> str:
        """The command, as a user types it."""
        target = () if self.json is None else ("--json", self.json)
        return shlex.join(["stiv", self.kind.name, *map(str, (*self.words, *target))])


@dataclass
class Demo:
    """A demo in the folder ``out``: stages that ran with their seconds, reports by kind, and the gates that failed."""

    out: Path
    checkpoint: Path
    console: Console
    notes: list[str] = field(default_factory=list)
    done: list[tuple[Stage, float]] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run ``stages`` in order. A failed gate is kept in mind and stops nothing, an error ends the demo."""
        for stage in stages:
            self.console.print(f"[bold]{stage.title}[/bold]")
            self.console.print(f"  {stage.command}", highlight=False, markup=False, soft_wrap=True)
            start = time.perf_counter()
            with progress_bar(stage.kind.name) as progress:
                report = stage.kind.run(stage.request, progress)
            seconds = time.perf_counter() - start
            self.done.append((stage, seconds))
            self._keep(stage, report)
            self.console.print(f"  {seconds:.1f} s")

    def _keep(self, stage: Stage, report: Any) -> None:
        """Show the report, and write what belongs to it."""
        stage.kind.show(report)
        self.reports[stage.kind.name] = report
        if stage.json is not None:
            write_text(stage.json, stage.kind.to_json(report) + "\n")
        if not getattr(report, "passed", True):
            self.failed.append(stage.kind.name)
        if isinstance(report, ClipsReport):
            write_pictures(report)

    @property
    def bundle(self) -> Path:
        """Where the bundle is."""
        return self.out / "bundle"

    def builder_missing(self, what: str) -> bool:
        """Whether engines cannot be built here; the report then says why there is no ``what``."""
        reason = missing_library(BACKEND)
        if reason is not None:
            self.notes.append(f"No {what}: {reason}.")
            self.console.print(f"No {what}: {reason}.", highlight=False, markup=False)
        return reason is not None


def build_stage(demo: Demo, sm: str) -> Stage:
    """Engines for the GPU ``sm``."""
    return Stage(
        title=f"TensorRT-RTX engines for SM {sm}, ahead of time",
        words=(demo.bundle, "--backend", BACKEND, "--sm", sm),
        request=BuildRequest(bundle=demo.bundle, backend=BACKEND, sm=sm),
    )


def clip_stages(demo: Demo) -> list[Stage]:
    """One text-to-video and one image-to-video clip, by the torch-free runtime."""
    digit, direction = STILL
    first = demo.out / FIRST
    still: dict[str, Any] = {"prompt": f"digit {digit} moving {direction}", "frames": {0: first}}
    return [
        _clip(demo, "t2v", "text to video", GenerationRequest(prompt=PROMPT, seed=SEED), ()),
        _clip(
            demo,
            "ti2v",
            "text and image to video",
            GenerationRequest(seed=SEED, **still),
            ("--image", first),
        ),
    ]


def _clip(demo: Demo, name: str, what: str, request: GenerationRequest, image: tuple[object, ...]) -> Stage:
    target = demo.out / f"{name}.mp4"
    how = ("--backend", "onnxruntime", "--seed", SEED, "--upscale", UPSCALE, "--out", target)
    return Stage(
        title=f"Generate: {what}",
        words=(demo.bundle, "--prompt", request.prompt, *image, *how),
        request=ClipsRequest(
            bundle=demo.bundle, requests=(request,), out=target, upscale=UPSCALE, backend="onnxruntime"
        ),
    )


def write_pictures(report: ClipsReport) -> None:
    """Beside the clip: a GIF, and its frames in a labelled row."""
    (path,), (request,) = report.written, report.output.requests
    assert isinstance(report.output.frames, np.ndarray)
    assert request.fps is not None
    (frames,) = report.output.frames
    write_video(path.with_suffix(".gif"), frames, request.fps, UPSCALE)
    contact_sheet([frames], [request.prompt], UPSCALE // 2).save(path.with_suffix(".png"))


def write_first_frame(out: Path) -> None:
    """The picture of the image-to-video clip: a digit from the test split at the right edge, ready to move left."""
    digits = MovingDigits("test")
    index = int(np.flatnonzero(digits.labels == DIGIT_WORDS.index(STILL[0]))[0])
    frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    edge = (SIZE - DIGIT) // 2
    frame[edge : edge + DIGIT, SIZE - DIGIT :] = np.round(255 * digits.images[index].numpy())[..., None]
    Image.fromarray(frame).save(out / FIRST)


def report_lines(demo: Demo, title: str) -> list[str]:
    """What ran where and whether its gates passed, notes, the pictures of both clips, commands and their times."""
    gates = f"FAILED: {', '.join(demo.failed)}" if demo.failed else "all gates passed"
    return [
        f"# {title}: {gates}",
        "",
        f"Checkpoint `{demo.checkpoint}`, {platform.machine()}, Python {platform.python_version()}.",
        *(f"\n{note}" for note in demo.notes),
        "",
        f"## Text to video: “{PROMPT}”",
        "![frames](t2v.png)",
        "",
        f"## Image to video: “digit {STILL[0]} moving {STILL[1]}” from ![first frame]({FIRST})",
        "![frames](ti2v.png)",
        "",
        "## Commands",
        "| stage | command | seconds |",
        "|---|---|---:|",
        *(f"| {stage.title} | `{stage.command}` | {seconds:.1f} |" for stage, seconds in demo.done),
        "",
    ]


def finish(demo: Demo, lines: Sequence[str]) -> None:
    """Write ``lines`` as ``report.md``; say how long everything took and what there is to look at."""
    written = demo.out / "report.md"
    write_text(written, "\n".join(lines))
    demo.console.print(f"\n{sum(seconds for _, seconds in demo.done):.0f} s in all. Look at:")
    found = [path for kind in ("mp4", "png", "json") for path in sorted(demo.out.glob(f"*.{kind}"))]
    for path in (written, *found, demo.bundle):
        demo.console.print(f"  {path}", highlight=False)
    if demo.failed:
        demo.console.print(f"[bold]demo FAILED[/bold]: {', '.join(demo.failed)}; see above")
