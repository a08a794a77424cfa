"""What both demos are made of: requests run in order, each under its title, timed."""

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich.console import Console

from stiv_deploy.calibration.cli import summary
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.stage import calibrate
from stiv_deploy.export.audit.audit import AuditRequest, audit_bundle
from stiv_deploy.export.audit.cli import show as show_audit
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.demo.outcomes import (
    audited,
    built,
    calibrated,
    compared,
    exported,
    generated,
    prolonged,
    turned,
)
from stiv_deploy.export.demo.shown import shown_clip, write_pictures
from stiv_deploy.export.engines.build import BuildRequest, build_engines, format_fault, resolve_sm
from stiv_deploy.export.engines.cli import show as show_engines
from stiv_deploy.export.engines.cli import sm_name
from stiv_deploy.export.parity.cli import show as show_parity
from stiv_deploy.export.parity.files import report_json
from stiv_deploy.export.parity.stage import ParityRequest, run_parity
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.contract import Format
from stiv_deploy.runtime.bundle.manifest import PORTABLE
from stiv_deploy.runtime.command.cli import print_clips
from stiv_deploy.runtime.command.long_clips import print_long
from stiv_deploy.runtime.command.terminal import progress_bar
from stiv_deploy.runtime.command.views import print_views
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.files import write_text
from stiv_deploy.runtime.pipeline.long_stage import LongRequest, make_long
from stiv_deploy.runtime.pipeline.stage import ClipsRequest, make_clips
from stiv_deploy.runtime.pipeline.views_stage import ViewsRequest, make_views
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.runtime.tensorrt_library import Flavour, import_tensorrt, missing_library

BACKEND: Flavour = "tensorrt-rtx"


class Kind(NamedTuple):
    """What is done with a kind of request, how its report is shown, in words and in a few, and written as JSON."""

    name: str
    run: Callable[[Any, Progress], Any]
    show: Callable[[Any], None]
    outcome: Callable[[Any], str]
    to_json: Callable[[Any], str] = lambda report: report.model_dump_json(indent=1)


def _as_json(report: Any) -> str:
    return str(report.to_json())


KINDS = {
    CalibrationRequest: Kind("calibrate", calibrate, lambda report: typer.echo(summary(report)), calibrated),
    ExportRequest: Kind("export", export_bundle, typer.echo, exported),
    BuildRequest: Kind("build", build_engines, show_engines, built),
    AuditRequest: Kind("audit", audit_bundle, show_audit, audited, _as_json),
    ParityRequest: Kind("parity", run_parity, show_parity, compared, report_json),
    ClipsRequest: Kind("generate", make_clips, print_clips, generated, _as_json),
    LongRequest: Kind("long", make_long, print_long, prolonged, _as_json),
    ViewsRequest: Kind("views", make_views, print_views, turned, _as_json),
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
    def name(self) -> str:
        """The command's name; long videos have three."""
        return getattr(self.request, "task", self.kind.name)

    @property
    def command(self) -> str:
        """The command, as a user types it."""
        target = () if self.json is None else ("--json", self.json)
        return shlex.join(["stiv", self.name, *map(str, (*self.words, *target))])


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
            with progress_bar(stage.name) as progress:
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
        clip = shown_clip(report)
        if clip is not None:
            write_pictures(clip, stage.request.out)

    @property
    def failed(self) -> list[str]:
        """Names of the commands whose gates failed."""
        return [each.stage.name for each in self.done if not each.passed]

    def reports(self, name: str) -> list[Any]:
        """What the stages of the command ``name`` reported."""
        return [each.report for each in self.done if each.stage.name == name]

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
    known = quantization is not None and (name.isdecimal() or name == PORTABLE)
    fault = format_fault(quantization, name) if quantization is not None and known else None
    if fault is not None:
        raise BackendError(f"--sm {sm}: no {fault[0]}; give --precision {fault[1]}")
    return name


def build_stage(demo: Demo, sm: str) -> Stage:
    """Engines for the GPU ``sm``."""
    return Stage(
        title=f"TensorRT-RTX engines for SM {sm}, ahead of time",
        words=(demo.bundle, "--backend", BACKEND, "--sm", sm),
        request=BuildRequest(bundle=demo.bundle, backend=BACKEND, sm=sm),
    )
