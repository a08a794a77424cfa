"""How fast are the kernels? Each case side by side with a copy and with PyTorch, caches cold, CUDA graphs replayed."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from timing import Timing, copy_rate, interleaved

from kernels.cases import WANTED_SPEEDUP, Case
from kernels.contenders import (
    COMPILED,
    COPY,
    EAGER,
    FLEX,
    KERNEL,
    TITLES,
    UNBIASED,
    Bench,
    assemble,
    make_sets,
)
from kernels.inputs import FP8, sizes_and_types
from kernels.machine import clocks
from kernels.outcome import Outcome, Save, Status, table
from stiv_deploy.runtime.plugins.library import POINTERS, Plan, SpatialQkv, TemporalAttention

BIG_COPY = 2**31
"""Bytes, read and written, of the large copy."""
ROUNDS, REPLAYS = 15, 20
LEFT = 10.0
"""Seconds that must be left to begin a case."""
CONTENDERS = (UNBIASED, EAGER, COMPILED, FLEX)
"""In the order of the tables; FlexAttention has no part in pre-processing."""
HEAD = ("case", "MB", "us (10-90 %)", "TB/s", "% of copy", "% of 2 GiB copy", "% of peak", "goal")


@dataclass
class Row:
    """One case: times by contender, why others are absent, and the rates they are held against (bytes/s)."""

    case: Case
    times: dict[str, Timing] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    big_copy: float = 0.0
    peak: float | None = None
    plan: Plan | None = None
    clocks: dict[str, str] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Bytes per second that the kernel moves, by the least traffic."""
        return self.times[KERNEL].rate(self.case.nbytes)

    @property
    def share_of_copy(self) -> float:
        """Of the rate at which as many bytes are copied, in the same run."""
        return self.times[COPY].median_us / self.times[KERNEL].median_us

    def speedup(self, name: str) -> float | None:
        """Time of contender ``name`` over the kernel's, if it was timed."""
        return self.times[name].median_us / self.times[KERNEL].median_us if name in self.times else None

    def goals(self) -> dict[str, bool]:
        """Which goals there are for this case, and whether each is met."""
        found = {}
        if self.case.goal is not None:
            found[f"{self.case.goal:.0%} of copy"] = self.share_of_copy >= self.case.goal
        speedup = self.speedup(COMPILED)
        if speedup is not None and self.case.kernel == "temporal":
            found[f"{WANTED_SPEEDUP:.0f}x over compile"] = speedup >= WANTED_SPEEDUP
        return found

    def to_json(self) -> dict[str, Any]:
        """Everything, with what follows from it."""
        found = asdict(self.case) | {"name": self.case.name, "bytes": self.case.nbytes}
        found["times"] = {name: asdict(timing) for name, timing in self.times.items()}
        found["absent"], found["plan"] = self.absent, asdict(self.plan) if self.plan else None
        found["clocks"] = self.clocks
        if KERNEL in self.times:
            found["bytes_per_second"], found["share_of_copy"] = self.rate, self.share_of_copy
            found["share_of_big_copy"] = self.rate / self.big_copy
            found["share_of_peak"] = self.rate / self.peak if self.peak else None
            found["speedups"] = {name: self.speedup(name) for name in CONTENDERS if name in self.times}
            found["goals"] = self.goals()
        return found


def plan_of(bench: Bench, case: Case) -> Plan:
    """How the library cuts the case into thread blocks."""
    output = FP8 if case.fp8 else torch.bfloat16
    call = sizes_and_types(case.leading, case.heads, case.head_dim, torch.bfloat16, output)
    none: dict[str, Any] = dict.fromkeys(POINTERS, 0)
    if case.kernel == "temporal":
        return bench.library.temporal_attention_plan(TemporalAttention(**none, output=0, **call))
    return bench.library.spatial_qkv_plan(SpatialQkv(**none, q=0, k=0, v=0, **call))


def time_case(bench: Bench, case: Case, row: Row, rounds: int, replays: int) -> None:
    """Fill ``row``."""
    row.plan = plan_of(bench, case)
    sets = make_sets(bench, case)
    lineup = assemble(bench, case, sets)
    row.absent |= lineup.absent
    row.times = interleaved(lineup.works, rounds, replays, bench.device)
    row.clocks = clocks() if bench.on_gpu else {}


def measure(bench: Bench, cases: Sequence[Case], peak: float | None, save: Save) -> Outcome:
    """Time ``cases`` in their order until the deadline; each result is saved at once."""
    started = time.monotonic()
    rounds, replays = (ROUNDS, REPLAYS) if bench.on_gpu else (3, 2)
    big = copy_rate(bench.device, BIG_COPY if bench.on_gpu else 2**16)
    rows: list[Row] = []
    for case in cases:
        row = Row(case, big_copy=big, peak=peak)
        rows.append(row)
        if bench.on_gpu and time.monotonic() + LEFT > bench.deadline:
            row.absent[KERNEL] = "no time left"
            continue
        try:
            time_case(bench, case, row, rounds, replays)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            row.absent[KERNEL] = f"out of memory: {error}".splitlines()[0]
        if bench.on_gpu:
            torch.cuda.empty_cache()
        outcome = report(rows, big, time.monotonic() - started)
        save(outcome)
        print(progress(row), flush=True)
    return report(rows, big, time.monotonic() - started)


def progress(row: Row) -> str:
    """One line while it runs."""
    if KERNEL not in row.times:
        return f"{row.case.name}: {row.absent.get(KERNEL, 'not timed')}"
    times = ", ".join(f"{name} {timing.median_us:.1f}" for name, timing in row.times.items())
    return f"{row.case.name}: {times} us"


def report(rows: Sequence[Row], big_copy: float, seconds: float) -> Outcome:
    """Tables of temporal attention and of pre-processing."""
    timed = [row for row in rows if KERNEL in row.times]
    met = [met for row in timed for met in row.goals().values()]
    parts = [f"Copy of 2 GiB (read + written): {big_copy / 1e12:.2f} TB/s. Goals met: {sum(met)} of {len(met)}."]
    for kernel, names in (("temporal", CONTENDERS), ("spatial", CONTENDERS[:-1])):
        chosen = [row for row in timed if row.case.kernel == kernel]
        if chosen:
            head = (*HEAD, *(f"{name} us (x)" for name in names))
            parts.append(table(head, [_cells(row, names) for row in chosen]))
    gaps = [f"- {row.case.name}: {TITLES[name]}: {why}" for row in rows for name, why in row.absent.items()]
    if gaps:
        parts.append("Not measured:\n\n" + "\n".join(gaps))
    speeds = [f"{row.case.name} {row.clocks['clocks.sm']}" for row in timed if "clocks.sm" in row.clocks]
    if speeds:
        parts.append(f"SM clock right after timing: {', '.join(speeds)}.")
    streams = sorted({name for row in timed for name, timing in row.times.items() if timing.how == "stream"})
    if streams:
        parts.append(f"Launch by launch, as no graph could be captured: {', '.join(streams)}.")
    data = {"big_copy_bytes_per_second": big_copy, "rows": [row.to_json() for row in rows]}
    status: Status = "measured" if timed else "not run"
    return Outcome("speed", status, "" if timed else "no case was timed", "\n\n".join(parts), data, seconds)


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    own = row.times[KERNEL]
    goals = ", ".join(f"{goal}: {'met' if met else 'not met'}" for goal, met in row.goals().items())
    times = [
        f"{row.times[name].median_us:.1f} ({row.speedup(name):.2f}x)" if name in row.times else "-" for name in names
    ]
    return [
        row.case.name,
        f"{row.case.nbytes / 1e6:.0f}",
        f"{own.median_us:.1f} ({own.low_us:.1f}-{own.high_us:.1f})",
        f"{row.rate / 1e12:.2f}",
        f"{row.share_of_copy:.0%}",
        f"{row.rate / row.big_copy:.0%}",
        f"{row.rate / row.peak:.0%}" if row.peak else "-",
        goals or "-",
        *times,
    ]
