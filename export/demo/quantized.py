"""``stiv demo --precision fp8|int8``: the commands of a quantized bundle in a row, as a user would type them.

Calibrate, export, build, audit, parity, generate; each is a process of its own, timed, with its output as it comes. A
failed gate (audit or parity) does not stop the rest, so that the folder holds everything that there is to look at.
"""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from stiv_deploy.export.demo.demo import (
    PROMPT,
    SEED,
    STILL,
    UPSCALE,
    DemoRun,
    clips_section,
    held_out_image,
    write_report,
)
from stiv_deploy.export.errors import StageError
from stiv_deploy.runtime.bundle.contract import Format
from stiv_deploy.runtime.tensorrt_library import Flavour, missing_library

BACKEND: Flavour = "tensorrt-rtx"
GATES = ("audit", "parity")
"""Commands that exit with 1 when something was measured and found wanting."""
FAILED = 1
TITLES = {
    "calibrate": "Calibrate: ranges from the reference's sampling loop",
    "export": "Export to ONNX with Q/DQ, each graph checked against the fake-quantized reference",
    "build": "TensorRT-RTX engines, ahead of time",
    "audit": "Fusion audit: 8-bit products and fused attention in every block",
    "parity": "Parity with the float64 and the fake-quantized reference",
    "generate": "Generate",
}


@dataclass
class QuantizedDemo(DemoRun):
    """A demo of commands; ``commands`` are those run, by the name of their stage, ``failed`` the gates that did."""

    commands: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    def stiv(self, command: str, *arguments: object, note: str = "") -> None:
        """Run one command; :class:`StageError` if it fails for another reason than a gate."""
        words = [command, *map(str, arguments)]
        name = f"{TITLES[command]}{note}"
        self.commands[name] = f"stiv {' '.join(words)}"
        with self.stage(name):
            self.console.print(f"  {self.commands[name]}", highlight=False, markup=False, soft_wrap=True)
            done = subprocess.run([sys.executable, "-m", "stiv_deploy.runtime.command.main", *words], check=False)
        if done.returncode == FAILED and command in GATES:
            self.failed.append(command)
        elif done.returncode:
            raise StageError(command, done.returncode)


def quantized_demo(run: QuantizedDemo, checkpoint: Path, sm: str, quantization: Format) -> Path:
    """Run everything into ``run.out`` and return the report; ``run.failed`` has the gates that failed."""
    out = run.out
    bundle, scales = out / "bundle", out / "scales.safetensors"
    run.stiv("calibrate", checkpoint, "--precision", quantization, "--out", scales)
    run.stiv("export", checkpoint, "--precision", quantization, "--scales", scales, "--out", bundle)
    reason = missing_library(BACKEND)
    if reason is None:
        run.stiv("build", bundle, "--backend", BACKEND, "--sm", sm)
        run.stiv("audit", bundle, "--backend", BACKEND, "--sm", sm, "--json", out / "audit.json")
    else:
        run.notes.append(f"No engines were built or audited: {reason}.")
        run.console.print(f"[bold]Engines and audit[/bold]: skipped, {reason}")
    run.stiv("parity", bundle, "--checkpoint", checkpoint, "--scales", scales, "--json", out / "parity.json")
    _generate(run, bundle)
    return report(run, checkpoint, quantization)


def _generate(run: QuantizedDemo, bundle: Path) -> None:
    """One T2V and one TI2V clip as mp4, and as a row of frames."""
    digit, direction = STILL
    first = run.out / "first.png"
    Image.fromarray(held_out_image(digit)).save(first)
    common = ("--backend", "onnxruntime", "--seed", SEED, "--upscale", UPSCALE)
    prompts: dict[str, tuple[object, ...]] = {
        "t2v": ("--prompt", PROMPT),
        "ti2v": ("--prompt", f"digit {digit} moving {direction}", "--image", first),
    }
    for name, asked in prompts.items():
        for kind in ("mp4", "png"):
            target = run.out / f"{name}.{kind}"
            run.stiv("generate", bundle, *asked, *common, "--out", target, note=f": {target.name}")


def report(run: QuantizedDemo, checkpoint: Path, quantization: Format) -> Path:
    """Write ``report.md``: the clips, the commands and their times, and what failed."""
    gates = f"FAILED: {', '.join(run.failed)}" if run.failed else "all gates passed"
    lines = [
        f"# STIV demo, {quantization}: {gates}",
        "",
        *clips_section(run, checkpoint),
        "## Commands",
        "| stage | command | seconds |",
        "|---|---|---:|",
        *(f"| {name} | `{run.commands[name]}` | {seconds:.1f} |" for name, seconds in run.seconds.items()),
        "",
        "Measured: `audit.json` (kernels by block), `parity.json` (errors and gates), `scales.report.md` (ranges).",
        "",
    ]
    return write_report(run, lines)
