"""A server under load: how long jobs take, and what step by step batching is worth, as ratios of one run.

    python benchmarks/bench_serve.py BUNDLE --out benchmarks/results/NAME.json

The ladder: ``fifo`` (one clip at a time), ``request`` (batches that nobody joins), ``step`` (the product), and
``deadlines`` (the product, told by when each job must be done, refusing those that cannot be). Each gets the same jobs,
drawn from ``--seed``, on a server of its own, first as a burst (all at once: their makespan is the throughput), then in
an open loop: they come by a Poisson process at ``--load`` of what ``fifo`` can take, whether or not others are done.
Short and long jobs, two sizes, with and without guidance; some are cancelled. A job's time is from when it was due to
come to its end in the job store, so that a slow server does not slow down its load. Its service level is ``--slo``
times what its kind takes alone. Loopback only. What is done is told on stderr, and kept in ``--out`` after each rung.
"""

import asyncio
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx2
import numpy as np
import typer
from command import run
from served import Served, serving

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import MeasurementError
from stiv_deploy.runtime.files import write_text

LADDER = {"fifo": "fifo", "request": "request", "step": "step", "deadlines": "step"}
"""Rungs, and the policy of each."""
POLICY = (sys.executable, str(Path(__file__).with_name("policies.py")))
SHARES = {"short": 0.75, "long": 0.25}
CANCELLED = 0.05
"""Share of jobs that are cancelled, at a moment within their time alone."""
LIVE = "SELECT COUNT(*) FROM jobs WHERE state IN ('queued', 'in_progress')"
ENDS = "SELECT id, created, finished, COALESCE(error_code, state) FROM jobs"
SAMPLED = 0.25
"""Seconds between two looks at the memory."""


@dataclass(frozen=True)
class Kind:
    """Jobs of one length, size and guidance."""

    length: str
    small: bool
    guided: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.length}{' small' if self.small else ''}{'' if self.guided else ' unguided'}"

    def body(self, bundle: Bundle, steps: dict[str, int], seed: int) -> dict[str, Any]:
        """A request of this kind."""
        size = bundle.manifest.sampling
        smaller = max(bundle.manifest.buckets[0].width.min, size.width // 2)
        return {
            "prompt": "a red star moving left",
            "seed": seed,
            "num_inference_steps": steps[self.length],
            "guidance_mode": "jit" if self.guided else "none",
            "height": size.height,
            "width": smaller if self.small else size.width,
        }


KINDS = tuple(Kind(length, small, guided) for length in SHARES for small in (False, True) for guided in (True, False))


@dataclass
class Call:
    """A job to ask for ``at`` so many seconds; when it was due, its id (none if refused), when it is cancelled."""

    kind: Kind
    at: float
    cancel: float | None
    due: float = 0.0
    id: str = ""


@dataclass
class Load:
    """What a server is given, and what came of it."""

    calls: list[Call]
    ends: dict[str, tuple[float, float, str]] = field(default_factory=dict)
    seconds: float = 0.0
    peak: dict[str, float] = field(default_factory=dict)

    def times(self, *lengths: str) -> list[float]:
        """Seconds of the completed jobs of some lengths."""
        return [
            self.ends[call.id][1] - call.due
            for call in self.calls
            if call.kind.length in lengths and self.ends.get(call.id, (0, 0, ""))[2] == "completed"
        ]

    @property
    def wanted(self) -> list[Call]:
        """Those that nobody cancelled."""
        return [call for call in self.calls if self.ends.get(call.id, (0, 0, "refused"))[2] != "cancelled"]

    def met(self, alone: dict[Kind, float], slo: float) -> int:
        """How many were done within ``slo`` times what they take alone."""
        done = [call for call in self.wanted if self.ends.get(call.id, (0, 0, ""))[2] == "completed"]
        return sum(self.ends[call.id][1] - call.due <= slo * alone[call.kind] for call in done)


def drawn(jobs: int, gaps: Sequence[float], random: np.random.Generator) -> list[Call]:
    """``jobs`` calls of all kinds, ``gaps`` seconds apart."""
    lengths = random.choice([*SHARES], jobs, p=[*SHARES.values()])
    rest = random.random((jobs, 3)) < (0.3, 0.7, CANCELLED)
    moments = random.random(jobs)
    return [
        Call(Kind(str(length), bool(small), bool(guided)), float(at), float(moment) if cancelled else None)
        for length, (small, guided, cancelled), at, moment in zip(lengths, rest, np.cumsum(gaps), moments, strict=True)
    ]


class Client:
    """Asks ``server`` for jobs of ``bundle``; with ``deadlines`` it says by when, in so many seconds by kind."""

    def __init__(
        self, server: Served, bundle: Bundle, steps: dict[str, int], deadlines: dict[Kind, float] | None = None
    ) -> None:
        self._server, self._bundle, self._steps, self._deadlines = server, bundle, steps, deadlines
        self._seeds = iter(range(10**9))

    def alone(self, repeats: int) -> dict[Kind, float]:
        """Seconds of each kind without others, the median after a warm-up."""
        found = {}
        for kind in KINDS:
            times = [self.sent([Call(kind, 0.0, None)], {}).times(kind.length)[0] for _ in range(repeats + 1)]
            found[kind] = statistics.median(times[1:])
        return found

    def sent(self, calls: list[Call], alone: dict[Kind, float]) -> Load:
        """Send ``calls``, each at its moment, and wait for the ends of all."""
        load = Load(calls)
        asyncio.run(self._send(load, alone))
        ids = {call.id for call in calls}
        load.ends = {job: (created, end, how) for job, created, end, how in self._server.rows(ENDS) if job in ids}
        first, last = min(call.due for call in calls), max((end for _, end, _ in load.ends.values()), default=0.0)
        load.seconds = last - first
        return load

    async def _send(self, load: Load, alone: dict[Kind, float]) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=50)
        async with httpx2.AsyncClient(base_url=self._server.address, timeout=300.0, limits=limits) as client:
            start = time.time()
            watching = asyncio.create_task(self._watch(load.peak))
            await asyncio.gather(*(self._one(client, call, start, alone) for call in load.calls))
            while self._server.rows(LIVE) != [(0,)]:
                await asyncio.sleep(0.05)
            watching.cancel()

    async def _watch(self, peak: dict[str, float]) -> None:
        while True:
            for name, value in self._server.usage().items():
                peak[name] = max(value, peak.get(name, 0.0))
            await asyncio.sleep(SAMPLED)

    async def _one(self, client: httpx2.AsyncClient, call: Call, start: float, alone: dict[Kind, float]) -> None:
        call.due = start + call.at
        await asyncio.sleep(max(0.0, call.due - time.time()))
        body = call.kind.body(self._bundle, self._steps, next(self._seeds))
        if self._deadlines:
            body["deadline_s"] = self._deadlines[call.kind]
        answer = await client.post("/v1/videos", json=body)
        if answer.status_code == 429:
            return
        answer.raise_for_status()
        call.id = answer.json()["id"]
        if call.cancel is not None:
            await asyncio.sleep(call.cancel * alone.get(call.kind, 0.0))
            await client.post(f"/v1/videos/{call.id}/cancel")


def occupancy(before: dict[tuple[str, ...], float], after: dict[tuple[str, ...], float]) -> float:
    """Share of the computed rows that were some clip's, between two looks at the metrics."""
    used, computed = (
        after.get(("stiv_rows_total", kind), 0.0) - before.get(("stiv_rows_total", kind), 0.0)
        for kind in ("used", "computed")
    )
    return used / max(1.0, computed)


def quantile(metrics: dict[tuple[str, ...], float], name: str, share: float) -> float | None:
    """The bound of a histogram's bucket below which ``share`` of its times are; ``None`` if it has none."""
    buckets = [(key[1], value) for key, value in metrics.items() if key[0] == f"{name}_bucket"]
    total = max((value for _, value in buckets), default=0.0)
    bounds = [float(bound) for bound, value in buckets if value >= share * total]
    return min(bounds) if total else None


def summary(load: Load, alone: dict[Kind, float], slo: float) -> dict[str, Any]:
    """Numbers of a load."""
    wanted, met = load.wanted, load.met(alone, slo)
    times = {"all": load.times(*SHARES), **{length: load.times(length) for length in SHARES}}
    return {
        "jobs": len(load.calls),
        "completed": len(times["all"]),
        "refused": sum(not call.id for call in load.calls),
        "seconds": round(load.seconds, 2),
        "jobs_per_second": round(len(times["all"]) / load.seconds, 3),
        "goodput": round(met / load.seconds, 3),
        "slo_attainment": round(met / max(1, len(wanted)), 3),
        "times": {name: _percentiles(each) for name, each in times.items() if each},
        "peak_mib": {name: round(load.peak[name]) for name in ("server_mib", "worker_mib") if name in load.peak},
    }


def _percentiles(times: list[float]) -> dict[str, float]:
    found = {f"p{rank}": float(np.percentile(times, rank)) for rank in (50, 90, 99)}
    return {name: round(value, 3) for name, value in ({"mean": statistics.fmean(times)} | found).items()}


@dataclass(frozen=True)
class Plan:
    """How a ladder is climbed."""

    jobs: int
    load: float
    slo: float
    seed: int
    steps: dict[str, int]
    rungs: tuple[str, ...] = tuple(LADDER)
    repeats: int = 3

    def climb(self, bundle: Path) -> Iterator[dict[str, Any]]:
        """After each rung all rungs so far, and what each is worth against the first."""
        alone: dict[Kind, float] = {}
        rungs: dict[str, Any] = {}
        for name in self.rungs:
            rungs[name] = self._rung(name, bundle, alone)
            yield {
                "alone_seconds": {kind.name: round(seconds, 3) for kind, seconds in alone.items()},
                "rungs": rungs,
                "ratios": ratios(rungs),
            }

    def _rung(self, name: str, path: Path, alone: dict[Kind, float]) -> dict[str, Any]:
        bundle, random = Bundle.open(path), np.random.default_rng(self.seed)
        with tempfile.TemporaryDirectory() as folder:
            data, command = Path(folder) / "jobs", (*POLICY, LADDER[name])
            with serving(path, data, ("--latents-every", "0", "--slots", "8"), command) as server:
                if not alone:
                    alone |= Client(server, bundle, self.steps).alone(self.repeats)
                else:
                    Client(server, bundle, self.steps).sent([Call(kind, 0.0, None) for kind in KINDS], {})  # warm-up
                deadlines = {kind: self.slo * each for kind, each in alone.items()} if name == "deadlines" else None
                client = Client(server, bundle, self.steps, deadlines)
                return self._measured(name, client, server, alone, random)

    def _measured(
        self, name: str, client: Client, server: Served, alone: dict[Kind, float], random: np.random.Generator
    ) -> dict[str, Any]:
        client._seeds = iter(range(10**6, 10**9))  # nothing of the warm-up comes again
        burst = drawn(self.jobs, np.zeros(self.jobs), random)
        mean = statistics.fmean(alone[call.kind] for call in burst)
        calls = drawn(self.jobs, random.exponential(mean / self.load, self.jobs), random)
        before, found = server.counted(), {}
        for load, jobs in (("burst", burst), ("poisson", calls)):
            found[load] = summary(client.sent(jobs, alone), alone, self.slo)
            typer.echo(f"{name} {load}: {found[load]['completed']} jobs in {found[load]['seconds']:.0f} s", err=True)
        after = server.counted()
        latency = quantile(after, "stiv_cancel_latency_seconds", 0.99)
        return found | {"occupancy": round(occupancy(before, after), 3), "cancel_latency_p99_at_most": latency}


def ratios(rungs: dict[str, Any]) -> dict[str, Any]:
    """Each rung against the first: mean times of short jobs by its own (more is better), and jobs a second."""
    first = next(iter(rungs.values()))
    found: dict[str, Any] = {}
    for name, each in rungs.items():
        found[name] = {}
        for load in ("burst", "poisson"):
            short, base = (rung[load]["times"].get("short", {}).get("mean") for rung in (each, first))
            rate = each[load]["jobs_per_second"] / first[load]["jobs_per_second"]
            times = round(base / short, 2) if base and short else None
            found[name][load] = {"short_mean_times_lower": times, "jobs_per_second": round(rate, 3)}
    return found


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Jobs of each load.")] = 100,
    load: Annotated[float, typer.Option(min=0.01, help="Work that comes, by what one clip at a time can take.")] = 0.9,
    slo: Annotated[float, typer.Option(min=1.0, help="Service level, in times of a job alone.")] = 5.0,
    short: Annotated[int, typer.Option(min=1, help="Steps of short jobs.")] = 4,
    long: Annotated[int, typer.Option(min=1, help="Steps of long jobs.")] = 80,
    seed: Annotated[int, typer.Option(min=0, help="Of everything that is drawn.")] = 0,
    rung: Annotated[list[str] | None, typer.Option(help="Of the ladder; repeatable.", show_default="all")] = None,
) -> None:
    """Put each rung of the ladder under the same load, print what came of it, and write it as JSON."""
    rungs = tuple(rung or LADDER)
    if unknown := [each for each in rungs if each not in LADDER]:
        raise MeasurementError(f"--rung: there is no {unknown[0]!r}; there are {', '.join(LADDER)}")
    plan = Plan(jobs, load, slo, seed, {"short": short, "long": long}, rungs)
    head = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/bench_serve.py BUNDLE --jobs {jobs} --load {load:g} --slo {slo:g}"
        f" --short {short} --long {long} --seed {seed}" + "".join(f" --rung {each}" for each in rung or ()),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
    }
    text = ""
    for found in plan.climb(bundle):
        text = json.dumps(head | found, indent=2)
        if out is not None:
            write_text(out, text + "\n")
    typer.echo(text)


if __name__ == "__main__":
    run(main)
