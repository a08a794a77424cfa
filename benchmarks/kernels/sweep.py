"""Other ways to cut the work into thread blocks: the kernels with other numbers in ``heuristics.h``, side by side.

Each variant is built from a copy of the sources in which a constant is replaced; nothing of the checkout changes.
"""

import re
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from timing import Timing, Work, interleaved

from kernels.build import ROOT, build_folder, build_library, paths
from kernels.cases import Case, all_cases, tiny_cases
from kernels.contenders import Bench, kernel_work, make_sets
from kernels.errors import BenchmarkError
from kernels.outcome import Outcome, Save, table
from stiv_deploy.runtime.plugins.library import KernelLibrary

PLUGINS = Path("runtime") / "plugins"
HEURISTICS = PLUGINS / "attention" / "heuristics.h"
VARIANTS: dict[str, dict[str, str]] = {
    "24 KB": {"kSharedBudget": "24 << 10"},
    "32 KB": {"kSharedBudget": "32 << 10"},
    "48 KB": {"kSharedBudget": "48 << 10"},
    "64 threads": {"kBlockThreads": "64"},
    "256 threads": {"kBlockThreads": "256"},
    "1024 blocks": {"kFewBlocks": "1024"},
    "8 tokens": {"kSpatialTokens": "8"},
    "32 tokens": {"kSpatialTokens": "32"},
}
"""Constants of ``heuristics.h`` by name of the variant. More than 48 KB of shared memory would need an opt-in."""
TINY = {"24 KB": VARIANTS["24 KB"]}
ASSIGNED = "as it is"
BUILDS_AT_ONCE = 4


def changed(source: str, constants: Mapping[str, str]) -> str:
    """``source`` with other values of ``constants``; :class:`BenchmarkError` if one is not there exactly once."""
    for name, value in constants.items():
        source, count = re.subn(rf"(constexpr int {name} = )[^;]+;", rf"\g<1>{value};", source)
        if count != 1:
            raise BenchmarkError(f"heuristics.h has no constant {name}; the sweep knows {', '.join(VARIANTS)}")
    return source


def build_variant(sm: str | None, name: str, constants: Mapping[str, str]) -> KernelLibrary:
    """Build the kernels with other ``constants``."""
    folder = build_folder(sm).with_name("sweep") / (sm or "emulated") / re.sub(r"\W+", "-", name)
    source = folder / "source"
    text = changed((ROOT / HEURISTICS).read_text(), constants)
    shutil.copytree(
        ROOT / PLUGINS, source / PLUGINS, dirs_exist_ok=True, ignore=shutil.ignore_patterns("_lib", "__pycache__")
    )
    shutil.copy2(ROOT / "CMakeLists.txt", source)
    (source / HEURISTICS).write_text(text)
    build_library(sm, source, folder / "build")
    return KernelLibrary(paths(folder / "build", sm).library)


def measure_sweep(bench: Bench, sm: str | None, save: Save) -> Outcome:
    """Times of every variant on the cases of the benchmark."""
    started, variants = time.monotonic(), VARIANTS if sm else TINY
    libraries, faults = {ASSIGNED: bench.library}, []
    with ThreadPoolExecutor(BUILDS_AT_ONCE) as pool:
        jobs = {name: pool.submit(build_variant, sm, name, constants) for name, constants in variants.items()}
    for name, job in jobs.items():
        try:
            libraries[name] = job.result()
        except BenchmarkError as error:
            faults.append(f"{name}: {error}")
    rows: list[tuple[Case, dict[str, Timing]]] = []
    outcome = Outcome("sweep", "not run", "no time left")
    for case in all_cases() if sm else tiny_cases():
        if bench.on_gpu and time.monotonic() > bench.deadline:
            break
        rows.append((case, _time(bench, case, libraries, faults)))
        outcome = _report(rows, list(libraries), faults, time.monotonic() - started)
        save(outcome)
    return outcome


def _time(bench: Bench, case: Case, libraries: Mapping[str, KernelLibrary], faults: list[str]) -> dict[str, Timing]:
    sets = make_sets(bench, case)
    works: dict[str, Work] = {}
    expected = None
    for name, library in libraries.items():
        work = kernel_work(replace(bench, library=library), sets)
        try:
            got = [output.view(torch.uint8) for output in work(0)]  # type: ignore[attr-defined]
        except Exception as error:  # one that cannot be launched is told, the others are timed
            faults.append(f"{name}, {case.name}: {error}")
            continue
        expected = expected or got
        if all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)):
            works[name] = work
        else:  # how work is cut must not change a bit
            faults.append(f"{name}, {case.name}: other bits than {ASSIGNED}")
    times = interleaved(works, 9 if bench.on_gpu else 2, 20 if bench.on_gpu else 1, bench.device)
    if bench.on_gpu:
        torch.cuda.empty_cache()
    return times


def _report(rows: list[tuple[Case, dict[str, Timing]]], names: list[str], faults: list[str], seconds: float) -> Outcome:
    cells = []
    for case, times in rows:
        best = min(timing.median_us for timing in times.values())
        shown = {name: f"{timing.median_us:.1f}" for name, timing in times.items()}
        shown |= {name: f"**{text}**" for name, text in shown.items() if times[name].median_us == best}
        cells.append([case.name, *(shown.get(name, "-") for name in names)])
    parts = ["Microseconds by variant of `heuristics.h`; the fastest in bold.", table(("case", *names), cells)]
    if faults:
        parts.append("\n".join(f"- {fault}" for fault in faults))
    data: list[dict[str, Any]] = [
        {"case": case.name, "times": {name: asdict(timing) for name, timing in times.items()}} for case, times in rows
    ]
    return Outcome("sweep", "measured", "; ".join(faults), "\n\n".join(parts), {"rows": data}, seconds)
