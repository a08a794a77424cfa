"""The stage of tuning: a bundle's best solver and time grid for every number of evaluations."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.bundle.bounds import SHIFT_LIMITS, STEP_LIMIT
from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.bundle.tuned import Tuned, TunedGrid
from stiv_deploy.runtime.errors import BundleError, RequestError
from stiv_deploy.runtime.files import make_folder
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.tokenization import lost_line
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.sampling.fitting import ExactPath, WeightFit
from stiv_deploy.runtime.sampling.settings import Solver
from stiv_deploy.runtime.sampling.solvers import evaluations, row_evaluations
from stiv_deploy.runtime.sampling.tuning import (
    FITTED,
    SKIPPED,
    STRETCHED,
    UNTIL,
    Exact,
    Grid,
    Interval,
    Point,
    Skip,
    converged,
    frontier,
    intervals,
    judged,
    measured,
    searched,
    skips,
    to_fit,
    to_skip,
)

log = logging.getLogger(__name__)
BUDGETS = (4, 6, 8, 10, 12, 15, 20, 25, 30)
SHIFTS = (0.5, 1.0, 2.0, 4.0, 8.0)
FITTED_CLIPS = 3
"""Clips at least for weights to be fitted: two choose. A single one can be met too well to tell grids apart by it."""


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """Solvers and time grids of the bundle in the folder ``bundle``, tried on the clips of ``requests``.

    Each request has a ``seed``; what it says of guidance, given frames and size is what is tuned for. Its own solver,
    steps and times, by default the bundle's, are the same in all, and are measured too. ``budgets`` are numbers of
    evaluations, by default :data:`BUDGETS` and their own, ``shifts`` time shifts besides their own, both ascending. The
    exact flow is known to ``tolerance``, a relative L2 error, or as near as ``most`` steps come. With ``record`` the
    best are kept in the bundle's manifest. Raises :class:`RequestError`.
    """

    bundle: Path
    requests: tuple[GenerationRequest, ...]
    budgets: tuple[int, ...] | None = None
    solvers: tuple[Solver, ...] = tuple(Solver)
    shifts: tuple[float, ...] = SHIFTS
    tolerance: float = 2e-3
    most: int = 960
    record: bool = True
    backend: str | None = None
    device: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        clips = sum(each.count for each in self.requests)
        if clips < 2:
            raise RequestError(f"tuning needs 2 clips or more, got {clips}: half of them choose, the others judge")
        if any(each.seed is None for each in self.requests):
            raise RequestError("a request to tune on has no seed; give each one, so that all grids start alike")
        if not self.solvers:
            raise RequestError(f"no solver to try; give some of {', '.join(Solver)}")
        _check_ascending("budgets", BUDGETS if self.budgets is None else self.budgets, 1, STEP_LIMIT)
        _check_ascending("shifts", self.shifts, *SHIFT_LIMITS)
        if not 0 < self.tolerance < 1:
            raise RequestError(f"tolerance must be above 0 and below 1, got {self.tolerance:g}")


def _check_ascending(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    if not values or list(values) != sorted(set(values)) or not low <= values[0] <= values[-1] <= high:
        given = ", ".join(f"{value:g}" for value in values) or "none"
        raise RequestError(f"{name} are one or more ascending numbers from {low:g} to {high:g}, got {given}")


class TuneReport(Frozen):
    """What was tried of a bundle (its hash) on so many ``clips``.

    ``own`` is the grid of the requests, by default the bundle's; ``best`` are those of ``tried`` that no other one
    beats with as few evaluations, ``intervals`` these with guidance that ends early, ``skips`` grids that skip blocks,
    where the bundle has the graphs for it and no request an interval of guidance. Errors below ``reference_error``,
    that of what stood for the exact flow, say nothing about which is better.
    """

    bundle: str
    clips: int
    reference: Grid
    reference_error: float
    own: Point
    tried: tuple[Point, ...]
    best: tuple[Point, ...]
    intervals: tuple[Interval, ...]
    skips: tuple[Skip, ...] = ()
    seconds: float


def tune(request: TuneRequest, progress: Progress = unheard) -> TuneReport:
    """Try grids within each budget against the exact flow of the same bundle, and tell all errors.

    Raises what :meth:`StivPipeline.from_bundle` and its plan and run do, and
    :class:`~stiv_deploy.runtime.errors.OutputError` where the manifest cannot be written, before anything is computed.
    """
    if request.record:
        Bundle.open(request.bundle)
        make_folder(request.bundle, "give --no-record, or copy the bundle to a folder you own")
    progress("loading", 0, 1)
    with StivPipeline.from_bundle(
        request.bundle, backend=request.backend, threads=request.threads, device=request.device
    ) as pipe:
        report = _search(pipe, request, progress)
    if request.record:
        _record(request.bundle, report)
    return report


def _search(pipe: StivPipeline, request: TuneRequest, progress: Progress) -> TuneReport:
    started, student = time.monotonic(), pipe.bundle.manifest.model.student
    if student is not None and student.flow_map:
        raise RequestError("a flow map has its steps in it: no solver comes nearer; there is nothing to tune")
    plan = pipe.plan(list(request.requests))
    own, clips = _own_grid(plan)
    if lost := pipe.lost(plan):
        log.warning(lost_line(lost))
    budgets = request.budgets or sorted({*BUDGETS, own.evaluations})
    shifts = sorted({*request.shifts, own.time_shift})
    fits = 1 + len(FITTED) + (1 + len(SKIPPED)) * pipe.bundle.manifest.skips
    grids = len(request.solvers) * (len(shifts) + 2 + len(STRETCHED)) + len(UNTIL) + fits
    news = _News(progress, sum(budgets) * grids)

    def planned(grid: Grid) -> GenerationPlan:
        return pipe.plan([_changed(each, grid) for each in request.requests])

    def sampled(grid: Grid) -> np.ndarray:
        return pipe.sample(planned(grid))

    traced = _Traced(pipe, planned, range(0, clips, 2))
    exact = converged(traced, own.time_shift, request.tolerance, request.most, news.before)
    point = measured(sampled, exact, own)
    tried = tuple(searched(sampled, exact, budgets, request.solvers, shifts, news.count))
    if clips >= FITTED_CLIPS:
        tried += tuple(_fitted(traced, exact, to_fit(tried), news))
    best = frontier((*tried, *_whole([point])))
    chosen = any((each.guidance_from, each.guidance_until) != (None, None) for each in request.requests)
    skipping = clips >= FITTED_CLIPS and pipe.bundle.manifest.skips and not chosen
    to_try = to_skip(tried) if skipping else []
    whole = chosen or student is not None
    early = () if whole else intervals(sampled, exact, best, lambda grid: _rows(planned(grid)), news.count)
    return TuneReport(
        bundle=pipe.bundle.hash,
        clips=clips,
        reference=exact.grid,
        reference_error=exact.error,
        own=point,
        tried=tried,
        best=tuple(best),
        intervals=tuple(early),
        skips=tuple(skips(_fitted(traced, exact, to_try, news), best)),
        seconds=time.monotonic() - started,
    )


class _Traced:
    """Samples ``planned`` grids, and keeps the ``path`` that the ``chosen`` clips took by the last one."""

    path: ExactPath

    def __init__(self, pipe: StivPipeline, planned: Callable[[Grid], GenerationPlan], chosen: Sequence[int]) -> None:
        self.pipe, self.planned, self.chosen = pipe, planned, chosen

    def __call__(self, grid: Grid) -> np.ndarray:
        """Latents fp32 [clips, T, C, h, w] by ``grid``."""
        self.path = ExactPath(grid.settings.times().tolist(), self.chosen)
        return self.pipe.sample_in_step(self.planned(grid), self.path)


def _fitted(traced: _Traced, exact: Exact, grids: Sequence[Grid], news: "_News") -> Iterator[Point]:
    """``grids`` of AB2 with weights fitted to the clips that choose, whose ``exact`` flow was ``traced`` last."""
    for grid in grids:
        news.count(grid)
        plan = traced.planned(grid.model_copy(update={"solver": Solver.EULER}))
        fit = WeightFit(grid.settings.times().tolist(), traced.path, traced.chosen, _guided(plan))
        latents = traced.pipe.sample_in_step(plan, fit)
        yield judged(latents, exact, grid.model_copy(update={"solver_weights": tuple(fit.weights)}))


def tuned(report: TuneReport) -> Tuned:
    """The best of each solver and number of steps, with fitted weights and without, and skips that are worthwhile.

    The requests' own grid is among them where others had its steps, and it skips none.
    """
    skipping = sorted((each.point for each in report.skips if each.worthwhile), key=_tried)
    steps = {each.grid.steps for each in report.tried}
    own = _whole([report.own])
    points = sorted((each for each in (*own, *report.tried) if each.grid.steps in steps), key=_tried)
    grids: dict[tuple[int, str, str, bool], TunedGrid] = {}
    for each in (*points, *skipping):
        values = each.grid.model_dump(mode="json", exclude={"guidance_until"})
        grid = TunedGrid(**values, tried=each.tried, error=each.error)
        grids.setdefault(grid.kind, grid)
    return Tuned(
        bundle=report.bundle,
        clips=report.clips,
        reference_error=report.reference_error,
        grids=tuple(grids[key] for key in sorted(grids)),
    )


def _whole(points: Iterable[Point]) -> list[Point]:
    """Those of ``points`` that skip no blocks."""
    return [each for each in points if not each.grid.skipped_steps]


def _tried(point: Point) -> float:
    return point.tried


def _record(folder: Path, report: TuneReport) -> None:
    """Put the best into the manifest as it is now; :class:`BundleError` where the bundle has become another one."""
    manifest = read_manifest(folder)
    if manifest.bundle_hash != report.bundle:
        raise BundleError(f"{folder}: another bundle was put there while this one was tuned; run 'stiv tune' again")
    write_manifest(folder, manifest.model_copy(update={"tuned": tuned(report)}))


def _own_grid(plan: GenerationPlan) -> tuple[Grid, int]:
    """The one grid of the planned videos, and how many they are; :class:`RequestError` where they have several."""
    chosen = [video.settings for video in plan.videos]
    grids = {Grid.of(each) for each in chosen}
    if len(grids) > 1:
        raise RequestError("requests to tune on have different solvers, steps or times; give all the same")
    return grids.pop(), len(chosen)


def _changed(request: GenerationRequest, grid: Grid) -> GenerationRequest:
    times: dict[str, Any] = {"time_shift": grid.time_shift, "late_stretch": grid.late_stretch}
    times |= {"solver_weights": grid.solver_weights or None, "skipped_steps": grid.skipped_steps or None}
    times |= {"skip_blocks": None}  # the grid says which
    own = request.changed(solver=grid.solver, num_inference_steps=grid.steps, **times)
    return own if grid.guidance_until is None else own.changed(guidance_until=grid.guidance_until)


def _rows(plan: GenerationPlan) -> float:
    """Rows of the model that a clip of ``plan`` takes, all its evaluations together."""
    return sum(row_evaluations(video.settings) for video in plan.videos) / len(plan.videos)


def _guided(plan: GenerationPlan) -> np.ndarray:
    """Which evaluations of the clips of ``plan`` are guided, bool [clips, evaluations]: all have as many."""
    return np.array([[each.guided for each in evaluations(video.settings)] for video in plan.videos])


class _News:
    """Tells ``progress`` of grids, by the evaluations that are done of those that the search takes at most."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, 0, total

    def before(self, grid: Grid) -> None:
        """What stands for the exact flow is sampled."""
        self._progress(f"the reference, {grid.steps} steps", self._done, self._total)

    def count(self, grid: Grid) -> None:
        """``grid`` is tried."""
        self._progress(f"{grid.solver}, {grid.steps} steps, {grid.times}", self._done, self._total)
        self._done += grid.evaluations
