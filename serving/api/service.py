"""What the API does for its clients: jobs are planned, admitted, told of, cancelled, deleted; no device is touched."""

import hashlib
import json
import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.tuned import ONE_A_STEP, TunedGrid
from stiv_deploy.runtime.pipeline.images import Fit
from stiv_deploy.runtime.pipeline.limits import BOUNDS, TEXT_LIMIT
from stiv_deploy.runtime.pipeline.plan import RECOMMENDED, PlannedVideo, plan_generation
from stiv_deploy.runtime.pipeline.records import GenerationRecord
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.samples import SampleMaker
from stiv_deploy.runtime.pipeline.tasks import TASKS
from stiv_deploy.runtime.pipeline.tokenization import lost_line
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.settings import Solver
from stiv_deploy.runtime.sampling.solvers import block_evaluations, evaluations, most_rows
from stiv_deploy.serving.api.answers import resource
from stiv_deploy.serving.api.body import FIELDS, FORMATS, PRIORITY, Asked, Wanted, wanted
from stiv_deploy.serving.api.guard import Rate
from stiv_deploy.serving.api.schema import ModelResource, Remix, VideoResource
from stiv_deploy.serving.costs import Costs
from stiv_deploy.serving.errors import ApiError, IdempotencyError, QueueFullError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.spans import TRACE, Carrier, Spans
from stiv_deploy.serving.store.jobs import LEASE, Job, JobStore, Size, State, new_id
from stiv_deploy.serving.store.results import Results
from stiv_deploy.serving.workers.order import order_of
from stiv_deploy.serving.workers.sharing import misfit, placement_of

log = logging.getLogger(__name__)
CHOICES = {"guidance_mode": GuidanceMode, "solver": Solver, "unseen": Unseen, "fit": Fit}
"""Fields of a request that are one of a few words."""
STALLED = 300.0
"""Seconds without getting on after which a worker that has work counts as dead."""
LOOK = 0.2
"""Seconds that a look at the queue is good for."""


@dataclass(frozen=True)
class Outlook:
    """The queue at one moment: waiting jobs in their order, running ones, what they cost, and who works."""

    waiting: tuple[Job, ...]
    running: tuple[Job, ...]
    costs: Costs
    workers: int

    def position(self, job: Job) -> int | None:
        """How many come before ``job``, all if it has come since; ``None`` if it does not wait."""
        if job.state != State.QUEUED:
            return None
        return next((at for at, each in enumerate(self.waiting) if each.id == job.id), len(self.waiting))

    def eta(self, job: Job) -> float | None:
        """Seconds until ``job``, which may be new, is done; ``None`` if nobody knows."""
        if not job.live:
            return None
        alone, soonest = self.costs.alone(job), self.costs.soonest(job)
        if job.state == State.IN_PROGRESS or soonest is None:
            return alone
        backlog = self.costs.backlog([*self.running, *self.waiting[: self.position(job)]], self.workers)
        return None if backlog is None else backlog + soonest

    def late(self, before: Sequence[Job], job: Job, after: Sequence[Job], now: float) -> float | None:
        """Seconds by which the first of ``after`` is late that would not be without ``job``; ``None`` if none is.

        The device makes ``before``, ``job`` and ``after`` in this order. One of a lower priority may be late.
        """
        ahead, added = self.costs.backlog(before, self.workers), self.costs.backlog([job], self.workers)
        if ahead is None or added is None:
            return None
        for each in after:
            left = math.inf if each.due is None else each.due - now - ahead - (self.costs.alone(each) or 0.0)
            if 0 <= left < added and each.priority >= job.priority:
                return added - left
            ahead += self.costs.backlog([each], self.workers) or 0.0
        return None


class Service:
    """The jobs of ``store`` for the bundle of ``settings``; for threads of the server."""

    def __init__(
        self,
        settings: ServeSettings,
        bundle: Bundle,
        store: JobStore,
        results: Results,
        clock: Callable[[], float] = time.time,
        spans: Spans | None = None,
    ) -> None:
        self.settings, self.bundle, self.store, self.results = settings, bundle, store, results
        self._spans = spans or Spans()
        self.accepting = True
        self._clock = clock
        self._started = clock()
        self._samples = SampleMaker(bundle)
        self._placement = placement_of(settings, bundle)
        self._rate = Rate(settings.rate)
        self._lock, self._planning, self._admitting = Lock(), Lock(), Lock()
        self._looked: tuple[float, Outlook] | None = None

    def submit(self, owner: str, asked: Asked, key: str | None, headers: Mapping[str, str]) -> Job:
        """Plan and store what ``asked`` says; the job of the same idempotency ``key``, if there is one.

        The request's ``headers`` may name the trace that it is part of. Raises :class:`ApiError`, and what planning
        does.
        """
        self._check_open(owner)

        def what() -> Wanted:
            return wanted(asked, self.bundle.manifest, self.settings.name)

        return self._traced(owner, what, key, asked.digest, headers)

    def remix(self, owner: str, job: str, remix: Remix, key: str | None, headers: Mapping[str, str]) -> Job:
        """A new job with the request and priority of ``job``, but for what ``remix`` says; else as :meth:`submit`.

        Raises :class:`ApiError`, and what planning does.
        """
        source, text = self.job(owner, job), self.store.request(job)
        if text is None:  # it was deleted just now
            raise ApiError(404, "not_found", f"there is no video {job[:80]!r}", "video_id")
        self._check_open(owner)
        said = remix.model_dump(exclude_none=True)
        digest = hashlib.sha256(f"{job} {remix.model_dump_json()}".encode()).hexdigest()

        def what() -> Wanted:
            return Wanted(GenerationRequest.from_json(text).changed(**said), source.priority, None, job)

        return self._traced(owner, what, key, digest, headers)

    def _traced(
        self, owner: str, make: Callable[[], Wanted], key: str | None, digest: str, headers: Mapping[str, str]
    ) -> Job:
        with self._spans.submitting(headers) as trace:
            return self._stored(owner, make, key, digest, trace)

    def _stored(self, owner: str, make: Callable[[], Wanted], key: str | None, digest: str, trace: Carrier) -> Job:
        with self._planning:  # one request's pictures at a time are in memory
            what = make()
            job, request = self._job(owner, what, trace)
        job = self._made_before(job)
        try:
            with self._admitting:  # one after another: each is judged by all that came before
                if job.live:
                    self._check_deadline(job, what)
                stored, new = self.store.submit(job, request, most=self.settings.queue, key=key, digest=digest)
                if new and stored.live:
                    self._add(stored)
        except QueueFullError as error:
            raise ApiError(429, "queue_full", str(error), retry_after=self._next_place()) from None
        except IdempotencyError as error:
            raise ApiError(409, "idempotency_conflict", str(error)) from None
        finally:
            if self.store.get(job.id) is None:
                self.results.remove(job.id)  # what was linked for a job that is not to be
        log.info("asked for", extra={"job": stored.id})
        return stored

    def _made_before(self, job: Job) -> Job:
        """``job``, done already if the owner has the result of an equal request: its files are the same files."""
        twin = self.store.twin(job.owner, job.twin)
        if twin is None or not self.results.files.link(twin.id, job.id):
            return job
        expires = job.created + self.settings.keep_seconds
        done = replace(job, state=State.COMPLETED, step=job.steps, bytes=twin.bytes, expires=expires)
        return replace(done, started=job.created, finished=job.created)

    def _check_open(self, owner: str) -> None:
        if not self.accepting:
            raise ApiError(503, "shutting_down", "this server is stopping; try again later", retry_after=30)
        wait = self._rate.take(owner)
        if wait:
            raise ApiError(429, "rate_limit_exceeded", f"more than {self.settings.rate:g} jobs a minute", None, wait)
        if self.results.free_bytes() < self.settings.free_bytes:
            raise ApiError(507, "insufficient_storage", "the disk of this server is full; nothing can be stored")

    def _job(self, owner: str, what: Wanted, trace: Carrier) -> tuple[Job, str]:
        """The job, and its request as JSON: pictures as the model sees them, every default filled in."""
        plan = plan_generation(self.bundle, what.request)
        (video,) = plan.videos
        request = video.request
        if video.given.images:
            request = request.changed(frames=dict(video.given.images), fit=Fit.EXACT)
        text = json.dumps(request.to_json(), separators=(",", ":"), sort_keys=True)
        now, size = self._clock(), plan.size
        planned = evaluations(video.settings)
        job = Job(
            id=new_id(),
            owner=owner,
            created=now,
            frames=size.frames,
            height=size.height,
            width=size.width,
            rows=most_rows(video.settings),
            evaluations=block_evaluations(video.settings),
            steps=sum(not each.hold for each in planned),
            facts=json.dumps(self._facts(video) | {"remixed_from": what.source, TRACE: trace}),
            twin=hashlib.sha256(f"{plan.bundle} {text}".encode()).hexdigest(),
            priority=what.priority,
            due=None if what.deadline is None else now + what.deadline,
        )
        return job, text

    def _facts(self, video: PlannedVideo) -> dict[str, Any]:
        request = video.request
        lost = self._samples.lost([video])
        record = GenerationRecord(bundle=self.bundle.hash, backend="", request=request)
        return {
            "model": self.settings.name,
            "prompt": request.prompt,
            "seed": request.seed,
            "fps": request.fps,
            "task": record.task,
            "warnings": [*video.warnings, *([lost_line(lost)] if lost else [])],
        }

    def _check_deadline(self, job: Job, what: Wanted) -> None:
        """:class:`ApiError` if ``job`` cannot be done in time, or if others then cannot that were accepted."""
        if what.deadline is None:
            return
        look, now = self.outlook(), self._clock()
        order = order_of([*look.running, *look.waiting, job], look.costs.alone)
        rank = partial(order.rank, now=now)
        line = sorted((*look.running, *look.waiting), key=rank)
        place = bisect_right(line, rank(job), key=rank)
        before, after = line[:place], line[place:]
        eta = replace(look, waiting=tuple(each for each in before if each.state == State.QUEUED)).eta(job)
        if eta is not None and eta > what.deadline:
            message = f"it cannot be done in {what.deadline:g} s; it would take about {eta:.3g} s"
            raise ApiError(429, "deadline_cannot_be_met", message, "deadline_s", eta - what.deadline)
        late = look.late(before, job, after, now)
        if late is not None:
            message = f"with it in {what.deadline:g} s another job, accepted before, would be {late:.3g} s late"
            raise ApiError(429, "deadline_cannot_be_met", message, "deadline_s", late)

    def _next_place(self) -> float:
        """Seconds until a waiting job begins, about."""
        look = self.outlook()
        costs = [cost for job in look.running if (cost := look.costs.alone(job)) is not None]
        return min(costs, default=10.0)

    def _add(self, job: Job) -> None:
        """Let the last look at the queue see the new ``job``."""
        with self._lock:
            if self._looked is not None:
                at, look = self._looked
                self._looked = (at, replace(look, waiting=(*look.waiting, job)))

    def outlook(self) -> Outlook:
        """The queue as it is, or was a moment ago."""
        with self._lock:
            now = time.monotonic()
            if self._looked is None or now > self._looked[0] + LOOK:
                self._looked = (now, self._look())
            return self._looked[1]

    def _look(self) -> Outlook:
        now, waiting = self._clock(), self.store.waiting()
        costs = Costs(self.store.measurements(self.bundle.hash), len(self.settings.devices) or 1, self._shared)
        order = order_of(waiting, costs.alone)
        waiting.sort(key=lambda job: order.rank(job, now))
        return Outlook(tuple(waiting), tuple(self.store.running()), costs, len(self.store.workers()))

    def _shared(self, size: Size) -> bool:
        """Whether several devices can make a clip of ``size`` together."""
        return self._placement is not None and misfit(self.bundle, self._placement, size) is None

    def job(self, owner: str, job: str) -> Job:
        """The owner's job of that id; :class:`ApiError` if there is none."""
        found = self.store.get(job, owner)
        if found is None:
            raise ApiError(404, "not_found", f"there is no video {job[:80]!r}", "video_id")
        return found

    def seen(self, job: Job) -> VideoResource:
        """``job`` as clients see it."""
        if not job.live:
            return resource(job, None, None)
        look = self.outlook()
        return resource(job, look.position(job), look.eta(job))

    def cancel(self, owner: str, job: str) -> Job:
        """Cancel a live job; one that is done stays as it is."""
        self.job(owner, job)
        if self.store.cancel(job):
            log.info("cancelled", extra={"job": job})
            self.results.forget_latents(job)
        return self.job(owner, job)

    def delete(self, owner: str, job: str) -> None:
        """Forget a job and its files; a running one leaves its batch at the next step."""
        self.job(owner, job)
        self.store.delete(job)
        self.results.remove(job)
        log.info("deleted", extra={"job": job})

    def tidy(self) -> None:
        """Remove what has been kept long enough, or is too much."""
        settings = self.settings
        for job in self.store.outdated(self._clock(), settings.keep_seconds, settings.keep_bytes):
            self.store.delete(job)
            self.results.remove(job)
        self.results.sweep_abandoned()
        for worker in self.store.workers():
            if worker.beat < self._clock() - 10 * LEASE:
                self.store.sign_off(worker.id)

    def reasons(self, *, ready: bool) -> list[str]:
        """Why the service is not healthy, or not ``ready``; empty if it is."""
        now, found = self._clock(), []
        workers = [each for each in self.store.workers() if each.beat > now - LEASE]
        if not workers:
            found.append("no worker is alive")
        if workers and all(each.turned < now - STALLED for each in workers):
            found.append(f"no worker has got on for {STALLED:g} s")
        if ready and not any(each.ready for each in workers):
            found.append("no worker is ready yet")
        if ready and not self.accepting:
            found.append("the server is stopping")
        if ready and self.results.free_bytes() < self.settings.free_bytes:
            found.append("the disk is full")
        return found

    def model(self) -> ModelResource:
        """The served model."""
        manifest = self.bundle.manifest
        multiples = {
            "frame_multiple": manifest.model.frame_multiple,
            "frame_padding": manifest.model.frame_padding,
            "pixel_multiple": manifest.model.pixel_multiple,
        }
        limits = {name: list(bounds) for name, bounds in BOUNDS.items() if name != "count"}
        limits |= {"priority": list(PRIORITY), "prompt": [0, TEXT_LIMIT]}
        sampling, grids = manifest.recommended(), () if manifest.tuned is None else manifest.tuned.grids
        details = {
            "bundle": self.bundle.hash,
            "devices": list(self.settings.devices),
            "parallel": None if self._placement is None else str(self._placement),
            "buckets": [bucket.model_dump(mode="json") for bucket in manifest.buckets],
            "defaults": {name: getattr(sampling, recommended) for name, recommended in RECOMMENDED.items()},
            "tuned": [_grid(each) for each in grids if manifest.skips or not each.skipped_steps],
            "limits": limits | multiples,
            "choices": {name: [*kind] for name, kind in CHOICES.items()},
            "fields": list(FIELDS),
            "pictures": list(FORMATS),
            "tasks": [task.name for task in TASKS if task.leading or not manifest.model.causal_vae],
            "trained": None if manifest.trained is None else manifest.trained.model_dump(mode="json"),
        }
        return ModelResource(id=self.settings.name, created=int(self._started), stiv=details)


def _grid(grid: TunedGrid) -> dict[str, Any]:
    """``grid`` as clients see it: what its solver and steps go best with, and whether it is one of those by default."""
    own = grid.model_dump(include={"solver", "steps", "time_shift", "late_stretch", "skipped_steps", "tried"})
    default = grid.solver in ONE_A_STEP and not grid.skipped_steps
    return own | {"default": default, "fitted": bool(grid.solver_weights)}
