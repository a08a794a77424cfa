"""The stage of ``stiv bench``: what is asked for, checked before anything runs, measured, and judged."""

import itertools
import logging
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from stiv_deploy.runtime.command.bench.cold import cold_start
from stiv_deploy.runtime.command.bench.machine import LoadMeter, cpu_clocks, machine, versions
from stiv_deploy.runtime.command.bench.maker import PipelineMaker, dims_of, threads_of, work_of
from stiv_deploy.runtime.command.bench.measure import MOST_WARM, Requests, probe, samples, warm_up
from stiv_deploy.runtime.command.bench.record import (
    STAGES,
    BenchReport,
    BundleFacts,
    ColdStart,
    Point,
    Sample,
    Stages,
    Work,
)
from stiv_deploy.runtime.command.bench.refusals import faults, loaded, refuse, too_few
from stiv_deploy.runtime.command.bench.roofline import roofline
from stiv_deploy.runtime.command.bench.statistics import least_samples, percentile
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest, new_seed
from stiv_deploy.runtime.progress import Progress, unheard

PROMPTS = (
    "a boat on a calm lake in the morning",
    "two dogs run over a field of snow",
    "rain falls on a window at night",
    "a hand writes a letter with a pen",
)
LOOK_SECONDS = 1.0
"""How long the machine is watched before anything is measured."""


class Size(NamedTuple):
    """Of a video."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to measure of the bundle in the folder ``bundle``: every batch with every size and number of steps.

    ``template`` says the rest, and what an empty ``sizes`` or ``steps`` means. ``percentiles`` are from 0 to 1;
    ``count`` None takes as many samples of each piece of work as they need. Seeds count on from ``seed``, by default
    another one each time, so that results which are kept beyond the process show, too. Raises :class:`RequestError`.
    """

    bundle: Path
    template: GenerationRequest
    prompts: tuple[str, ...] = PROMPTS
    batches: tuple[int, ...] = (1,)
    sizes: tuple[Size, ...] = ()
    steps: tuple[int, ...] = ()
    percentiles: tuple[float, ...] = (0.5, 0.9)
    count: int | None = None
    seed: int = field(default_factory=new_seed)
    texts: bool = False
    cold: bool = True
    anyway: bool = False
    backend: str | None = None
    device: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if not self.percentiles or not all(0 < each < 1 for each in self.percentiles):
            given = ", ".join(f"{100 * each:g}" for each in self.percentiles) or "none"
            raise RequestError(f"percentiles are above 0 and below 100, one or more, got {given}")
        if self.count is not None and self.count < 1:
            raise RequestError(f"the number of samples must be 1 or more, got {self.count}")
        if not self.prompts:
            raise RequestError("no prompt to measure with; give one or more")

    @property
    def samples(self) -> int:
        """Of each piece of work."""
        return max(map(least_samples, self.percentiles)) if self.count is None else self.count

    def kinds(self) -> Iterator[Requests]:
        """The kinds of work, one after another."""
        for batch, size, steps in itertools.product(self.batches, self.sizes or (None,), self.steps or (None,)):
            changed: dict[str, Any] = {} if steps is None else {"num_inference_steps": steps}
            if size is not None:
                changed |= {"num_frames": size.frames, "height": size.height, "width": size.width}
            yield Requests(self.template.changed(**changed), self.prompts, batch, self.seed)


def bench(request: BenchRequest, progress: Progress = unheard) -> BenchReport:
    """Measure; raises :class:`~stiv_deploy.runtime.errors.MeasurementError` where that is or was not fair.

    Raises what :meth:`StivPipeline.from_bundle` and its plan do, too, before anything is measured.
    """
    reasons = [*too_few(request.samples, request.percentiles)]
    refuse(reasons, anyway=request.anyway)
    progress("loading", 0, 1)
    with (
        StivPipeline.from_bundle(
            request.bundle, backend=request.backend, threads=request.threads, device=request.device
        ) as pipe,
        PipelineMaker(pipe, texts=request.texts) as maker,
        _quiet(),
    ):
        kinds = [(each, _work(pipe, each)) for each in request.kinds()]
        progress("what else runs here", 0, 1)
        refuse([*reasons, *loaded(watched())], anyway=request.anyway)
        report = _measured(request, pipe, maker, kinds, progress)
    found = faults(report)
    refuse(found, anyway=request.anyway)
    return report.model_copy(update={"invalid": tuple(found)})


def watched(seconds: float = LOOK_SECONDS) -> float:
    """What others do for so many seconds in which this process does nothing."""
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.others()


@contextmanager
def _quiet() -> Iterator[None]:
    """Words that the model does not know are no news in a measurement, and not a hundred times."""
    log = logging.getLogger("stiv_deploy.runtime.pipeline")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _work(pipe: StivPipeline, requests: Requests) -> Work:
    """What ``requests`` ask for; raises :class:`RequestError` where the bundle has it not, or not in one batch."""
    plan = pipe.plan(Requests(requests.template, requests.prompts, requests.batch)())
    if len(plan.batches) > 1:
        raise RequestError(f"{requests.batch} clips of {plan.size} are more than one batch of this bundle; give fewer")
    return work_of(plan)


def _measured(
    request: BenchRequest,
    pipe: StivPipeline,
    maker: PipelineMaker,
    kinds: Sequence[tuple[Requests, Work]],
    progress: Progress,
) -> BenchReport:
    cold = _cold(request, pipe, kinds[0][0], progress) if request.cold else None
    points = tuple(_point(request, pipe, maker, each, work, _news(progress, work, request)) for each, work in kinds)
    progress("are results kept?", 0, 1)
    manifest = pipe.bundle.manifest
    return BenchReport(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["stiv", *sys.argv[1:]]),
        bundle=BundleFacts(
            hash=pipe.bundle.hash,
            precision=manifest.precision,
            quantization=None if manifest.quantization is None else manifest.quantization.format,
            model=manifest.model,
            engines=sum(each.backend == pipe.backend.name for each in manifest.engines),
        ),
        backend=pipe.backend.name,
        device=pipe.backend.device,
        seed=request.seed,
        threads=threads_of(request.threads),
        caches=maker.caches,
        machine=machine(),
        versions=versions(),
        points=points,
        cold=cold,
        probe=probe(maker, kinds[-1][0]),
    )


def _cold(request: BenchRequest, pipe: StivPipeline, requests: Requests, progress: Progress) -> ColdStart:
    progress("a cold start", 0, 1)
    order = {
        "bundle": str(request.bundle),
        "backend": pipe.backend.name,
        "device": request.device,
        "threads": request.threads,
        "requests": [each.to_json() for each in requests()],
    }
    return cold_start(order)


def _news(progress: Progress, work: Work, request: BenchRequest) -> Callable[[], None]:
    """Counts samples; how many of warm-up there will be is not known."""
    count = itertools.count(1)
    return lambda: progress(str(work), min(next(count), MOST_WARM + request.samples), MOST_WARM + request.samples)


def _point(
    request: BenchRequest,
    pipe: StivPipeline,
    maker: PipelineMaker,
    requests: Requests,
    work: Work,
    news: Callable[[], None],
) -> Point:
    warm = warm_up(maker, requests, work, news)
    meter = LoadMeter()
    made = samples(maker, requests, request.samples, news)
    others = meter.others()
    per_evaluation = statistics.median(each.stages["denoise"] for each in made) / work.evaluations
    return Point(
        work=work,
        warm_up=warm,
        samples=tuple(made),
        latency={
            f"p{100 * share:g}": percentile([each.seconds for each in made], share) for share in request.percentiles
        },
        stages=Stages(**{name: statistics.median(each.stages[name] for each in made) for name in STAGES}),
        evaluation_seconds=per_evaluation,
        clips_per_second=work.batch / statistics.median(each.seconds for each in made),
        cpu_seconds=statistics.median(each.cpu_seconds for each in made),
        graphs=pipe.bundle.manifest.model.blocks + 3,
        launches=statistics.median(each.launches for each in made) / work.evaluations,
        host_gap=None if maker.queues else statistics.median(map(_gap, made)),
        roofline=roofline(pipe.bundle.manifest, dims_of(pipe, work), per_evaluation, pipe.backend.device),
        others=others,
        clocks=cpu_clocks(),
    )


def _gap(sample: Sample) -> float:
    """Of the steps' time, what passed outside graphs."""
    inside = sum(sample.graph_seconds.get(name, 0.0) for name in ("embed", "blocks", "head", "step"))
    return max(0.0, 1 - inside / sample.stages["denoise"])
