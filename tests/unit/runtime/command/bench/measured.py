"""A measurement that is fair, to spoil one thing at a time."""

from typing import Any

from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.command.bench.record import (
    STAGES,
    BenchReport,
    BundleFacts,
    CacheProbe,
    Clocks,
    Machine,
    Point,
    Sample,
    Stages,
    Verification,
    WarmUp,
    Work,
)
from stiv_deploy.runtime.command.bench.roofline import Roofline
from stiv_deploy.runtime.command.bench.statistics import percentile, ratio

MODEL = ModelFacts(
    name="toy", blocks=2, width=4, heads=1, patch=(1, 1), latent_channels=4, text_width=4, max_text_tokens=5,
    base_frames=2, base_grid=(2, 2), rope_theta=100.0, temporal=True, spatial_factor=2, temporal_factor=1,
)  # fmt: skip
WORK = Work(
    batch=1, frames=4, height=8, width=8, steps=4, evaluations=4, solver="euler", guidance="jit 3", rows=2,
    row_evaluations=8, given=0,
    decode_tile=None,
)  # fmt: skip
SECONDS = [1.0 + 0.001 * (index % 7) for index in range(36)]


def a_sample(seconds: float, *, bound: int = 0, **stages: float) -> Sample:
    own = dict.fromkeys(STAGES, 0.0) | {"denoise": 0.9 * seconds, "write": 0.1 * seconds} | stages
    counts: dict[str, int] = {"launches": 20, "bound": bound}
    graphs = {"blocks": seconds / 2}
    return Sample(seconds=seconds, stages=Stages(**own), cpu_seconds=seconds, graph_seconds=graphs, **counts)


def a_point(seconds: list[float], shares: tuple[float, ...] = (0.5, 0.9), **values: Any) -> Point:
    line = Roofline(
        linear=1.0, attention=1.0, bytes=1.0, operations_per_second=1.0, bytes_per_second=1.0, least_seconds=None,
        share=None,
    )  # fmt: skip
    own: dict[str, Any] = {
        "work": WORK,
        "warm_up": WarmUp(work=WORK, seconds=(1.0,) * 6, stable=True),
        "samples": tuple(map(a_sample, seconds)),
        "latency": {f"p{100 * share:g}": percentile(seconds, share) for share in shares},
        "stages": a_sample(1.0).stages,
        "evaluation_seconds": 0.2,
        "clips_per_second": 1.0,
        "cpu_seconds": 1.0,
        "graphs": 5,
        "launches": 5.0,
        "host_gap": 0.01,
        "roofline": line,
        "others": 0.0,
        "clocks": Clocks(governor="performance", cpu_most_mhz=3000.0),
    }
    return Point(**own | values)


def a_report(points: tuple[Point, ...] = (), **values: Any) -> BenchReport:
    own: dict[str, Any] = {
        "date": "2026-11-28T12:00:00+00:00",
        "command": "stiv bench bundle",
        "bundle": BundleFacts(hash="0" * 64, precision="float32", quantization=None, model=MODEL, engines=0),
        "verification": Verification(state="verified", reason="all was right"),
        "backend": "onnxruntime",
        "device": "CPU (2 cores)",
        "seed": 0,
        "threads": 2,
        "machine": Machine(cpu="a processor", cores=2, memory_gib=8.0, gpus=(), system="Linux"),
        "versions": {"python": "3.11.0"},
        "points": points or (a_point(SECONDS),),
        "probe": CacheProbe(repeated=(1.0, 1.1), fresh=(1.0, 1.1), ratio=ratio((1.0, 1.1), (1.0, 1.1))),
    }
    return BenchReport(**own | values)
