"""What a generation costs beside its graphs, and whether memory grows with the number of steps.

    python benchmarks/runtime_overhead.py BUNDLE --out benchmarks/results/NAME.json

Overhead is (total - seconds inside graphs) / total of a generation, the median of several after a warm-up, text
encoding and decoding included. Peak memory is the resident set of a fresh process that runs one generation of so many
steps; processes of few and many steps are interleaved.
"""

import json
import platform
import resource
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

PROMPT = "a red star moving left"
CHILD = "--child"


def generate_once(bundle: Path, steps: int, backend: str) -> dict[str, float]:
    """In a fresh process: one generation; its peak resident set in MiB."""
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

    with StivPipeline.from_bundle(bundle, backend=backend) as pipe:
        pipe(prompt=PROMPT, num_inference_steps=steps, seed=0)
    return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def peak_memory(bundle: Path, steps: list[int], backend: str, repeats: int) -> dict[str, float]:
    """Median peak MiB by number of steps, each run in a process of its own."""
    peaks: dict[int, list[float]] = {count: [] for count in steps}
    for _ in range(repeats):
        for count in steps:
            command = [sys.executable, __file__, CHILD, str(bundle), str(count), backend]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            peaks[count].append(json.loads(output)["peak_mib"])
    return {str(count): round(statistics.median(values), 1) for count, values in peaks.items()}


def overhead(bundle: Path, steps: int, backend: str, repeats: int) -> dict[str, Any]:
    """Seconds in all, inside graphs, and the share outside, by median over ``repeats`` generations."""
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline

    totals, shares = [], []
    with StivPipeline.from_bundle(bundle, backend=backend, profile=True) as pipe:
        for repeat in range(repeats + 1):
            timings = pipe(prompt=PROMPT, num_inference_steps=steps, seed=repeat).timings
            if repeat:  # the first loads the graphs
                totals.append(timings["total"])
                shares.append(1 - timings["graphs"] / timings["total"])
    return {
        "steps": steps,
        "seconds": round(statistics.median(totals), 4),
        "overhead": round(statistics.median(shares), 5),
        "overhead_worst": round(max(shares), 5),
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    out: Annotated[Path | None, typer.Option(help="Write the result here as JSON.")] = None,
    backend: Annotated[str, typer.Option(help="Backend.")] = "onnxruntime",
    repeats: Annotated[int, typer.Option(min=1, help="Measured generations, and processes per step count.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the timed generations.")] = 30,
) -> None:
    """Measure overhead and peak memory, print them, and write them as JSON."""
    import onnxruntime

    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/runtime_overhead.py BUNDLE --repeats {repeats} --steps {steps}",
        "machine": f"{platform.machine()}, {len(_cores())} cores",
        "versions": {"python": platform.python_version(), "onnxruntime": onnxruntime.__version__},
        "backend": backend,
        "overhead": overhead(bundle, steps, backend, repeats),
        "peak_mib_by_steps": peak_memory(bundle, [10, 30, 100, 300], backend, repeats),
    }
    typer.echo(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _cores() -> set[int]:
    import os

    return os.sched_getaffinity(0)


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        print(json.dumps(generate_once(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
    else:
        from command import run

        run(main)
