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
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from stiv_deploy.runtime.bundle.verified import read_result
from stiv_deploy.runtime.command.bench.cold import cold_start
from stiv_deploy.runtime.command.bench.loadgen import (
    LEAST_QUERIES,
    LEAST_SECONDS,
    Order,
    check_loadgen,
    run_loadgen,
)
from stiv_deploy.runtime.command.bench.machine import LoadMeter, cpu_clocks, machine, versions
from stiv_deploy.runtime.command.bench.maker import PipelineMaker, dims_of, threads_of, work_of
from stiv_deploy.runtime.command.bench.measure import MOST_WARM, Requests, probe, samples, warm_up
from stiv_deploy.runtime.command.bench.mllog import LoadgenResult, Scenario
from stiv_deploy.runtime.command.bench.nvidia import Gpu
from stiv_deploy.runtime.command.bench.ranges import Ranges
from stiv_deploy.runtime.command.bench.record import (
    STAGES,
    BenchReport,
    BundleFacts,
    ColdStart,
    Point,
    Sample,
    Stages,
    Verification,
    Work,
)
from stiv_deploy.runtime.command.bench.refusals import faults, loaded, refuse, too_few, unproven
from stiv_deploy.runtime.command.bench.roofline import roofline
from stiv_deploy.runtime.command.bench.statistics import least_samples, percentile
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.files import replaced_folder
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest, new_seed
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.sampling.hooks import Mark, unmarked

PROMPTS = (
    "a boat on a calm lake in the morning",
    "two dogs run over a field of snow",
    "rain falls on a window at night",
    "a hand writes a letter with a pen",
)
SECONDS_LIMIT = 1e6
MORE = 6
"""Times as many samples as the percentiles take, at most, until the median is known well enough."""
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
    ``count`` None takes as many samples of each piece of work as they need, and more until the median is well known.
    Seeds count on from ``seed``, by default another one each time, so that results which are kept beyond the process
    show, too. In a ``scenario`` LoadGen asks, for ``queries`` clips (None: what it takes at least) and
    ``least_seconds`` or more, and its logs are kept in the folder ``logs``, if any. With ``nvtx`` phases and graphs are
    ranges of NVTX. Raises :class:`RequestError`.
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
    scenario: Scenario | None = None
    queries: int | None = None
    least_seconds: float = LEAST_SECONDS
    logs: Path | None = None
    texts: bool = False
    nvtx: bool = False
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
        if self.scenario is not None:
            self._check_scenario()
        elif self.logs is not None:
            raise RequestError("--loadgen-logs keeps what LoadGen writes of a scenario; give --scenario, too")

    def _check_scenario(self) -> None:
        kinds = len(self.batches) * max(1, len(self.sizes)) * max(1, len(self.steps))
        if kinds > 1:
            raise RequestError(f"a scenario is of one kind of work, got {kinds}; give one batch, size and steps")
        if self.scenario == "singlestream" and self.batches != (1,):
            raise RequestError(f"a single stream asks for one clip at a time, got --batch {self.batches[0]}")
        if self.count is not None:
            raise RequestError("--samples is for the quick mode; give --queries with a scenario")
        if self.least_queries < 1 or not 0 <= self.least_seconds <= SECONDS_LIMIT:
            raise RequestError(
                f"a scenario takes 1 query or more and 0 to {SECONDS_LIMIT:g} seconds, got {self.least_queries} and "
                f"{self.least_seconds:g}"
            )

    @property
    def least_queries(self) -> int:
        """Of a scenario."""
        assert self.scenario is not None
        return LEAST_QUERIES[self.scenario] if self.queries is None else self.queries

    @property
    def samples(self) -> int:
        """Of each piece of work."""
        if self.scenario is not None:
            return -(-self.least_queries // self.batches[0])
        return max(map(least_samples, self.percentiles)) if self.count is None else self.count

    @property
    def most_samples(self) -> int:
        """Of each piece of work, where the number of samples is not given."""
        return MORE * self.samples if self.count is None else self.samples

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
    if request.scenario is not None:
        check_loadgen()
    mark: Mark = Ranges() if request.nvtx else unmarked
    reasons = [*too_few(request.samples, request.percentiles)]
    refuse(reasons, anyway=request.anyway)
    progress("loading", 0, 1)
    with (
        StivPipeline.from_bundle(
            request.bundle, backend=request.backend, threads=request.threads, device=request.device, mark=mark
        ) as pipe,
        PipelineMaker(pipe, texts=request.texts, mark=mark) as maker,
        _quiet(),
    ):
        kinds = [(each, work(pipe, each)) for each in request.kinds()]
        reasons += unproven(verification(pipe))
        refuse(reasons, anyway=request.anyway)
        progress("what else runs here", 0, 1)
        refuse([*reasons, *loaded(watched()), *_gpu_loaded(request, maker)], anyway=request.anyway)
        report = _measured(request, pipe, maker, kinds, progress)
    found = faults(report)
    refuse(found, anyway=request.anyway)
    return report.model_copy(update={"invalid": tuple(found)})


def verification(pipe: StivPipeline) -> Verification:
    """What is known of the outputs of ``pipe``."""
    verdict = read_result(pipe.bundle, pipe.backend.machine)
    return Verification(state=verdict.state, reason=verdict.reason)


def circumstances(pipe: StivPipeline, threads: int | None) -> dict[str, Any]:
    """What :class:`~stiv_deploy.runtime.command.bench.record.Circumstances` has of what ``pipe`` makes now."""
    manifest = pipe.bundle.manifest
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["stiv", *sys.argv[1:]]),
        "bundle": BundleFacts(
            hash=pipe.bundle.hash,
            precision=manifest.precision,
            quantization=None if manifest.quantization is None else manifest.quantization.format,
            model=manifest.model,
            engines=sum(each.backend == pipe.backend.name for each in manifest.engines),
        ),
        "verification": verification(pipe),
        "backend": pipe.backend.name,
        "device": pipe.backend.device,
        "threads": threads_of(threads),
        "machine": machine(),
        "versions": versions(),
    }


def watched(seconds: float = LOOK_SECONDS) -> float:
    """What others do for so many seconds in which this process does nothing."""
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.others()


def _gpu_loaded(request: BenchRequest, maker: PipelineMaker) -> list[str]:
    """Whether the GPU is at work, of which this process gives it none yet."""
    gpu = Gpu.open(request.device) if maker.queues else None
    busy = None if gpu is None else gpu.busy()
    return [*loaded(busy, "the GPU")] if busy is not None else []


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


def work(pipe: StivPipeline, requests: Requests) -> Work:
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
    results: list[LoadgenResult] = []
    points = tuple(
        _point(request, pipe, maker, each, work, _news(progress, work, request), results) for each, work in kinds
    )
    progress("are results kept?", 0, 1)
    return BenchReport(
        **circumstances(pipe, request.threads),
        seed=request.seed,
        caches=maker.caches,
        nvtx=request.nvtx,
        points=points,
        cold=cold,
        loadgen=results[0] if results else None,
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
    results: list[LoadgenResult],
) -> Point:
    with maker.mark("warm-up"):
        warm = warm_up(maker, requests, work, news)
    gpu = Gpu.open(request.device) if maker.queues else None
    meter, before = LoadMeter(), None if gpu is None else gpu.joules()
    if request.scenario is None:
        made = samples(maker, requests, request.samples, news, request.most_samples)
    else:
        made, result = _asked(request, maker, requests, statistics.median(warm.seconds), news)
        results.append(result)
    others, after = meter.others(), None if gpu is None else gpu.joules()
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
        joules=None if before is None or after is None else (after - before) / (len(made) * work.batch),
        device_bytes=None if gpu is None else gpu.used_bytes(),
        others=others,
        clocks=cpu_clocks() if gpu is None else gpu.clocks(cpu_clocks()),
    )


def _asked(
    request: BenchRequest, maker: PipelineMaker, requests: Requests, seconds: float, news: Callable[[], None]
) -> tuple[list[Sample], LoadgenResult]:
    """Samples that LoadGen asked for, each of which took ``seconds`` before, and its account."""
    assert request.scenario is not None
    made: list[Sample] = []

    def make(numbers: Sequence[int]) -> None:
        full = [numbers[index % len(numbers)] for index in range(requests.batch)]
        made.append(maker.make(requests.of(full)))
        news()

    order = Order(
        scenario=request.scenario,
        queries=request.least_queries,
        seconds=request.least_seconds,
        prompts=len(request.prompts),
        expected=requests.batch / seconds,
    )
    with _logs(request.logs) as folder:
        result = run_loadgen(order, make, requests.batch, folder)
    return made, result


@contextmanager
def _logs(target: Path | None) -> Iterator[Path]:
    """A folder for LoadGen's logs, which becomes ``target`` if all goes well, and else is gone."""
    if target is None:
        with TemporaryDirectory(prefix="stiv-loadgen-") as folder:
            yield Path(folder)
    else:
        with replaced_folder(target, "choose another --loadgen-logs") as folder:
            yield folder


def _gap(sample: Sample) -> float:
    """Of the steps' time, what passed outside graphs."""
    inside = sum(sample.graph_seconds.get(name, 0.0) for name in ("embed", "blocks", "head", "step"))
    return max(0.0, 1 - inside / sample.stages["denoise"])
