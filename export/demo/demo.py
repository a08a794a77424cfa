"""``stiv demo``, which ``make demo`` runs: from the shipped checkpoint to videos and a report with pictures.

Export, RTX engines for one GPU architecture, the parity ladder, one text-to-video and one image-to-video clip; all of
it lands in one folder, and the report says what was run and what came out.
"""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import typer
from rich.console import Console

CHECKPOINT = Path("checkpoints/tiny")
SM = "89"
UPSCALE = 8
STILL = ("three", "left")
"""Digit and direction of the image-to-video clip; the image is a held-out handwriting sample."""
PROMPT = "digit seven moving down"
SEED = 7


@dataclass
class DemoRun:
    """What the stages hand on: the output folder, seconds by stage, and the facts for the report."""

    out: Path
    console: Console
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    parity: Any = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce and time one stage."""
        self.console.print(f"[bold]{name}[/bold]")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.console.print(f"  {self.seconds[name]:.1f} s")


def export_stage(run: DemoRun, checkpoint: Path) -> None:
    """Checkpoint -> bundle."""
    from stiv_deploy.export.bundle_from_checkpoint import export_bundle
    from stiv_deploy.export.request import ExportRequest

    with run.stage("Export to ONNX, each graph checked against the reference"):
        export_bundle(ExportRequest(checkpoint=checkpoint, out=run.out / "bundle"))


def build_stage(run: DemoRun, sm: str) -> None:
    """Bundle -> engines, where the builder is installed; otherwise the report says why there are none."""
    from stiv_deploy.export.engines.build import BuildRequest, build_engines
    from stiv_deploy.runtime.tensorrt_library import missing_library

    reason = missing_library("tensorrt-rtx")
    if reason is not None:
        run.notes.append(f"No engines were built: {reason}.")
        run.console.print(f"[bold]TensorRT-RTX engines[/bold]: skipped, {reason}")
        return
    with run.stage(f"TensorRT-RTX engines for SM {sm}, ahead of time"):
        build_engines(BuildRequest(bundle=run.out / "bundle", backend="tensorrt-rtx", sm=sm))


def parity_stage(run: DemoRun) -> None:
    """Bundle -> parity.json, and the rows in its manifest."""
    from stiv_deploy.export.parity.files import report_json
    from stiv_deploy.export.parity.stage import ParityRequest, run_parity
    from stiv_deploy.runtime.files import write_text

    with run.stage("Parity with the float64 reference"):
        run.parity = run_parity(ParityRequest(bundle=run.out / "bundle"))
        write_text(run.out / "parity.json", report_json(run.parity) + "\n")


def held_out_image(digit: str) -> np.ndarray:
    """A first frame uint8 [32, 32, 3]: a digit from the test split at the right edge, ready to move left."""
    from stiv_deploy.stiv_ref.data.moving_digits import DIGIT, DIGIT_WORDS, MovingDigits
    from stiv_deploy.stiv_ref.digit_canvas import SIZE

    digits = MovingDigits("test")
    index = int(np.flatnonzero(digits.labels == DIGIT_WORDS.index(digit))[0])
    frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
    edge = (SIZE - DIGIT) // 2
    frame[edge : edge + DIGIT, SIZE - DIGIT :] = np.round(255 * digits.images[index].numpy())[..., None]
    return frame


def generate_stage(run: DemoRun) -> None:
    """Bundle -> one T2V and one TI2V clip as mp4, GIF and contact sheet, by the torch-free runtime."""
    from PIL import Image

    from stiv_deploy.runtime.pipeline.media import contact_sheet, write_video
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

    digit, direction = STILL
    first = run.out / "first.png"
    Image.fromarray(held_out_image(digit)).save(first)
    requests: dict[str, dict[str, Any]] = {
        "t2v": {"prompt": PROMPT},
        "ti2v": {"prompt": f"digit {digit} moving {direction}", "image": first},
    }
    with (
        run.stage("Generate: text to video, and text and image to video"),
        StivPipeline.from_bundle(run.out / "bundle", backend="onnxruntime") as pipe,
    ):
        rate = pipe.bundle.manifest.sampling.frames_per_second
        for name, request in requests.items():
            (frames,) = cast("np.ndarray", pipe(seed=SEED, **request).frames)
            write_video(run.out / f"{name}.mp4", frames, rate, UPSCALE)
            write_video(run.out / f"{name}.gif", frames, rate, UPSCALE)
            contact_sheet([frames], [request["prompt"]], UPSCALE // 2).save(run.out / f"{name}.png")


def clips_section(run: DemoRun, checkpoint: Path) -> list[str]:
    """Lines of a report: what ran where, its notes, and the pictures of both clips."""
    return [
        f"Checkpoint `{checkpoint}`, {platform.machine()}, Python {platform.python_version()}.",
        *(f"\n{note}" for note in run.notes),
        "",
        f"## Text to video: “{PROMPT}”",
        "![frames](t2v.png)",
        "",
        f"## Image to video: “digit {STILL[0]} moving {STILL[1]}” from ![first frame](first.png)",
        "![frames](ti2v.png)",
        "",
    ]


def write_report(run: DemoRun, lines: list[str]) -> Path:
    """Write ``lines`` as ``report.md`` and return its path."""
    path = run.out / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def report(run: DemoRun, checkpoint: Path) -> Path:
    """Write ``report.md`` with the pictures, the timings and the parity table."""
    rows = [
        f"| {row.level} | {row.name} | {row.backend} | {row.rel_l2:.1e} | {plain:.1e} | {row.gate:.1e} | "
        f"{'yes' if row.passed else '**NO**'} |"
        for row, plain in zip(run.parity.rows, run.parity.yardsticks, strict=True)
    ]
    video = [
        f"| {gate.name} | {gate.backend} | {gate.value:.4f} | {gate.gate:.2f} | {'yes' if gate.passed else '**NO**'} |"
        for gate in run.parity.video
    ]
    lines = [
        "# STIV demo",
        "",
        *clips_section(run, checkpoint),
        "## Time",
        "| stage | seconds |",
        "|---|---:|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in run.seconds.items()),
        "",
        f"## Parity: {'passed' if run.parity.passed else 'FAILED'}",
        "Relative L2 error against the float64 reference; *plain torch* is the reference in the bundle's precision.",
        "",
        "| level | name | backend | rel L2 | plain torch | gate | passed |",
        "|---|---|---|---:|---:|---:|---|",
        *rows,
        "",
        "| video gate | backend | value | at least | passed |",
        "|---|---|---:|---:|---|",
        *video,
        "",
    ]
    return write_report(run, lines)


def demo(
    out: Annotated[Path | None, typer.Option(help="Folder for everything. [default: out/demo, out/demo-fp8]")] = None,
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    sm: Annotated[str, typer.Option(help="Compute capability of the engines, without the dot.")] = SM,
    precision: Annotated[str | None, typer.Option(help="fp8 or int8: the chain of a quantized bundle.")] = None,
) -> None:
    """Run the whole chain: export, build, parity, generate, report; with --precision also calibrate and audit."""
    out = out or Path("out/demo" if precision is None else f"out/demo-{precision}")
    passed = _plain(out, checkpoint, sm) if precision is None else _quantized(out, checkpoint, sm, precision)
    if not passed:
        raise typer.Exit(1)


def _plain(out: Path, checkpoint: Path, sm: str) -> bool:
    """The float32 chain in this process; whether its gates passed."""
    out.mkdir(parents=True, exist_ok=True)
    run = DemoRun(out, Console())
    export_stage(run, checkpoint)
    build_stage(run, sm)
    parity_stage(run)
    generate_stage(run)
    finish(run, report(run, checkpoint))
    return bool(run.parity.passed)


def _quantized(out: Path, checkpoint: Path, sm: str, precision: str) -> bool:
    """The 8-bit chain of commands; whether its gates passed."""
    from stiv_deploy.export.demo.quantized import QuantizedDemo, quantized_demo
    from stiv_deploy.export.errors import ExportError
    from stiv_deploy.export.precision import FORMATS

    chosen = next((name for name in FORMATS if name == precision), None)
    if chosen is None:
        raise ExportError(f"--precision {precision}: the demo has {' and '.join(FORMATS)}; leave it out for float32")
    out.mkdir(parents=True, exist_ok=True)
    run = QuantizedDemo(out, Console())
    finish(run, quantized_demo(run, checkpoint, sm, chosen))
    if run.failed:
        run.console.print(f"[bold]demo FAILED[/bold]: {', '.join(run.failed)}; see above")
    return not run.failed


def finish(run: DemoRun, written: Path) -> None:
    """Say how long it took and what there is to look at."""
    run.console.print(f"\n{sum(run.seconds.values()):.0f} s in all. Look at:")
    found = [path for kind in ("mp4", "png", "json") for path in sorted(run.out.glob(f"*.{kind}"))]
    for path in (written, *found, run.out / "bundle"):
        run.console.print(f"  {path}", highlight=False)
