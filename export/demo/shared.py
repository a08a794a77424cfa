"""What both demos are made of: requests run in order, each under its title, timed; the clips."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from PIL import Image
from rich.console import Console

from stiv_deploy.calibration.cli import summary
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.stage import calibrate
from stiv_deploy.export.audit.audit import AuditRequest, audit_bundle
from stiv_deploy.export.audit.cli import show as show_audit
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.demo.outcomes import audited, built, calibrated, compared, exported, generated
from stiv_deploy.export.engines.build import FP8_SM, BuildRequest, build_engines, resolve_sm
from stiv_deploy.export.engines.cli import show as show_engines
from stiv_deploy.export.engines.cli import sm_name
from stiv_deploy.export.parity.cli import show as show_parity
from stiv_deploy.export.parity.files import report_json
from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.contract import Format
from stiv_deploy.runtime.command.cli import print_clips
from stiv_deploy.runtime.command.terminal import progress_bar
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.files import write_text
from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.stage import ClipsReport, ClipsRequest, make_clips
from stiv_deploy.runtime.pipeline.visible import upscale_for
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.runtime.tensorrt_library import Flavour, import_tensorrt, missing_library
from stiv_deploy.stiv_ref.data.moving_digits import DIGIT, DIGIT_WORDS, MovingDigits
from stiv_deploy.stiv_ref.digit_canvas import SIZE

BACKEND: Flavour = "tensorrt-rtx"
STILL = ("three", "left")
"""Digit and direction of the image-to-video clip; the image is a held-out handwriting sample."""
PROMPT = "digit seven moving down"
SEED = 7
FIRST = "first.png"


class Kind(NamedTuple):
    """What is done with a kind of request, how its report is shown, in words and in a few, and written as JSON."""

    name: str
    run: Callable[[Any, Progress], Any]
    show: Callable[[Any], None]
    outcome: Callable[[Any], str]
    to_json: Callable[[Any], str] = lambda report: report.model_dump_json(indent=1)


KINDS = {
    CalibrationRequest: Kind("calibrate", calibrate, lambda report: typer.echo(summary(report)), calibrated),
    ExportRequest: Kind("export", export_bundle, typer.echo, exported),
    BuildRequest: Kind("build", build_engines, show_engines, built),
    AuditRequest: Kind("audit", audit_bundle, show_audit, audited, lambda report: report.to_json()),
    ParityRequest: Kind("parity", run_parity, show_parity, compared, report_json),
    ClipsRequest: Kind("generate", make_clips, print_clips, generated, lambda report: report.to_json()),
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


class Done(NamedTuple):
    """A stage that ran, its wall seconds and its report."""

    stage: Stage
    seconds: float
    report: Any

    @property
    def passed(self) -> bool:
        """Whether its gates passed; a stage without gates does."""
        return bool(getattr(self.report, "passed", True))


@dataclass
class Demo:
    """A demo in the folder ``out``: the stages that ran, and notes on those that could not."""

    out: Path
    checkpoint: Path
    console: Console
    notes: list[str] = field(default_factory=list)
    done: list[Done] = field(default_factory=list)

    def run(self, stages: Sequence[Stage]) -> None:
        """Run ``stages`` in order. A failed gate is kept in mind and stops nothing, an error ends the demo."""
        for stage in stages:
            self.console.print(f"[bold]{stage.title}[/bold]")
            self.console.print(f"  {stage.command}", highlight=False, markup=False, soft_wrap=True)
            start = time.perf_counter()
            with progress_bar(stage.kind.name) as progress:
                report = stage.kind.run(self._trusting(stage.request), progress)
            seconds = time.perf_counter() - start
            self.done.append(Done(stage, seconds, report))
            self._keep(stage, report)
            self.console.print(f"  {seconds:.1f} s")

    def _trusting(self, request: Any) -> Any:
        """``request``, which hashes no graph again that a stage of this demo has just written."""
        exported = self.reports("export")
        if not isinstance(request, BuildRequest) or not exported:
            return request
        return replace(request, written=exported[-1].manifest)

    def _keep(self, stage: Stage, report: Any) -> None:
        """Show the report, and write what belongs to it."""
        stage.kind.show(report)
        if stage.json is not None:
            write_text(stage.json, stage.kind.to_json(report) + "\n")
        if isinstance(report, ClipsReport):
            write_pictures(report)

    @property
    def failed(self) -> list[str]:
        """Names of the commands whose gates failed."""
        return [each.stage.kind.name for each in self.done if not each.passed]

    def reports(self, name: str) -> list[Any]:
        """What the stages of the command ``name`` reported."""
        return [each.report for each in self.done if each.stage.kind.name == name]

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


def check_sm(sm: str, quantization: Format | None) -> str:
    """``sm`` as requests have it; :class:`BackendError` if the builder that is here builds nothing for such a GPU."""
    name = sm_name(sm)
    if missing_library(BACKEND) is None:
        resolve_sm(import_tensorrt(BACKEND), BACKEND, name)
    if quantization == "fp8" and name.isdecimal() and int(name) < FP8_SM:
        raise BackendError(f"--sm {sm}: no FP8 arithmetic, which begins with SM {FP8_SM}; give --precision int8")
    return name


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
    how = ("--backend", "onnxruntime", "--seed", SEED, "--out", target)
    return Stage(
        title=f"Generate: {what}",
        words=(demo.bundle, "--prompt", request.prompt, *image, *how),
        request=ClipsRequest(bundle=demo.bundle, requests=(request,), out=target, backend="onnxruntime"),
    )


def write_pictures(report: ClipsReport) -> None:
    """Beside the clip: a GIF, and its frames in a labelled row."""
    (path,), (request,) = report.written, report.output.requests
    assert isinstance(report.output.frames, np.ndarray)
    assert request.fps is not None
    (frames,) = report.output.frames
    factor = upscale_for(path, *frames.shape[1:3])
    write_video(path.with_suffix(".gif"), frames, request.fps, factor)
    contact_sheet([frames], [request.prompt], max(1, factor // 2)).save(path.with_suffix(".png"))


def write_first_frame(out: Path) -> None:
    """The picture of the image-to-video clip: a digit from the test split at the right edge, ready to move left."""
    digits = MovingDigits("test")
    index = int(np.flatnonzero(digits.labels == DIGIT_WORDS.index(STILL[0]))[0])
    frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    edge = (SIZE - DIGIT) // 2
    frame[edge : edge + DIGIT, SIZE - DIGIT :] = np.round(255 * digits.images[index].numpy())[..., None]
    Image.fromarray(frame).save(out / FIRST)
