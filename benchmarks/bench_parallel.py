"""One clip on several devices: is it the clip of one device, what moves, and how much sooner is it there?

    python benchmarks/bench_parallel.py bundle --devices 0,1,2,3 --parallel cfg2xdsp2 --parallel dsp4
    python benchmarks/bench_parallel.py bundle --devices cpu,cpu --parallel dsp2 --processes

The bundle has halves (``stiv export --halves``), and on GPUs engines. First each form's latents are held against those
of one device: two right implementations lie within the gates of the bundle's golden runs from the truth, so twice the
largest from each other. Then one device and the form make the clip by turns; what counts is the median of the ratios.
Of a transport of threads the bytes that came from other devices are those that the leader took.

On CPUs one device has as many threads as the form's devices together, be they more than there are cores. The leader
computes its share, and is in exchanges for the rest of the clip: so one device's seconds and the leader's in exchanges
explain the form's where their sum is no less (``explained``, at least 1). Waiting has in it what others take longer to
compute; ``explained_least`` counts the exchanges of the device that is in them the least, which nobody's slowness
makes longer. ``seconds_apart`` is what the machine gives without any exchange: as many workers as devices, with as
many threads each, make a clip each at the same time; a clip of theirs. ``seconds_exchange`` is the other part, the
form's exchanges with nothing computed between them. ``explained_apart`` is the sum of these two by the form's seconds:
nothing is in it twice, and what it leaves to 1 is waiting for each other.
"""

import json
import platform
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from apart import Apart, cpu_pipeline, latent_seconds
from exchange_alone import Alone, Told

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.golden import read_golden
from stiv_deploy.runtime.errors import BundleError, MeasurementError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.parallel.clock import Spent
from stiv_deploy.runtime.sampling.parallel.opening import shared_threads
from stiv_deploy.runtime.sampling.parallel.placement import CPU, parse_devices, place
from stiv_deploy.runtime.sampling.parallel.team import Team


class Turn(NamedTuple):
    """Seconds of one clip each: one device's, the form's, of the latter each device's in exchanges, and its parts."""

    one: float
    shared: float
    spent: list[Spent]
    apart: float | None = None
    exchange: float | None = None

    @property
    def explained(self) -> float:
        """Seconds of one device and the leader's in exchanges, by those of the form."""
        return (self.one + self.spent[0].total) / self.shared

    @property
    def explained_least(self) -> float:
        """The same with the exchanges of the device that is in them the least."""
        return (self.one + min(spent.total for spent in self.spent)) / self.shared

    @property
    def explained_apart(self) -> float | None:
        """Seconds apart and of the exchanges alone, by those of the form."""
        return None if self.apart is None or self.exchange is None else (self.apart + self.exchange) / self.shared


class Parts(NamedTuple):
    """What a clip of several CPUs consists of: computing, and exchanges."""

    apart: Apart
    alone: Alone


def gate_of(bundle: Bundle) -> float:
    """Relative L2 distance that the latents of two right implementations of ``bundle`` may have."""
    sampling = read_golden(bundle).sampling
    if sampling is None:
        raise BundleError(f"{bundle.folder}: has no golden runs to take a gate from; export it where ModelOpt is")
    return 2 * max(output.gate for run in sampling.runs for output in run.outputs)


def latents_of(pipe: StivPipeline, plan: GenerationPlan) -> np.ndarray:
    """Latents of ``plan``."""
    return pipe.run(plan, output_type="latent").latents


def measure(
    one: StivPipeline, many: StivPipeline, parts: Parts | None, request: GenerationRequest, repeats: int
) -> dict[str, Any]:
    """Distance, bytes, and times by turns; :class:`MeasurementError` where it is another clip."""
    gate, team = gate_of(one.bundle), many._team
    assert team is not None
    told = Told(team)
    right, found = latents_of(one, one.plan(request)), latents_of(many, many.plan(request))
    distance = float(np.linalg.norm(found - right) / np.linalg.norm(right))
    if not distance <= gate:
        raise MeasurementError(f"the clip of several devices is another: distance {distance:.1e}, at most {gate:.1e}")
    assert told.work is not None
    exchanges = (told.work, tuple(told.rows))
    if parts is not None:
        parts.apart(request)
    before = team.transport.received
    turns = []
    for _ in range(repeats):
        turns.append(turn(one, many, team, request))
        if parts is not None:
            turns[-1] = turns[-1]._replace(apart=parts.apart(request), exchange=parts.alone(*exchanges))
    return {
        "parallel": str(team.placement),
        "transport": type(team.transport).__name__,
        "distance": distance,
        "gate": gate,
        "leader_received_bytes": (team.transport.received - before) // repeats,
        **account(turns),
    }


def turn(one: StivPipeline, many: StivPipeline, team: Team, request: GenerationRequest) -> Turn:
    """One clip of each way."""
    alone = latent_seconds(one, request)
    before = team.settle()
    shared = latent_seconds(many, request)
    spent = [now.since(then) for now, then in zip(team.settle(), before, strict=True)]
    return Turn(alone, shared, spent)


def account(turns: list[Turn]) -> dict[str, Any]:
    """Medians of the turns: seconds, their ratios, and by device the seconds in exchanges and their share of a clip."""
    return {
        "seconds_one": _median(each.one for each in turns),
        "seconds": _median(each.shared for each in turns),
        "seconds_apart": _median(each.apart for each in turns),
        "seconds_exchange": _median(each.exchange for each in turns),
        "speedup": _median(each.one / each.shared for each in turns),
        "explained": _median(each.explained for each in turns),
        "explained_least": _median(each.explained_least for each in turns),
        "explained_apart": _median(each.explained_apart for each in turns),
        "exchange": [
            {
                "waiting": _median(each.spent[rank].waiting for each in turns),
                "copying": _median(each.spent[rank].copying for each in turns),
                "share": _median(each.spent[rank].total / each.shared for each in turns),
            }
            for rank in range(len(turns[0].spent))
        ],
    }


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(statistics.median(known), 6) if known else None


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle with halves, and engines where devices are GPUs.")],
    devices: Annotated[str, typer.Option(help="GPUs, as 0,1,2,3, or cpu,cpu.")],
    parallel: Annotated[list[str] | None, typer.Option(help="Form (repeatable). Default: automatic.")] = None,
    processes: Annotated[bool, typer.Option("--processes", help="A process for each device.")] = False,
    nccl: Annotated[bool, typer.Option("--nccl", help="Processes that exchange by NCCL.")] = False,
    backend: Annotated[str | None, typer.Option(help="Default: the best.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads in all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Check and time one clip on several devices against one."""
    names = parse_devices(devices)
    request = GenerationRequest(prompt="", num_inference_steps=steps, seed=0)
    manifest = Bundle.open(bundle).manifest
    each = shared_threads(place(names, None, manifest.model, manifest.sampling.guidance_mode), threads)
    rows = []
    with ExitStack() as opened:
        parts = None
        if names[0] == CPU:
            assert each is not None
            parts = Parts(
                opened.enter_context(Apart(bundle, len(names), each, processes=processes)),
                opened.enter_context(Alone(bundle, len(names), processes=processes)),
            )
            one = opened.enter_context(cpu_pipeline(bundle, each * len(names)))
        else:
            one = opened.enter_context(StivPipeline.from_bundle(bundle, backend, threads, device=int(names[0])))
        machine = one.backend.machine.model_dump()
        for form in parallel or [None]:
            with StivPipeline.from_bundle(
                bundle, one.backend.name, threads, devices=names, parallel=form, processes=processes, nccl=nccl
            ) as many:
                rows.append(measure(one, many, parts, request, repeats))
            typer.echo(rows[-1])
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "bundle": Bundle.open(bundle).hash,
        "machine": {"platform": platform.platform(), **machine},
        "devices": names,
        "processes": processes or nccl,
        "threads_each": each,
        "steps": steps,
        "repeats": repeats,
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
