"""The parts of the benchmark, each run in a process of its own: what breaks one, or its device, leaves the others."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kernels import check, speed, step
from kernels.build import Built, build_folder
from kernels.build import paths as built_paths
from kernels.cases import all_cases, tiny_cases
from kernels.contenders import Bench
from kernels.errors import BenchmarkError
from kernels.fragments import PROBES, check_fragments
from kernels.machine import PEAKS
from kernels.outcome import Outcome, Save, Status, table
from kernels.sanitizer import find_sanitizer, sanitize
from kernels.sweep import measure_sweep
from stiv_deploy.runtime.plugins.library import KernelLibrary

FULL_BLOCKS_SECONDS = 240.0
"""Time from which on the block baselines are measured in full."""
STEP_PIXELS, TINY_STEP_PIXELS = (256, 512), (64,)


@dataclass(frozen=True)
class Order:
    """What a process is to do: the part, compute capability ("90") or None for a dry run on the CPU, and seconds."""

    part: str
    sm: str | None
    seconds: float
    result: str

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "Order":
        """What :meth:`to_json` made."""
        return Order(**json.loads(text))

    @property
    def device(self) -> torch.device:
        """Where the part runs."""
        return torch.device("cpu" if self.sm is None else "cuda")

    @property
    def built(self) -> Built:
        """What :func:`build` has built."""
        return built_paths(build_folder(self.sm), self.sm)

    def bench(self) -> Bench:
        """For the parts that measure time."""
        deadline = time.monotonic() + self.seconds
        return Bench(library=self.library(), device=self.device, deadline=deadline)

    def library(self) -> KernelLibrary:
        """The kernel library; raises :class:`BenchmarkError` if it is not of the kind that is to be measured."""
        library = KernelLibrary(self.built.library)
        if (library.backend == "cuda") is (self.sm is None):
            raise BenchmarkError(f"{self.built.library} is {library.backend}: remove {self.built.library.parent}")
        return library


def run_check(order: Order, save: Save) -> Outcome:
    """Fragment layouts, then every group of :mod:`kernels.check`."""
    started = time.monotonic()
    layouts = check.Group("tensor-core fragments and conversions", len(PROBES))
    layouts.faults = check_fragments(order.built.fragments)
    layouts.failed = len(layouts.faults)
    groups, on = [layouts], check.Device(order.library(), order.device, tiny=order.sm is None)
    save(_checked(groups, started))
    for make in check.GROUPS:
        groups.append(make(on))
        save(_checked(groups, started))
        print(f"{groups[-1].name}: {groups[-1].cases} cases, {groups[-1].failed} faults", flush=True)
    return _checked(groups, started)


def _checked(groups: list[check.Group], started: float) -> Outcome:
    rows = [
        (
            each.name,
            each.cases,
            f"{each.worst:.2f}" if each.worst else "-",
            each.failed or ("none" if each.cases else "not run"),
        )
        for each in groups
    ]
    faults = [fault for each in groups for fault in each.faults]
    status: Status = "failed" if any(each.failed for each in groups) else "passed"
    text = table(("check", "cases", "largest error, of the allowed", "faults"), rows)
    if faults:
        text += "\n\n" + "\n".join(f"- {fault}" for fault in faults)
    data = {"groups": [asdict(each) for each in groups]}
    return Outcome("check", status, faults[0] if faults else "", text, data, time.monotonic() - started)


def run_sanitizer(order: Order, save: Save) -> Outcome:
    """compute-sanitizer; a dry run only runs the program."""
    return sanitize(order.built.launches, save, find_sanitizer() if order.sm else None)


def run_speed(order: Order, save: Save) -> Outcome:
    """Kernels against PyTorch and against a copy."""
    cases = tiny_cases() if order.sm is None else all_cases()
    peak = None if order.sm is None else PEAKS.get(torch.cuda.get_device_name())
    return speed.measure(order.bench(), cases, peak, save)


def run_step(order: Order, save: Save) -> Outcome:
    """The guidance step."""
    return step.measure_step(order.bench(), TINY_STEP_PIXELS if order.sm is None else STEP_PIXELS, save)


def run_blocks(order: Order, save: Save) -> Outcome:
    """The block baselines, in full if there is time."""
    try:
        from blocks.baselines import faults, report, run_baselines, to_json
    except ModuleNotFoundError as error:
        return Outcome("blocks", "not run", f"{error.name} is not installed: pip install {error.name}")
    started, quick = time.monotonic(), order.seconds < FULL_BLOCKS_SECONDS
    hurried = "XL at 256 pixels only, for lack of time" if quick and order.sm else ""

    def outcome(rows: list[Any]) -> Outcome:
        wrong = faults(rows)
        status: Status = "failed" if wrong else "measured"
        message = "; ".join(wrong) or hurried
        return Outcome("blocks", status, message, report(rows), {"rows": to_json(rows)}, time.monotonic() - started)

    return outcome(run_baselines(order.device, quick=quick, keep=lambda rows: save(outcome(rows))))


def run_sweep(order: Order, save: Save) -> Outcome:
    """Other ways to cut the work into thread blocks."""
    return measure_sweep(order.bench(), order.sm, save)


PARTS: dict[str, Callable[[Order, Save], Outcome]] = {
    "check": run_check,
    "sanitizer": run_sanitizer,
    "speed": run_speed,
    "step": run_step,
    "blocks": run_blocks,
    "sweep": run_sweep,
}


def run_part(order: Order) -> Outcome:
    """Run a part; what it saves on the way is in its result file, and stays there with its error if it breaks."""
    file, last = Path(order.result), Outcome(order.part, "error")

    def save(outcome: Outcome) -> None:
        nonlocal last
        last = outcome
        outcome.write(file)

    try:
        outcome = PARTS[order.part](order, save)
    except Exception as error:  # a part may break in any way: the report says how
        lines = str(error).strip().splitlines() or [""]
        outcome = broken(last, f"{type(error).__name__}: {lines[0][:300]}")
    outcome.write(file)
    return outcome


def broken(last: Outcome, message: str) -> Outcome:
    """An error, with what was found before it."""
    found: dict[str, Any] = last.data
    before = f"; before that: {last.message}" if last.message else ""
    return Outcome(last.part, "error", message + before, last.markdown, found, last.seconds)
