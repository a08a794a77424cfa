"""A server with several GPUs: a clip on each, one clip on all, or what the times say; simulated, nothing is run.

    python benchmarks/serve_forms.py M --size 20x512x512 --gpu H100 --gpus 4 --link nvlink --out forms.json

Seconds of calls are those that ``stiv bench plan`` predicts (bfloat16, native), by rows on one GPU and for one clip on
all. Clips come at random, so many that GPUs with a clip each would be busy for a given share of the time; a third of
them take 100 steps, the others 20. ``calm`` ones have no deadline; else three in ten are ``due`` in 0.7 of the time
that one GPU would take. Events are exact: as many clips share a GPU as the server lets in, each call takes what its
rows take, while all GPUs make a clip the others stand still, and none pauses for a more urgent one. What decides is the
server's own :class:`~stiv_deploy.serving.workers.floor.Floor`.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, cast

import typer
from command import run

from stiv_deploy.runtime.command.bench.cli import parse_size
from stiv_deploy.runtime.command.bench.plan import PlanRequest, plan
from stiv_deploy.runtime.command.bench.scale import Link
from stiv_deploy.runtime.command.bench.stage import Size as Asked
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.serving.costs import Costs
from stiv_deploy.serving.store.jobs import Job, Measured, Size
from stiv_deploy.serving.workers.floor import Floor, There
from stiv_deploy.serving.workers.order import Order

ROWS = 2
LOADS = (0.1, 0.3, 0.5, 0.7, 0.9)
STEPS, LONG, DUE = 20, 100, 0.7
Decide = Callable[[Floor, Sequence[Job], float], bool]
"""Whether the first of those that wait is to be made together now."""
FORMS: dict[str, Decide] = {
    "apart": lambda *_: False,
    "together": lambda *_: True,
    "measured": lambda floor, waiting, now: floor.chosen(waiting, now) is not None,
}


@dataclass
class Hall:
    """GPUs in simulated time, and the clips on them: evaluations left, by job, of each GPU and of all together."""

    costs: list[Measured]
    devices: int
    decide: Decide
    now: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    running: dict[str, tuple[Job, float]] = field(default_factory=dict)
    shared: str | None = None
    done: dict[str, float] = field(default_factory=dict)
    stood: dict[str, float] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)
    longest: float = 0.0
    """Seconds that all GPUs made one clip."""

    def __post_init__(self) -> None:
        names = [str(index) for index in range(self.devices)]
        self.floor = Floor(names, cast("Team", self), clock=lambda: self.now)
        self.floor.there = {place: partial(self._there, name) for place, name in enumerate(names)}
        for each in self.costs:
            self.floor.measure(*each)
        self._told, self._order = Costs(self.costs, self.devices), Order()

    def make(self, jobs: Sequence[Job]) -> dict[str, float]:
        """Seconds from the coming of each of ``jobs`` to its end, by id."""
        coming = sorted(jobs, key=lambda job: job.created, reverse=True)
        while coming or self.waiting or self.running:
            self._admit()
            ends = [left * self._seconds(job) for job, left in self._moving()]
            after = coming[-1].created - self.now if coming else min(ends)
            self._pass(min([after, *ends]))
            while coming and coming[-1].created <= self.now:
                self.waiting.append(coming.pop())
        return self.done

    def _on(self, device: str) -> list[Job]:
        return [job for job, _ in self.running.values() if job.worker == device]

    def _there(self, device: str) -> There:
        return There(self._on(device), [])

    def _moving(self) -> list[tuple[Job, float]]:
        return list(self.running.values()) if self.shared is None else [self.running[self.shared]]

    def _seconds(self, job: Job) -> float:
        """Seconds of an evaluation of ``job``, with those that it is made with."""
        alone = self.shared is None
        rows = ROWS * (len(self._on(job.worker or "")) if alone else 1)
        seconds = self._told.call(job.size, rows, together=not alone)
        assert seconds is not None
        return seconds

    def _pass(self, seconds: float) -> None:
        left = {job.id: max(0.0, left - seconds / self._seconds(job)) for job, left in self._moving()}
        self.now += seconds
        for job, _ in list(self.running.values()):
            spent = self.moved if job.id in left else self.stood
            spent[job.id] = spent.get(job.id, 0.0) + seconds
            if job.id not in left:
                continue
            self.running[job.id] = (replace(job, step=int(job.steps - left[job.id])), left[job.id])
            if left[job.id] < 1e-9:
                del self.running[job.id]
                self.done[job.id] = self.now - job.created
        if self.shared is not None and self.shared in self.done:
            self.longest = max(self.longest, self.moved[self.shared])
            self.shared = None
            self.floor.give_back()

    def _admit(self) -> None:
        self._order.see(self.waiting, self._told.alone)
        self.waiting.sort(key=lambda job: self._order.rank(job, self.now))
        while self.waiting and self.shared is None:
            job = self.waiting[0]
            if self.decide(self.floor, self.waiting, self.now):
                self.floor.take()
                self.shared = job.id
                device = self.floor.names[0]
            else:
                device = min(self.floor.names, key=lambda name: len(self._on(name)))
                if len(self._on(device)) >= self._told.width(job):
                    return
            self.running[job.id] = (replace(job, worker=device), float(job.evaluations))
            del self.waiting[0]


def clips(size: Size, alone: float, devices: int, load: float, count: int, seed: int) -> list[Job]:
    """``count`` jobs that come at random, ``alone`` seconds an evaluation, so that ``load`` of the time is worked."""
    chance = random.Random(seed)
    mean, now, found = (2 * STEPS + LONG) / 3 * alone, 0.0, []
    for number in range(count):
        now += chance.expovariate(load * devices / mean)
        steps = chance.choice((STEPS, STEPS, LONG))
        due = now + DUE * steps * alone if chance.random() < 0.3 else None
        job = Job(
            id=str(number), owner="", created=now, rows=ROWS, evaluations=steps, steps=steps, due=due, **size._asdict()
        )
        found.append(job)
    return found


def told(costs: list[Measured], devices: int, jobs: Sequence[Job]) -> dict[str, dict[str, float]]:
    """Mean seconds until a clip of ``jobs`` is done, and the share of deadlines met, if there are any, by form."""
    found = {}
    for name, decide in FORMS.items():
        done = Hall(costs, devices, decide).make(jobs)
        met = [done[job.id] <= job.due - job.created for job in jobs if job.due is not None]
        found[name] = {"seconds": fmean(done.values())} | ({"met": fmean(met)} if met else {})
    return found


def predicted(model: str, size: Size, gpu: str, gpus: int, link: Link) -> list[Measured]:
    """Seconds of calls of ``model`` for 1, 2, 4 and 8 clips on one ``gpu``, and for one clip on ``gpus``."""
    found = []
    for clip in (1, 2, 4, 8):
        rows, counts = ROWS * clip, (gpus,) if clip == 1 else ()
        asked = PlanRequest(
            what=model,
            size=Asked(*size),
            rows=rows,
            gpus=(gpu,),
            precisions=("bfloat16",),
            forms=("native",),
            counts=counts,
            link=link,
        )
        seen = plan(asked)
        found.append(Measured(size, rows, seen.planned[0].prediction.seconds))
        found += [Measured(size, rows, each.seconds, each.gpus) for each in seen.scaled]
    return found


def main(
    model: Annotated[str, typer.Argument(metavar="BUNDLE|XL|XXL|M", help="As 'stiv bench plan' takes it.")] = "M",
    size: Annotated[str, typer.Option(metavar="FxHxW", help="Frames, height and width.")] = "20x512x512",
    gpu: Annotated[str, typer.Option(help="GPU.")] = "H100",
    gpus: Annotated[int, typer.Option(min=2, help="How many.")] = 4,
    link: Annotated[str, typer.Option(help="What is between them: nvlink, pcie5, pcie4.")] = "nvlink",
    count: Annotated[int, typer.Option(min=1, help="Clips of each simulation.")] = 2000,
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
) -> None:
    """Simulate both fixed forms and the measured one at several loads, print them, and write them as JSON."""
    chosen = Size(*parse_size(size))
    costs = predicted(model, chosen, gpu, gpus, cast("Link", link))
    rows: list[dict[str, Any]] = []
    for load in LOADS:
        jobs = clips(chosen, costs[0].seconds, gpus, load, count, seed=0)
        row = {"calm": told(costs, gpus, [replace(job, due=None) for job in jobs]), "due": told(costs, gpus, jobs)}
        rows.append({"load": load, **row})
        for kind, found in row.items():
            print(f"load {load:.1f}, {kind}: {'; '.join(_words(name, each) for name, each in found.items())}")
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "model": model,
        "size": size,
        "gpu": gpu,
        "gpus": gpus,
        "link": link,
        "count": count,
        "calls": [[each.rows, each.seconds, each.devices] for each in costs],
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def _words(name: str, found: dict[str, float]) -> str:
    return f"{name} {found['seconds']:.1f} s" + (f", {found['met']:.0%} met" if "met" in found else "")


if __name__ == "__main__":
    run(main)
