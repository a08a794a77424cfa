"""Times of GPU work: CUDA events around graph replays, functions taking turns, buffers that no cache holds.

On the CPU the same code measures with the host's clock; such times say that the script runs and nothing else.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Work = Callable[[int], object]
"""One launch; the number counts launches, and the function takes its buffers by it: ``sets[number % len(sets)]``."""

COLD_BYTES = 150_000_000
"""Least bytes that launches touch before they come back to the same ones; three times the L2 if that is more."""
WARM_UPS = 3


@dataclass(frozen=True)
class Timing:
    """Microseconds of one launch over the rounds: median, first and ninth decile, and how it was measured."""

    median_us: float
    low_us: float
    high_us: float
    how: Literal["graph", "stream", "host"] = "graph"

    def rate(self, nbytes: float) -> float:
        """Bytes per second of a launch that moves ``nbytes``."""
        return nbytes / self.median_us * 1e6


def cold_bytes(device: torch.device | str) -> int:
    """Bytes that buffers in rotation must have together so that each launch finds its own in memory only."""
    if torch.device(device).type != "cuda":
        return 0
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(COLD_BYTES, 3 * l2)


def buffer_sets(nbytes: float, device: torch.device | str) -> int:
    """How many sets of buffers of ``nbytes`` each to rotate through: at least two, together :func:`cold_bytes`."""
    return max(2, int(-(-cold_bytes(device) // max(nbytes, 1))) + 1)


def interleaved(functions: dict[str, Work], rounds: int, replays: int, device: torch.device | str) -> dict[str, Timing]:
    """Time each of ``functions``: every round runs each of them once, ``replays`` launches in a CUDA graph.

    A function is called with 0, 1, .. ``replays`` - 1. One that cannot be captured is timed launch by launch, its
    ``how`` is ``stream``. Errors of a function's first calls pass through.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return _on_host(functions, rounds, replays)
    with torch.cuda.device(device):
        passes = {name: _captured(function, replays) for name, function in functions.items()}
        samples: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(rounds + 1):  # the first round is a warm-up
            for name, (run, _) in passes.items():
                microseconds = _event_time(run) / replays
                if number:
                    samples[name].append(microseconds)
        return {name: _timing(values, passes[name][1]) for name, values in samples.items()}


def copy_rate(device: torch.device | str, nbytes: int, rounds: int = 11, replays: int = 20) -> float:
    """Bytes per second, read and written counted, of device copies that move ``nbytes`` each; caches cold."""
    half = max(int(nbytes) // 2, 1)
    count = buffer_sets(2 * half, device)
    pairs = [
        (
            torch.randint(0, 256, (half,), dtype=torch.uint8, device=device),
            torch.zeros(half, dtype=torch.uint8, device=device),
        )
        for _ in range(count)
    ]

    def copy(number: int) -> None:
        source, target = pairs[number % count]
        target.copy_(source)

    return interleaved({"copy": copy}, rounds, replays, device)["copy"].rate(2 * half)


def _on_host(functions: dict[str, Work], rounds: int, replays: int) -> dict[str, Timing]:
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            for number in range(replays):
                function(number)
            samples[name].append((time.perf_counter() - started) * 1e6 / replays)
    return {name: _timing(values, "host") for name, values in samples.items()}


def _timing(samples: list[float], how: Literal["graph", "stream", "host"]) -> Timing:
    ordered = sorted(samples)
    tenth = round(0.1 * (len(ordered) - 1))
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], how)


def _captured(function: Work, replays: int) -> tuple[Callable[[], object], Literal["graph", "stream"]]:
    """``replays`` launches as one call, by a CUDA graph where that is possible."""

    def launches() -> None:
        for number in range(replays):
            function(number)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(WARM_UPS):
            function(number)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            launches()
    except RuntimeError:
        torch.cuda.synchronize()
        return launches, "stream"
    return graph.replay, "graph"


def _event_time(run: Callable[[], object]) -> float:
    """Microseconds between events around ``run``, enqueued while the device is busy with the same: no gap counts."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    run()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    milliseconds: float = start.elapsed_time(stop)
    return milliseconds * 1e3
