"""Does one block of the large models fit a small machine? Calibration, export and engine build, measured from outside.

    python benchmarks/big_blocks.py --out benchmarks/results/NAME.json

Every stage is the ``stiv`` command itself on a checkpoint of one random block, at the size of the paper's clips (20
frames, 256 pixels). Peak memory is the largest sum of resident sets over the command and all its children, sampled:
pages that they share count more than once. A model of many blocks is made block by block, so that engines cost no
more than this; calibration and export have all weights in memory.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import typer
from one_block import one_block_checkpoint
from PIL import Image

from stiv_deploy.runtime.bundle.bundle import read_manifest
from stiv_deploy.stiv_ref.checkpoint import save_checkpoint

GIB, MIB = 2**30, 2**20
STIV = Path(sys.executable).with_name("stiv")
INTERVAL = 0.05
"""Seconds between samples of memory."""
MEMORY_LIMIT, FILE_LIMIT = 8.0, 2.0
"""GiB: memory of any stage, and size of any file."""
TOOLS = ("torch", "nvidia-modelopt", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command that was run: what it is for, how long it took, and its peak memory in GiB."""

    name: str
    seconds: float
    peak_gib: float


def resident(process: psutil.Process) -> int:
    """Bytes resident of ``process`` and all its children; those that end meanwhile count nothing."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def run_stage(name: str, command: list[str]) -> Stage:
    """Run ``command`` to its end; :class:`SystemExit` with the last line of its output if it fails."""
    started, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            try:
                peak = max(peak, resident(process))
            except psutil.NoSuchProcess:
                break
            time.sleep(INTERVAL)
        if process.wait():
            output.seek(0)
            raise SystemExit(f"{name} failed: {(output.read().splitlines() or ['no output'])[-1]}")
    return Stage(name=name, seconds=round(time.perf_counter() - started, 1), peak_gib=round(peak / GIB, 2))


def prepare(folder: Path, model: str, frames: int, size: int) -> None:
    """Write the checkpoint and a folder with one first frame of noise."""
    save_checkpoint(folder / "checkpoint", one_block_checkpoint(model, frames, size))
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "noise.png")


def stage_commands(
    folder: Path, precision: str, frames: int, size: int, sm: str, check: bool
) -> dict[str, list[str | Path]]:
    """The commands of one precision by stage, over what :func:`prepare` made."""
    checkpoint, scales, bundle = folder / "checkpoint", folder / f"{precision}.safetensors", folder / precision
    run: list[str | Path] = ["--samples", "2", "--steps", "1", "--batch", "1", "--images", folder / "images", "--quiet"]
    pixels = f"{size // 2}:{size}:{size}"
    sizes = ["--batch", "1", "--frames", f"1:{frames}:{frames}", "--height", pixels, "--width", pixels]
    return {
        "calibrate": ["calibrate", checkpoint, "--precision", precision, "--out", scales, *run],
        "export": [
            *("export", checkpoint, "--precision", precision, "--scales", scales, "--out", bundle),
            *sizes,
            *([] if check else ["--no-check"]),
        ],
        "build": ["build", bundle, "--backend", "tensorrt-rtx", "--sm", sm, "--cache", folder / f"cache-{precision}"],
    }


def files_of(bundle: Path) -> dict[str, Any]:
    """Sizes of a bundle with engines: its largest file, and the block's weights, plan and build time."""
    manifest = read_manifest(bundle)
    largest = max((path for path in bundle.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    block = manifest.graphs["block_00"]
    (engine,) = [engine for engine in manifest.engines if engine.graph == "block_00"]
    return {
        "largest_file": largest.relative_to(bundle).as_posix(),
        "largest_file_gib": round(largest.stat().st_size / GIB, 3),
        "block_weights_mib": round(block.data.bytes / MIB, 1) if block.data else 0.0,
        "block_plan_mib": round(engine.file.bytes / MIB, 1),
        "block_build_seconds": round(engine.build_seconds, 1),
        "engines": len(manifest.engines),
        "builder": f"{engine.backend} {engine.backend_version}",
    }


def measure(folder: Path, precision: str, frames: int, size: int, sm: str, check: bool) -> dict[str, Any]:
    """All stages of one precision, and the sizes of what they made."""
    commands = stage_commands(folder, precision, frames, size, sm, check)
    stages = []
    for name, command in commands.items():
        stages.append(run_stage(name, [str(STIV), *map(str, command)]))
        typer.echo(f"  {precision} {name}: {stages[-1].seconds} s, {stages[-1].peak_gib} GiB", err=True)
    return {"stages": [asdict(stage) for stage in stages], **files_of(folder / precision)}


def faults(result: dict[str, Any]) -> list[str]:
    """What is larger than it may be, in words; empty if all is well."""
    found = []
    for model, precisions in result["models"].items():
        for precision, row in precisions.items():
            found += [
                f"{model} {precision} {stage['name']}: {stage['peak_gib']} GiB of memory, not below {MEMORY_LIMIT}"
                for stage in row["stages"]
                if stage["peak_gib"] >= MEMORY_LIMIT
            ]
            if row["largest_file_gib"] >= FILE_LIMIT:
                found.append(f"{model} {precision}: {row['largest_file']} has {row['largest_file_gib']} GiB")
    return found


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = [
        "| block | precision | calibrate | export | build, all graphs | weights, plan of the block | its build |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, precisions in result["models"].items():
        for precision, row in precisions.items():
            stages = [f"{stage['seconds']:.0f} s, {stage['peak_gib']:.1f} GiB" for stage in row["stages"]]
            sizes = f"{row['block_weights_mib']:.0f} MiB, {row['block_plan_mib']:.0f} MiB"
            cells = [model, precision, *stages, sizes, f"{row['block_build_seconds']:.1f} s"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def command_line(models: list[str], precisions: list[str], frames: int, size: int, sm: str, check: bool) -> str:
    """The command that gives a result again."""
    repeated = [("--model", name) for name in models] + [("--precision", name) for name in precisions]
    sizes = [("--frames", str(frames)), ("--size", str(size)), ("--sm", sm)]
    options = " ".join(f"{option} {value}" for option, value in (*repeated, *sizes))
    return f"python benchmarks/big_blocks.py {options}" + " --check" * check


def main(
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Configs; repeatable.", show_default="XL and M")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="Repeatable.", show_default="fp8 and int8")] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip.")] = 20,
    size: Annotated[int, typer.Option(min=16, help="Height and width in pixels, a multiple of 16.")] = 256,
    sm: Annotated[str, typer.Option(help="GPU to build engines for.")] = "89",
    check: Annotated[bool, typer.Option("--check", help="Also compare graphs with the reference (slow).")] = False,
) -> None:
    """Measure memory, seconds and sizes of one block; exit 1 if anything is larger than it may be."""
    models, precisions = model or ["XL", "M"], precision or ["fp8", "int8"]
    result: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": command_line(models, precisions, frames, size, sm, check),
        "machine": f"{platform.machine()}, {psutil.cpu_count()} cores",
        "versions": {"python": platform.python_version()} | {tool: version(tool) for tool in TOOLS},
        "clip": {"frames": frames, "size": size},
        "sm": sm,
        "models": {},
    }
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            typer.echo(f"{name}: one block", err=True)
            prepare(Path(folder), name, frames, size)
            result["models"][name] = {each: measure(Path(folder), each, frames, size, sm, check) for each in precisions}
    result["faults"] = faults(result)
    typer.echo("\n".join([table(result), *result["faults"]]))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if result["faults"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    from command import run

    run(main)
