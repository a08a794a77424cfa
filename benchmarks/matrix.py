"""What TensorRT-RTX makes of bundles, version by version: fusions, kernels, plan sizes. No GPU is needed.

    python benchmarks/matrix.py out/float32 out/bfloat16 out/fp8 --out benchmarks/results/matrix-DATE.json

Each version of ``--versions`` is installed into a folder of its own (``--environments`` keeps them), which stands
before the installed one while ``stiv audit`` builds each bundle. A version that cannot be installed, and a bundle that
it cannot build, are noted with the reason. A fusion is *lost* if an earlier version has it and the newest one has not:
each is named, and the exit code is 1. Fusions are the checks of the audit, kernels and sizes those of its engines.
"""

import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
from command import run

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.errors import EngineError, one_line

PACKAGES = ("tensorrt_rtx_cu13_bindings", "tensorrt_rtx_cu13_libs")
VERSIONS = "1.4.0.76,1.5.0.114,1.6.1.120,1.7.1.116"
AUDIT = ("-m", "stiv_deploy.runtime.command.main", "audit")
FAILED_CHECKS = 1
"""Exit code of an audit that has a report, in which something failed."""
MIB = 2**20


class Engine(Frozen):
    """One graph's."""

    kernels: int
    plan_bytes: int


class Fusion(Frozen):
    """One check of the audit."""

    expected: str
    found: str
    passed: bool


class Cell(Frozen):
    """What one version makes of one bundle; ``error`` where it makes nothing of it."""

    version: str
    bundle: str
    engines: dict[str, Engine] = {}
    fusions: dict[str, Fusion] = {}
    error: str | None = None


def number(text: str) -> tuple[int, ...]:
    """A version, to be sorted by."""
    return tuple(int(part) for part in text.split("."))


def title(bundle: Path) -> str:
    """A bundle by its types."""
    manifest = Bundle.open(bundle).manifest
    if manifest.quantization is None:
        return manifest.precision
    return f"{manifest.quantization.format} in {manifest.precision}"


def installed(folder: Path, wanted: str) -> Mapping[str, str]:
    """Changes of the environment that put version ``wanted`` first; raises :class:`EngineError` if it cannot be had."""
    if wanted == here():
        return {}
    target = (folder / wanted).resolve()
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--target", str(target), *(f"{package}=={wanted}" for package in PACKAGES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise EngineError(f"TensorRT-RTX {wanted} cannot be installed: {one_line(lines[-1], 200)}")
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(target), os.environ.get("PYTHONPATH"))))}


def here() -> str | None:
    """The version that is installed beside this project."""
    try:
        return version(PACKAGES[1])
    except PackageNotFoundError:
        return None


def cell(wanted: str, bundle: Path, sm: str, environment: Mapping[str, str]) -> Cell:
    """The audit of ``bundle`` by that version."""
    command = [sys.executable, *AUDIT, str(bundle), "--sm", sm, "--json"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode not in (0, FAILED_CHECKS) or not done.stdout:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return Cell(version=wanted, bundle=title(bundle), error=one_line(lines[-1], 300))
    return read_cell(wanted, title(bundle), json.loads(done.stdout))


def read_cell(wanted: str, bundle: str, report: Mapping[str, Any]) -> Cell:
    """What the JSON of an audit says; raises :class:`EngineError` if another version made it."""
    if wanted not in report["builder"]:
        raise EngineError(f"asked for TensorRT-RTX {wanted}, got {report['builder']}: it is not the first on the path")
    return Cell(
        version=wanted,
        bundle=bundle,
        engines={
            each["graph"]: Engine(kernels=each["kernels"], plan_bytes=each["plan_bytes"]) for each in report["engines"]
        },
        fusions={
            f"{row['graph']}: {row['name']}": Fusion(expected=row["expected"], found=row["found"], passed=row["passed"])
            for row in report["rows"]
        },
    )


def lost(cells: Sequence[Cell]) -> Iterator[str]:
    """Fusions that an earlier version has, and the newest has not, a line for each."""
    newest = max((number(each.version) for each in cells), default=())
    for now in (each for each in cells if number(each.version) == newest):
        before = [each for each in cells if each.bundle == now.bundle and number(each.version) < newest]
        for name in dict.fromkeys(name for each in before for name in each.fusions):
            had = [each.version for each in before if name in each.fusions and each.fusions[name].passed]
            fusion = now.fusions.get(name)
            if had and (fusion is None or not fusion.passed):
                found = now.error or (fusion.found if fusion else "nothing of that name")
                yield f"{now.bundle}, {name}: {max(had, key=number)} has it; {now.version} has {found}"


def table(cells: Sequence[Cell]) -> str:
    """Markdown: kernels, MiB of the plan and checks of each graph by version."""
    versions = sorted({each.version for each in cells}, key=number)
    lines = [f"| bundle, graph | {' | '.join(versions)} |", f"|---|{'---|' * len(versions)}"]
    found = {(each.bundle, each.version): each for each in cells}
    for bundle in dict.fromkeys(each.bundle for each in cells):
        graphs = dict.fromkeys(graph for each in cells if each.bundle == bundle for graph in each.engines)
        row = [_checks(found.get((bundle, each))) for each in versions]
        lines.append(f"| **{bundle}**, checks | {' | '.join(row)} |")
        for graph in graphs:
            row = [_engine(found.get((bundle, each)), graph) for each in versions]
            lines.append(f"| {bundle}, `{graph}` | {' | '.join(row)} |")
    return "\n".join(lines)


def _checks(found: Cell | None) -> str:
    if found is None or found.error is not None:
        return "-" if found is None else "does not build"
    return f"{sum(each.passed for each in found.fusions.values())} of {len(found.fusions)}"


def _engine(found: Cell | None, graph: str) -> str:
    if found is None or graph not in found.engines:
        return "-"
    engine = found.engines[graph]
    return f"{engine.kernels} / {engine.plan_bytes / MIB:.1f}"


def measure(
    bundles: Sequence[Path], versions: Sequence[str], sm: str, folder: Path
) -> tuple[list[Cell], dict[str, str]]:
    """All cells, and versions that there are not, with the reason."""
    cells, absent = [], {}
    for wanted in versions:
        try:
            environment = installed(folder, wanted)
        except EngineError as error:
            absent[wanted] = str(error)
            continue
        for bundle in bundles:
            cells.append(cell(wanted, bundle, sm, environment))
            print(f"{wanted} {cells[-1].bundle}: {cells[-1].error or _checks(cells[-1])}", flush=True)
    return cells, absent


def chosen(text: str) -> list[str]:
    """Versions in their order; :class:`typer.BadParameter` for what is none."""
    found = [each.strip() for each in text.split(",") if each.strip()]
    if not found or not all(part.isdecimal() for each in found for part in each.split(".")):
        raise typer.BadParameter(f"{text!r}: give versions with commas, as in {VERSIONS}")
    return sorted(dict.fromkeys(found), key=number)


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders, of other precisions each.")],
    versions: Annotated[str, typer.Option(help="Of the wheels, with commas.")] = VERSIONS,
    sm: Annotated[str, typer.Option(help="GPU to build for.")] = "89",
    environments: Annotated[Path | None, typer.Option(help="Folder that keeps what is installed.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file of all that was found.")] = None,
) -> None:
    """Print a table by version; exit 1 if the newest version lacks a fusion that an earlier one has."""
    wanted, names = chosen(versions), [title(bundle) for bundle in bundles]
    if len(set(names)) < len(names):
        raise EngineError(f"bundles are told apart by their types, got {', '.join(names)}; give one of each")
    with TemporaryDirectory(prefix="stiv-matrix-") as temporary:
        cells, absent = measure(bundles, wanted, sm, environments or Path(temporary))
    gone = list(lost(cells))
    report = {
        "command": f"python {shlex.join(sys.argv)}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": platform.machine(),
        "sm": sm,
        "absent": absent,
        "lost": gone,
        "cells": [each.model_dump() for each in cells],
    }
    print(table(cells), *(f"lost: {each}" for each in gone), *absent.values(), sep="\n")
    if out is not None:
        out.write_text(json.dumps(report, indent=1) + "\n")
    if gone:
        raise typer.Exit(1)


if __name__ == "__main__":
    run(main)
