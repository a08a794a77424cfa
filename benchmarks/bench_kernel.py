"""Builds the attention kernels for the GPU at hand, checks them, and times them against a copy and against PyTorch.

    python benchmarks/bench_kernel.py --out benchmarks/results

Needs nvcc, CMake, torch with CUDA, typer and ml_dtypes (which onnx brings); compute-sanitizer and matplotlib if they
are there. Nothing need be installed of this project (the block baselines need pydantic). Parts: ``check`` (fragment
layouts, then results against fp64), ``sanitizer``, ``speed``, ``step`` (does a kernel for the guidance step pay?),
``blocks`` (whole blocks in PyTorch), and on request ``sweep`` (other heuristics). Each runs in a process of its own:
one that breaks is reported, the others give their results. ``--dry-run`` does all of it on a CPU with the emulated
kernels, where no time means anything.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import checkout  # noqa: F401  # isort: split
import torch
import typer
from command import run
from kernels.build import Built, build, registers
from kernels.cases import all_cases, tiny_cases
from kernels.contenders import Bench, kernel_work, make_sets
from kernels.errors import BenchmarkError
from kernels.machine import clocks, describe_machine
from kernels.outcome import Outcome
from kernels.parts import PARTS, Order, broken
from kernels.report import DRY, Run, summary, write

from stiv_deploy.runtime.plugins.library import LIBRARY_VARIABLE

CHILD = Path(__file__).resolve().parent / "kernels" / "child.py"
DEFAULT_PARTS = "check,sanitizer,speed,step,blocks"
RESERVED = {"check": 60.0, "sanitizer": 40.0, "speed": 150.0, "step": 30.0, "blocks": 120.0, "sweep": 120.0}
"""Seconds that are kept for a part while those before it run."""
GRACE = 20.0
"""Seconds beyond its time after which a part is ended."""
PROFILE = (
    "ncu --set full --clock-control none --kernel-name 'regex:temporal_attention|spatial_qkv' --launch-count 1 "
    "python benchmarks/bench_kernel.py --one-launch"
)


def capability(dry_run: bool) -> str | None:
    """``90`` of compute capability 9.0, or None for a dry run; raises :class:`BenchmarkError` without a GPU."""
    if dry_run:
        return None
    if not torch.cuda.is_available():
        raise BenchmarkError("torch finds no CUDA GPU; --dry-run does everything on the CPU")
    return "".join(map(str, torch.cuda.get_device_capability()))


def chosen_parts(names: str) -> list[str]:
    """Parts by name, in their order; raises :class:`BenchmarkError` for an unknown one."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in PARTS]
    if unknown or not wanted:
        raise BenchmarkError(f"--parts: no part named {', '.join(unknown) or 'at all'}; there are: {', '.join(PARTS)}")
    return [name for name in PARTS if name in wanted]


def run_child(order: Order) -> Outcome:
    """Run a part in its own process; what it saved is kept when it is ended or dies."""
    file = Path(order.result)
    started = time.monotonic()
    environment = os.environ | {LIBRARY_VARIABLE: str(order.built.library)}
    command = [sys.executable, str(CHILD), order.to_json()]
    # A session of its own: when it is ended, so are the tools and compilers that it has started.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(order.seconds + GRACE)
            fault = "" if code == 0 else f"its process ended with code {code}"
        except subprocess.TimeoutExpired:
            fault = f"ended after {order.seconds + GRACE:.0f} s; what it had found stays"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    outcome = Outcome.read(file) if file.is_file() else Outcome(order.part, "error")
    if fault:
        outcome = broken(outcome, fault)
    outcome.seconds = time.monotonic() - started
    return outcome


def run_parts(parts: Sequence[str], sm: str | None, deadline: float) -> Iterator[Outcome]:
    """Run ``parts`` in turn; each may take what the later ones do not need until ``deadline``."""
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            later = sum(RESERVED[each] for each in parts[number + 1 :])
            seconds = max(deadline - time.monotonic() - later, RESERVED[part])
            print(f"== {part} (up to {seconds:.0f} s)", flush=True)
            outcome = run_child(Order(part, sm, seconds, str(Path(folder) / f"{part}.json")))
            print(f"== {part}: {outcome.status} {outcome.message}".rstrip(), flush=True)
            yield outcome


def launch_once(name: str, sm: str | None, built: Built) -> None:
    """Launch the kernel of the case called ``name`` once: for a profiler."""
    cases = {case.name: case for case in (all_cases() if sm else tiny_cases())}
    if name not in cases:
        raise BenchmarkError(f"--one-launch: no case named {name}; there are: {', '.join(cases)}")
    order = Order("speed", sm, 0.0, "")
    bench: Bench = order.bench()
    work = kernel_work(bench, make_sets(bench, cases[name])[:1])
    work(0)
    if sm:
        torch.cuda.synchronize()
    print(f"launched {name} once, from {built.library}")


def describe(built: Built, sm: str | None) -> Mapping[str, Any]:
    """What was built, without paths."""
    return {"seconds": round(built.seconds, 1), "compiler": built.compiler, "registers": registers(sm)}


def main(
    out: Annotated[Path | None, typer.Option(help="Folder for report, numbers and plot.", metavar="DIR")] = None,
    parts: Annotated[str, typer.Option(help=f"Comma-separated; there are {', '.join(PARTS)}.")] = DEFAULT_PARTS,
    minutes: Annotated[float, typer.Option(help="Time for everything; what is slow is left out beyond it.")] = 8.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="On the CPU, with the emulated kernels.")] = False,
    one_launch: Annotated[str, typer.Option(help="Launch this case once, for ncu, and end.", metavar="CASE")] = "",
) -> None:
    """Build, check and time the attention kernels; exit code 1 if a check failed or a part broke."""
    started = time.monotonic()
    wanted, sm = chosen_parts(parts), capability(dry_run)
    built = build(sm)
    if one_launch:
        launch_once(one_launch, sm, built)
        return
    print(f"built in {built.seconds:.0f} s by {built.compiler}", flush=True)
    found = Run(
        date=datetime.now(UTC).date().isoformat(),
        command=f"python benchmarks/bench_kernel.py {' '.join(sys.argv[1:])}",
        machine=describe_machine(torch.device("cuda" if sm else "cpu")),
        clocks={"before": clocks()} if sm else {},
        build=describe(built, sm),
        outcomes=[],
        dry=dry_run,
    )
    files: list[Path] = []
    for outcome in run_parts(wanted, sm, started + 60 * minutes):
        found.outcomes.append(outcome)
        if sm:
            found.clocks[f"after {outcome.part}"] = clocks()
        files = write(found, out) if out else []  # after every part: whoever ends this early has the files
    show(found, files)
    if any(outcome.status in {"failed", "error"} for outcome in found.outcomes):
        raise typer.Exit(1)


def show(found: Run, files: Sequence[Path]) -> None:
    """Print the tables, what was written, and how to look deeper; the summary comes last."""
    for outcome in found.outcomes:
        if outcome.markdown:
            print(f"\n{outcome.markdown}")
    print(f"\nTo profile one launch: {PROFILE} {(tiny_cases() if found.dry else all_cases())[0].name}")
    for path in files:
        print(f"wrote {path}")
    if found.dry:
        print(f"\n{DRY}")
    print(f"\n{summary(found)}")


if __name__ == "__main__":
    run(main)
