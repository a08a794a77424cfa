"""``stiv bench against``: a bundle and other ways to make its clips, by turns, and whether they make the same ones.

Every contestant has a process of its own and the same number of threads. They take turns, there and back again
(A B C, C B A, ...), so that a machine that slows down slows all of them alike; one is at work at a time.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np

from stiv_deploy.runtime.bundle.bounds import Name
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.command.bench import stage
from stiv_deploy.runtime.command.bench.machine import LoadMeter, own_seconds
from stiv_deploy.runtime.command.bench.maker import threads_of
from stiv_deploy.runtime.command.bench.measure import LEAST_WARM, Requests, settled, warmed
from stiv_deploy.runtime.command.bench.record import Circumstances, Line, Took, Work
from stiv_deploy.runtime.command.bench.refusals import loaded, refuse, too_few, unproven
from stiv_deploy.runtime.command.bench.rivals import (
    BUNDLE,
    REFERENCE,
    TORCH,
    Rival,
    check_merged,
    check_names,
    rival,
)
from stiv_deploy.runtime.command.bench.statistics import Estimate, least_samples, percentile, ratio
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.pipeline import CPU, StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest, new_seed
from stiv_deploy.runtime.progress import Progress, unheard

OURS = "bundle"
SAME = 0.25
"""Clips are the same if they differ by less than this share of what another seed makes of them.

Rounding, also in 8 bits, leaves a few percent; other steps, guidance or noise make another clip."""


@dataclass(frozen=True, kw_only=True)
class AgainstRequest:
    """Measure ``bundle`` against ``baselines`` (names of :data:`~stiv_deploy.runtime.command.bench.rivals.NAMES`).

    ``template`` says what is made, from text, ``batch`` clips at once. ``checkpoint`` is for baselines in torch, by
    default the one in ``checkpoints`` that the bundle was exported from. ``count`` None takes as many samples as the
    interval of a median needs. Raises :class:`RequestError`, and ``ModuleNotFoundError`` where torch is missing.
    """

    bundle: Path
    template: GenerationRequest
    baselines: tuple[str, ...]
    prompts: tuple[str, ...] = stage.PROMPTS
    checkpoint: Path | None = None
    checkpoints: Path = Path("checkpoints")
    batch: int = 1
    count: int | None = None
    seed: int = field(default_factory=new_seed)
    backend: str | None = None
    device: int = 0
    threads: int | None = None
    anyway: bool = False

    def __post_init__(self) -> None:
        check_names(self.baselines)
        if self.template.frames or self.template.latents:
            raise RequestError("baselines make clips from text; take out the given frames")
        if self.count is not None and self.count < 1:
            raise RequestError(f"the number of samples must be 1 or more, got {self.count}")

    @property
    def samples(self) -> int:
        """Of each contestant."""
        return least_samples(0.5) if self.count is None else self.count


class Contestant(Frozen):
    """What one of them took, in seconds from prompts to frames in memory; ``ratio`` is over the bundle's.

    ``difference`` is the relative L2 distance of its frames from the bundle's, for the same prompts and seeds.
    """

    name: Name
    warm_up: tuple[Took, ...]
    samples: tuple[Took, ...]
    median: Estimate | None
    ratio: Estimate
    difference: float


class Against(Circumstances):
    """The bundle, the first of ``contestants``, and the others. ``elsewhere`` is how far other seeds are from it."""

    format: Literal["stiv-bench-against"] = "stiv-bench-against"
    version: Literal[1] = 1
    work: Work
    contestants: tuple[Contestant, ...]
    elsewhere: float
    others: float | None
    invalid: tuple[Line, ...] = ()


class Known(NamedTuple):
    """What a pipeline tells of the bundle before anything runs."""

    circumstances: Mapping[str, Any]
    work: Work
    orders: Mapping[str, Mapping[str, Any]]


def against(request: AgainstRequest, progress: Progress = unheard) -> Against:
    """Measure; raises :class:`~stiv_deploy.runtime.errors.MeasurementError` where that is or was not fair."""
    reasons = [*too_few(request.samples, [0.5])]
    refuse(reasons, anyway=request.anyway)
    progress("loading", 0, 1)
    known = _known(request)
    reasons += unproven(known.circumstances["verification"])
    refuse(reasons, anyway=request.anyway)
    refuse([*reasons, *loaded(stage.watched())], anyway=request.anyway)
    with ExitStack() as open_ones, TemporaryDirectory(prefix="stiv-against-") as folder:
        rivals: list[Rival] = []
        for name, order in known.orders.items():
            progress(f"starting {name}", len(rivals), len(known.orders))
            rivals.append(open_ones.enter_context(rival(name, order)))
        found = _measured(request, known, rivals, Path(folder), progress)
    faults = [*reasons, *_faults(found)]
    refuse(faults, anyway=request.anyway)
    return found.model_copy(update={"invalid": tuple(dict.fromkeys(faults))})


def _known(request: AgainstRequest) -> Known:
    with StivPipeline.from_bundle(
        request.bundle, backend=request.backend, threads=request.threads, device=request.device
    ) as pipe:
        check_merged(request.baselines, pipe.bundle)
        requests = Requests(request.template, request.prompts, request.batch, request.seed)
        work, plan = stage.work(pipe, requests), pipe.plan(requests())
        common = {"threads": threads_of(request.threads)}
        ours = common | {
            "module": BUNDLE,
            "bundle": str(request.bundle),
            "backend": pipe.backend.name,
            "device": request.device,
            "template": request.template.to_json(),
        }
        reference = common | {
            "module": REFERENCE,
            "checkpoint": None if request.checkpoint is None else str(request.checkpoint),
            "checkpoints": str(request.checkpoints),
            "sha256": pipe.bundle.manifest.checkpoint,
            "device": "cpu" if pipe.backend.name == CPU else f"cuda:{request.device}",
            "precision": pipe.bundle.manifest.precision,
            "settings": asdict(plan.videos[0].settings),
            "frames": plan.size.frames,
        }
        orders = {
            name: reference | {"compile": TORCH[name]} if name in TORCH else ours | {"backend": name}
            for name in request.baselines
        }
        return Known(stage.circumstances(pipe, request.threads), work, {OURS: ours, **orders})


def _measured(
    request: AgainstRequest, known: Known, rivals: Sequence[Rival], folder: Path, progress: Progress
) -> Against:
    requests = Requests(request.template, request.prompts, request.batch, request.seed)
    same, other = requests(), requests()
    progress("do they make the same clips?", 0, 1)
    frames = [each.clips(same, folder).astype(np.float64) for each in rivals]
    elsewhere = _distance(rivals[0].clips(other, folder).astype(np.float64), frames[0])
    warm = [_warmed(each, requests, progress) for each in rivals]
    meter = LoadMeter(own=lambda: own_seconds() + sum(each.cpu_seconds for each in rivals))
    seconds = _by_turns(rivals, requests, request.samples, progress)
    others = meter.others()
    return Against(
        **known.circumstances,
        work=known.work,
        contestants=tuple(
            Contestant(
                name=each.name,
                warm_up=tuple(warm[number]),
                samples=tuple(seconds[number]),
                median=percentile(seconds[number], 0.5),
                ratio=ratio(seconds[number], seconds[0]),
                difference=_distance(frames[number], frames[0]),
            )
            for number, each in enumerate(rivals)
        ),
        elsewhere=elsewhere,
        others=others,
    )


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2; infinite between clips of other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1.0))


def _warmed(one: Rival, requests: Callable[[], list[GenerationRequest]], progress: Progress) -> list[float]:
    """Seconds of the clips of its warm-up."""
    made = itertools.count(1)
    return warmed(
        lambda: one.make(requests()),
        lambda: progress(f"warming up {one.name}", min(next(made), LEAST_WARM), LEAST_WARM),
    )


def _by_turns(
    rivals: Sequence[Rival], requests: Callable[[], list[GenerationRequest]], count: int, progress: Progress
) -> list[list[float]]:
    """``count`` samples of each: there and back again. Within a turn all make the same clips."""
    seconds: list[list[float]] = [[] for _ in rivals]
    for turn in range(count):
        asked = requests()
        for number in range(len(rivals)) if turn % 2 == 0 else reversed(range(len(rivals))):
            seconds[number].append(rivals[number].make(asked))
        progress("by turns", turn + 1, count)
    return seconds


def _faults(found: Against) -> list[str]:
    """Every reason not to believe ``found``."""
    faults = [*loaded(found.others)]
    for each in found.contestants:
        if not each.difference < SAME * found.elsewhere:
            faults.append(
                f"{each.name} makes other clips than the bundle of the same prompts and seeds: they differ by "
                f"{each.difference:.2g}, those of another seed by {found.elsewhere:.2g}"
            )
        if not settled(each.warm_up):
            faults.append(f"after {len(each.warm_up)} samples of warm-up {each.name} still got faster")
    return faults
