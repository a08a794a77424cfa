"""``stiv bench against``: a bundle and other ways to make its clips, by turns, and whether they make the same ones.

Every contestant has a process of its own and the same number of threads. They take turns, there and back again
(A B C, C B A, ...), so that a machine that slows down slows all of them alike; one is at work at a time. After some
turns all processes are started again, in the other order: a round. What is luck of one process shows between rounds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import numpy as np

from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.command.bench import stage
from stiv_deploy.runtime.command.bench.maker import threads_of
from stiv_deploy.runtime.command.bench.measure import Requests, settled
from stiv_deploy.runtime.command.bench.record import Circumstances, Line, Took, Work
from stiv_deploy.runtime.command.bench.refusals import loaded, refuse, unproven
from stiv_deploy.runtime.command.bench.rivals import (
    BUNDLE,
    REFERENCE,
    TORCH,
    check_merged,
    check_names,
    is_bundle,
)
from stiv_deploy.runtime.command.bench.rounds import MOST_ROUNDS, by_rounds, ratio_of, started
from stiv_deploy.runtime.command.bench.statistics import Estimate, percentile
from stiv_deploy.runtime.errors import MeasurementError, RequestError
from stiv_deploy.runtime.pipeline.pipeline import CPU, StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.request import GenerationRequest, new_seed
from stiv_deploy.runtime.progress import Progress, unheard

OURS = "bundle"
SAME = 0.25
"""Clips are the same if they differ by less than this share of what another seed makes of them.

Rounding, also in 8 bits, leaves a few percent; other steps, guidance or noise make another clip."""


@dataclass(frozen=True, kw_only=True)
class AgainstRequest:
    """Measure ``bundle`` against ``baselines``: of :data:`~stiv_deploy.runtime.command.bench.rivals.NAMES`, or folders.

    ``template`` says what is made, from text, ``batch`` clips at once. ``checkpoint`` is for baselines in torch, by
    default the one in ``checkpoints`` that the bundle was exported from. ``rounds`` None takes 4, and up to 12 until
    all ratios are well known. Raises :class:`RequestError`, and ``ModuleNotFoundError`` where torch is missing.
    """

    bundle: Path
    template: GenerationRequest
    baselines: tuple[str, ...]
    prompts: tuple[str, ...] = stage.PROMPTS
    checkpoint: Path | None = None
    checkpoints: Path = Path("checkpoints")
    batch: int = 1
    rounds: int | None = None
    seed: int = field(default_factory=new_seed)
    backend: str | None = None
    device: int = 0
    threads: int | None = None
    anyway: bool = False

    def __post_init__(self) -> None:
        check_names(self.baselines)
        if self.template.frames or self.template.latents:
            raise RequestError("baselines make clips from text; take out the given frames")
        if self.rounds is not None and not 2 <= self.rounds <= MOST_ROUNDS:
            raise RequestError(f"an interval takes 2 to {MOST_ROUNDS} rounds, got {self.rounds}")


class Contestant(Frozen):
    """What one of them took in each round, in seconds from prompts to frames in memory; ``ratio`` is over the bundle's.

    ``difference`` is the relative L2 distance of its frames from the bundle's, for the same prompts and seeds. ``name``
    is that of the baseline, and of another bundle its folder.
    """

    name: Line
    warm_up: tuple[tuple[Took, ...], ...]
    samples: tuple[tuple[Took, ...], ...]
    median: Estimate | None
    ratio: Estimate
    difference: float


class Against(Circumstances):
    """The bundle, the first of ``contestants``, and the others. ``elsewhere`` is how far other seeds are from it."""

    format: Literal["stiv-bench-against"] = "stiv-bench-against"
    version: Literal[2] = 2
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
    unproven: Sequence[str]
    """Why outputs are not known to be right, the bundle's or another's."""


def against(request: AgainstRequest, progress: Progress = unheard) -> Against:
    """Measure; raises :class:`~stiv_deploy.runtime.errors.MeasurementError` where that is or was not fair."""
    progress("loading", 0, 1)
    told = _known(request)
    reasons = [*told.unproven]
    refuse(reasons, anyway=request.anyway)
    refuse([*reasons, *loaded(stage.watched())], anyway=request.anyway)
    found = _measured(request, told, progress)
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
        ours = _bundle_order(request, pipe)
        circumstances = stage.circumstances(pipe, request.threads)
        orders, faults = {OURS: ours}, [*unproven(circumstances["verification"])]
        for name in request.baselines:
            if name in TORCH:
                orders[name] = _reference_order(request, pipe, plan) | {"compile": TORCH[name]}
            elif is_bundle(name):
                orders[name], found = _other_bundle(request, name, work)
                faults += found
            else:
                orders[name] = ours | {"backend": name}
        return Known(circumstances, work, orders, faults)


def _bundle_order(request: AgainstRequest, pipe: StivPipeline) -> dict[str, Any]:
    """For the process of the bundle of ``pipe``."""
    return {
        "module": BUNDLE,
        "bundle": str(pipe.bundle.folder),
        "backend": pipe.backend.name,
        "device": request.device,
        "threads": threads_of(request.threads),
        "template": request.template.to_json(),
    }


def _reference_order(request: AgainstRequest, pipe: StivPipeline, plan: GenerationPlan) -> dict[str, Any]:
    """For a process of the reference, which samples as ``plan`` does."""
    return {
        "module": REFERENCE,
        "checkpoint": None if request.checkpoint is None else str(request.checkpoint),
        "checkpoints": str(request.checkpoints),
        "sha256": pipe.bundle.manifest.checkpoint,
        "device": "cpu" if pipe.backend.name == CPU else f"cuda:{request.device}",
        "threads": threads_of(request.threads),
        "precision": pipe.bundle.manifest.precision,
        "settings": asdict(plan.videos[0].settings),
        "frames": plan.size.frames,
    }


def _other_bundle(request: AgainstRequest, name: str, work: Work) -> tuple[dict[str, Any], list[str]]:
    """The order of the bundle in the folder ``name``, which must have the same ``work``, and what is unproven of it."""
    with StivPipeline.from_bundle(
        Path(name), backend=request.backend, threads=request.threads, device=request.device
    ) as pipe:
        theirs = stage.work(pipe, Requests(request.template, request.prompts, request.batch, request.seed))
        differ = [each for each in Work.model_fields if getattr(theirs, each) != getattr(work, each)]
        if differ:
            told = ", ".join(f"{each} {getattr(theirs, each)} for {getattr(work, each)}" for each in differ)
            raise MeasurementError(f"--baseline {name}: does other work by default ({told}); give the options")
        return _bundle_order(request, pipe), [f"{name}: {each}" for each in unproven(stage.verification(pipe))]


def _measured(request: AgainstRequest, told: Known, progress: Progress) -> Against:
    requests = Requests(request.template, request.prompts, request.batch, request.seed)
    with started(told.orders, progress) as rivals, TemporaryDirectory(prefix="stiv-against-") as folder:
        progress("do they make the same clips?", 0, 1)
        same, other = requests(), requests()
        frames = [each.clips(same, Path(folder)).astype(np.float64) for each in rivals]
        elsewhere = _distance(rivals[0].clips(other, Path(folder)).astype(np.float64), frames[0])
    rounds = by_rounds(told.orders, requests, request.rounds, progress)
    return Against(
        **told.circumstances,
        work=told.work,
        contestants=tuple(
            Contestant(
                name=name,
                warm_up=tuple(tuple(each.warm_up[name]) for each in rounds),
                samples=tuple(tuple(each.seconds[name]) for each in rounds),
                median=percentile([seconds for each in rounds for seconds in each.seconds[name]], 0.5),
                ratio=ratio_of(rounds, name, OURS),
                difference=_distance(frames[number], frames[0]),
            )
            for number, name in enumerate(told.orders)
        ),
        elsewhere=elsewhere,
        others=max(each.others for each in rounds),
    )


def _distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Relative L2; infinite between clips of other shapes."""
    if found.shape != wanted.shape:
        return float("inf")
    return float(np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1.0))


def _faults(found: Against) -> list[str]:
    """Every reason not to believe ``found``."""
    faults = [*loaded(found.others)]
    for each in found.contestants:
        if not each.difference < SAME * found.elsewhere:
            faults.append(
                f"{each.name} makes other clips than the bundle of the same prompts and seeds: they differ by "
                f"{each.difference:.2g}, those of another seed by {found.elsewhere:.2g}"
            )
        faults += [
            f"after {len(warm)} samples of warm-up {each.name} still got faster"
            for warm in each.warm_up
            if not settled(warm)
        ]
    return faults
