"""A cold start: a fresh process that opens a bundle, makes one clip, and tells what that took.

    python -m stiv_deploy.runtime.command.bench.cold < ORDER

Reads its order as JSON from standard input and writes one line of JSON to standard output.
"""

import json
import subprocess
import sys
import time
from typing import Any, TextIO

from stiv_deploy.runtime.command.bench.record import ColdStart
from stiv_deploy.runtime.errors import MeasurementError, one_line

MODULE = "stiv_deploy.runtime.command.bench.cold"
TIME_LIMIT = 3_600.0


def cold_start(order: dict[str, Any]) -> ColdStart:
    """Run ``order`` (see :func:`work`) in a fresh process; raises :class:`MeasurementError` with what it said."""
    began = time.perf_counter()
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(
        command, input=json.dumps(order), capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise MeasurementError(f"the cold start failed: {one_line(said, 300)}")
    return ColdStart(seconds=seconds, **json.loads(done.stdout.splitlines()[-1]))


def work(order: dict[str, Any]) -> dict[str, float]:
    """Open ``bundle`` on ``backend``, ``device`` and ``threads``, and make the clips of ``requests`` once."""
    began = time.perf_counter()
    from stiv_deploy.runtime.command.bench.maker import PipelineMaker
    from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
    from stiv_deploy.runtime.pipeline.request import GenerationRequest

    imported = time.perf_counter()
    where = {name: order[name] for name in ("backend", "device", "threads")}
    with StivPipeline.from_bundle(order["bundle"], **where) as pipe, PipelineMaker(pipe) as maker:
        opened = time.perf_counter()
        maker.make([GenerationRequest.from_json(each) for each in order["requests"]])
        first = time.perf_counter()
    return {
        "imported": imported - began,
        "opened": opened - imported,
        "first": first - opened,
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """The most memory of this process that was ever resident."""
    import psutil

    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def main(source: TextIO, target: TextIO) -> None:
    """One order in, one line out."""
    target.write(json.dumps(work(json.load(source))) + "\n")


if __name__ == "__main__":
    main(sys.stdin, sys.stdout)
