"""The end of a demo: its report, and what there is to look at."""

import shlex
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from stiv_deploy.export.demo.machine import machine
from stiv_deploy.export.demo.report import DemoReport, ShownStage, report_page
from stiv_deploy.export.demo.shared import BACKEND, Demo, Done
from stiv_deploy.export.demo.shown import shown_clip, tasks_sheet
from stiv_deploy.runtime.files import replaced_file, write_text

REPORT, SHEET = "report.html", "tasks.png"


def finish(demo: Demo, title: str) -> None:
    """Write the sheet and the report, each whole or not at all; say how long it took and what there is to look at."""
    written, report = demo.out / REPORT, demo_report(demo, title)
    if report.sheet is not None:
        with replaced_file(demo.out / SHEET) as temporary:
            Image.fromarray(report.sheet).save(temporary, "PNG")
    write_text(written, report_page(report))
    demo.console.print(f"\n{sum(each.seconds for each in demo.done):.0f} s in all. Look at:")
    found = [path for kind in ("mp4", "png", "json") for path in sorted(demo.out.glob(f"*.{kind}"))]
    for path in (written, *found, demo.bundle):
        demo.console.print(f"  {path}", highlight=False)
    if demo.failed:
        demo.console.print(f"[bold]demo FAILED[/bold]: {', '.join(demo.failed)}; see above")


def demo_report(demo: Demo, title: str) -> DemoReport:
    """What the report of ``demo`` shows, now."""
    clips = tuple(filter(None, (shown_clip(done.report) for done in demo.done)))
    return DemoReport(
        title=title,
        checkpoint=str(demo.checkpoint),
        date=datetime.now(UTC).date().isoformat(),
        failed=tuple(demo.failed),
        notes=tuple(demo.notes),
        clips=clips,
        sheet=tasks_sheet(clips),
        parity=next(iter(demo.reports("parity")), None),
        stages=tuple(map(_stage, demo.done)),
        sizes=tuple(_sizes(demo)),
        machine=tuple(machine()),
        following=tuple(following(demo)),
    )


def _stage(done: Done) -> ShownStage:
    stage = done.stage
    outcome = stage.kind.outcome(done.report)
    return ShownStage(
        title=stage.title, command=stage.command, outcome=outcome, seconds=done.seconds, passed=done.passed
    )


def _sizes(demo: Demo) -> Iterator[tuple[str, int]]:
    """Bytes of the checkpoint, the bundle without and with its engines, and each file beside it."""
    yield str(demo.checkpoint), _bytes(demo.checkpoint.rglob("*"))
    inside = list(demo.bundle.rglob("*"))
    engines = [path for path in inside if path.suffix == ".engine"]
    if inside:
        yield "bundle: graphs, weights, tokenizer", _bytes(inside) - _bytes(engines)
    if engines:
        yield f"bundle: {len(engines)} engines", _bytes(engines)
    for path in sorted(demo.out.glob("*.*")):
        if path.is_file() and path.name not in (REPORT, SHEET):
            yield path.name, path.stat().st_size


def _bytes(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def following(demo: Demo) -> Iterator[tuple[str, str]]:
    """What to do next, and the command for it."""
    bundle = str(demo.bundle)
    yield "Make another clip:", _stiv("generate", bundle, "--prompt", "a green ring moves left", "--out", "ring.mp4")
    yield "See what is in the bundle:", _stiv("inspect", bundle)
    yield "Build engines for another GPU:", _stiv("build", bundle, "--backend", BACKEND, "--sm", "120")
    yield "Train a model of your own:", _stiv("train", "recipes/tiny.toml", "--out", "runs/tiny")


def _stiv(*words: str) -> str:
    return shlex.join(["stiv", *words])
