"""One clip on several devices: is it the clip of one device, what moves, and how much sooner is it there?

    python benchmarks/bench_parallel.py bundle --devices 0,1,2,3 --parallel cfg2xdsp2 --parallel dsp4
    python benchmarks/bench_parallel.py bundle --devices cpu,cpu --parallel dsp2 --processes

The bundle has halves (``stiv export --halves``), and on GPUs engines. First each form's latents are held against those
of one device: two right implementations lie within the gates of the bundle's golden runs from the truth, so twice the
largest from each other. Then one device and the form make the clip by turns; what counts is the median of the ratios.
On CPUs one device has all the threads that the form's devices share out, so that the ratio tells what sharing costs.
Of a transport of threads the bytes that came from other devices are those that the leader took.
"""

import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.golden import read_golden
from stiv_deploy.runtime.errors import BundleError, MeasurementError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.parallel.placement import parse_devices


def gate_of(bundle: Bundle) -> float:
    """Relative L2 distance that the latents of two right implementations of ``bundle`` may have."""
    sampling = read_golden(bundle).sampling
    if sampling is None:
        raise BundleError(f"{bundle.folder}: has no golden runs to take a gate from; export it where ModelOpt is")
    return 2 * max(output.gate for run in sampling.runs for output in run.outputs)


def latents_of(pipe: StivPipeline, plan: GenerationPlan) -> tuple[np.ndarray, float]:
    """Latents of ``plan``, and the seconds that they took."""
    started = time.perf_counter()
    found = pipe.run(plan, output_type="latent").latents
    return found, time.perf_counter() - started


def measure(one: StivPipeline, many: StivPipeline, request: GenerationRequest, repeats: int) -> dict[str, Any]:
    """Distance, bytes, and times by turns; :class:`MeasurementError` where it is another clip."""
    plan, gate = one.plan(request), gate_of(one.bundle)
    (right, _), (found, _) = latents_of(one, plan), latents_of(many, many.plan(request))
    distance = float(np.linalg.norm(found - right) / np.linalg.norm(right))
    if not distance <= gate:
        raise MeasurementError(f"the clip of several devices is another: distance {distance:.1e}, at most {gate:.1e}")
    team = many._team
    assert team is not None
    before = team.transport.received
    pairs = [(latents_of(one, plan)[1], latents_of(many, plan)[1]) for _ in range(repeats)]
    return {
        "parallel": str(team.placement),
        "transport": type(team.transport).__name__,
        "distance": distance,
        "gate": gate,
        "leader_received_bytes": (team.transport.received - before) // repeats,
        "seconds_one": round(statistics.median(alone for alone, _ in pairs), 4),
        "seconds": round(statistics.median(shared for _, shared in pairs), 4),
        "speedup": round(statistics.median(alone / shared for alone, shared in pairs), 3),
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle with halves, and engines where devices are GPUs.")],
    devices: Annotated[str, typer.Option(help="GPUs, as 0,1,2,3, or cpu,cpu.")],
    parallel: Annotated[list[str] | None, typer.Option(help="Form (repeatable). Default: automatic.")] = None,
    processes: Annotated[bool, typer.Option("--processes", help="A process for each device.")] = False,
    backend: Annotated[str | None, typer.Option(help="Default: the best.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads in all.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Turns.")] = 5,
    out: Annotated[Path | None, typer.Option(help="Write the result here.")] = None,
) -> None:
    """Check and time one clip on several devices against one."""
    names = parse_devices(devices)
    request = GenerationRequest(prompt="", num_inference_steps=steps, seed=0)
    device = 0 if names[0] == "cpu" else int(names[0])
    rows = []
    with StivPipeline.from_bundle(bundle, backend, threads, device=device) as one:
        machine = one.backend.machine.model_dump()
        for form in parallel or [None]:
            with StivPipeline.from_bundle(
                bundle, one.backend.name, threads, devices=names, parallel=form, processes=processes
            ) as many:
                rows.append(measure(one, many, request, repeats))
            typer.echo(rows[-1])
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "bundle": Bundle.open(bundle).hash,
        "machine": {"platform": platform.platform(), **machine},
        "devices": names,
        "processes": processes,
        "steps": steps,
        "repeats": repeats,
        "rows": rows,
    }
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
