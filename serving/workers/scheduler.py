"""The scheduler: one thread owns the device, and between two steps clips come, leave, pause and go on.

Where a process has several devices, each has a scheduler. The first one leads: it also makes the clips that are made by
all of them together, while the others stand still.

It knows of the world by the store alone: a job that was cancelled, deleted or given to another worker is no longer its
own, which it sees before the next evaluation.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Event

import numpy as np

from stiv_deploy.runtime.errors import OutputError, StivError, one_line
from stiv_deploy.runtime.pipeline.previews import preview_picture
from stiv_deploy.runtime.sampling.engine import Tick
from stiv_deploy.serving.costs import worthwhile_rows
from stiv_deploy.serving.errors import StoreError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.spans import Spans
from stiv_deploy.serving.store.jobs import ATTEMPTS, CANCELLED, Job, JobStore, Size, State
from stiv_deploy.serving.store.results import Results
from stiv_deploy.serving.store.tallies import Tallies
from stiv_deploy.serving.workers.clips import Clip, Decoding, pause_arrays, pause_of, write_files
from stiv_deploy.serving.workers.floor import Floor, There
from stiv_deploy.serving.workers.gates import suspicions
from stiv_deploy.serving.workers.lane import Lane
from stiv_deploy.serving.workers.order import Order, Turns
from stiv_deploy.serving.workers.workshop import Workshop

SIZES = 2
"""Sizes that have an engine at a time."""
QUANTUM = 0.5
"""Seconds that a size works before the other one has its turn."""
PATIENCE = 10.0
"""Seconds that a job of a size without an engine waits before another size has to end."""
IDLE = 0.02
"""Seconds between two looks at the store while there is nothing to do."""
RETRY = 1.0
"""Seconds between two tries to reach a store that fails."""
TOLD = 0.25
"""Seconds between two notes of progress."""
ENCODING = 8
"""Clips that may wait to be written; then the device waits too."""
log = logging.getLogger(__name__)


class Scheduler:
    """Makes the jobs of ``store`` as the worker ``name``, in one thread; see :meth:`run`, or :meth:`turn` for one step.

    Files are written by another thread. It has the device of ``rank`` on the ``floor``, by default the only one.
    """

    def __init__(
        self,
        store: JobStore,
        results: Results,
        workshop: Workshop,
        settings: ServeSettings,
        name: str,
        clock: Callable[[], float] = time.time,
        spans: Spans | None = None,
        floor: Floor | None = None,
        rank: int = 0,
    ) -> None:
        self._floor, self._rank = floor or Floor(), rank
        self._floor.there[rank] = self._there
        self._store, self._results, self._workshop, self._settings = store, results, workshop, settings
        self._name, self._clock, self._spans = name, clock, spans or Spans()
        self._lanes: dict[Size, Lane] = {}
        self._together: Lane | None = None
        self._turns: Turns[Size] = Turns(QUANTUM)
        self._order = Order()
        self._writer = ThreadPoolExecutor(1, "writer")
        self._writing: dict[str, Future[None]] = {}
        self._unwritten: StoreError | None = None
        self._decoding: deque[Decoding] = deque()
        self._seen: tuple[int, int] | None = None
        self._room = True
        self._told = 0.0
        self._tallies = Tallies()
        self._prompt_hits = 0
        self._fresh: set[tuple[Size, int, int]] = set()
        self.turned = clock()

    def prepare(self) -> None:
        """Make the engine of the bundle's own size, and time it: the first job waits for nothing."""
        size = self._workshop.default_size
        self._open(size)
        if self._rank == 0 and self._floor.team is not None:
            self._floor.take()
            self._open_together(size)
            self._leave_floor()
        self._tell_costs()

    def run(self, stop: Event) -> None:
        """Work until ``stop`` is set; then finish what can be finished in time, and give back the rest."""
        while not stop.is_set():
            try:
                worked = self.turn()
                if not worked:
                    stop.wait(IDLE)
            except StoreError as error:
                log.error("%s: %s; all clips begin again from what is kept of them", self._name, error)
                self._start_over(stop)
        try:
            self._end()
        except StoreError as error:  # what we had goes to others when its lease ends
            log.error("%s: %s", self._name, error)

    def _start_over(self, stop: Event) -> None:
        """Let go of everything, and give it back as soon as the store can be told: nobody else knows where it was."""
        wait(list(self._writing.values()))
        self._unwritten = None
        self._lanes.clear()
        self._together = None
        self._leave_floor()
        self._decoding.clear()
        self._seen, self._room = None, True
        while not stop.wait(RETRY):
            try:
                self._store.requeue(self._store.owned(self._name), self._name)
                return
            except StoreError as error:
                log.error("%s: %s", self._name, error)

    def turn(self) -> bool:
        """One piece of work; whether there was any. Raises :class:`~stiv_deploy.serving.errors.StoreError`."""
        self.turned = self._clock()
        if self._unwritten is not None:
            raise self._unwritten
        with self._floor.device(self._rank) as mine:
            if not mine:
                return False
            self._look()
            return self._work()

    def _work(self) -> bool:
        decoded = self._decode()
        if self._together is not None and self._together.running:
            self._tick(self._together)
            return True
        self._leave_floor()
        busy = [size for size, lane in self._lanes.items() if lane.running]
        if not busy:
            self._tell()
            return decoded
        size = self._turns.next(busy)
        start = time.perf_counter()
        self._tick(self._lanes[size])
        self._turns.spend(size, time.perf_counter() - start)
        return True

    def _look(self) -> None:
        """See what has changed in the store, and take what there is room for."""
        version = self._store.version()
        if version != self._seen:
            self._drop_lost()
        if version != self._seen or self._room or (self._floor.wanted is not None and not self._rank):
            self._seen, self._room = version, False
            self._take()

    def _leave_floor(self) -> None:
        """Give the others their devices again, if all were ours: nothing is then under way on any of them."""
        if not self._floor.held or self._rank:
            return
        try:
            if self._floor.team is not None:
                self._floor.team.settle()
        except StivError as error:
            log.error("%s; from now on each device makes clips of its own", error)
            self._floor.team = self._together = None
        self._floor.give_back()

    @property
    def _open_lanes(self) -> list[Lane]:
        together = self._together
        return [*self._lanes.values(), *([] if together is None else [together])]

    def _clips(self) -> Iterator[tuple[Lane, Clip]]:
        yield from [(lane, clip) for lane in self._open_lanes for clip in lane]

    def _drop_lost(self) -> None:
        """Give up what is no longer ours."""
        owned = self._store.owned(self._name)
        for lane, clip in self._clips():
            if clip.job.id not in owned:
                lane.drop(clip)
                self._give_up(clip.job.id)
                self._room = True
        for each in [each for each in self._decoding if each.clip.job.id not in owned]:
            self._decoding.remove(each)
            self._give_up(each.clip.job.id)

    def _give_up(self, job: str) -> None:
        """Note how long a cancelled job went on, and clean up after it."""
        found = self._store.get(job)
        if found is not None and found.error_code == CANCELLED and found.finished is not None:
            self._tallies.time("cancel_latency", self._clock() - found.finished)
        self._clean_up(job)

    def _take(self) -> None:
        """Let in those who are most urgent, as far as there is room, in place of those who are less so."""
        now, waiting = self._clock(), self._store.waiting()
        here = [clip.job for _, clip in self._clips()]
        self._order.see([*waiting, *here], self._floor.costs().alone)
        if self._together is not None and self._together.running and not self._step_aside(self._together, waiting, now):
            return
        paused = {clip.job.id: lane for lane in self._open_lanes for clip in lane.paused}
        jobs = [*(clip.job for lane in self._open_lanes for clip in lane.paused), *waiting]
        jobs.sort(key=lambda each: self._order.rank(each, now))
        others = self._store.running() if self._floor.team is not None else []
        others = [job for job in others if job.worker in self._floor.names]
        chosen, left = self._next_together(waiting, now), dict[Size, bool]()
        for job in jobs:
            if self._must_wait(job, others):
                self._room = True
                return
            if job.id == chosen and (self._rank or self._gather(job, paused.get(job.id))):
                self._room = True
                return
            if job.size not in left:
                left[job.size] = self._floor.left_to_others(self._rank, job.size)
            if left[job.size] and job.id not in paused:
                self._room = True
                continue
            lane = self._lane(job, now)
            if lane is None or (lane.closing and job.id not in paused) or not self._make_room(lane, job):
                continue
            self._admit(lane, job, paused.get(job.id))
            left.clear()

    def _there(self) -> There:
        """The clips that are here; other threads ask."""
        running = [clip for lane in [*self._lanes.values()] for clip in lane.running]
        paused = [clip for lane in self._open_lanes for clip in [*lane.paused]]
        return There(*([replace(clip.job, step=clip.step) for clip in each] for each in (running, paused)))

    def _admit(self, lane: Lane, job: Job, paused: Lane | None) -> None:
        """Let ``job`` into ``lane``, from the lane where it is ``paused`` or from the store, if we get it."""
        if paused is None:
            clip = self._claim(job)
        else:
            clip = next(each for each in paused.paused if each.job.id == job.id)
            paused.paused.remove(clip)
        if clip is not None:
            lane.admit(clip)

    def _gather(self, job: Job, paused: Lane | None) -> bool:
        """Let all devices make ``job`` together, as soon as the others are between two steps; whether they can."""
        if self._together is not None and self._together.size != job.size and not self._together.empty:
            return False
        self._floor.take()
        try:
            lane = self._open_together(job.size)
        except Exception as error:  # there is no room for it on some device, or the bundle has changed
            log.warning("%s cannot be made by all devices together (%s)", job.size, one_line(str(error)))
            self._floor.refuse(job.size)
            self._leave_floor()
            return False
        self._admit(lane, job, paused)
        return True

    def _next_together(self, waiting: Sequence[Job], now: float) -> str | None:
        """The job that all devices are to make next; who does not lead lets the leader know."""
        chosen = self._floor.chosen(waiting, now)
        if self._rank:
            self._floor.wanted = chosen or self._floor.wanted
            return chosen
        wanted, self._floor.wanted = self._floor.wanted, None
        return chosen or wanted

    def _step_aside(self, lane: Lane, waiting: Sequence[Job], now: float) -> bool:
        """Pause the clip that all devices make for a more urgent one that is next; whether others may come in now."""
        (clip,) = lane.running
        rank, urgency = self._order.rank, self._order.urgency
        if clip.job.attempts >= ATTEMPTS or not any(
            urgency(job) < urgency(clip.job) and rank(job, now) < rank(clip.job, now) for job in waiting
        ):
            return False
        if lane.last(urgency) is None:
            self._room = True
            return False
        lane.pause(clip)
        self._tallies.count("preemptions")
        self._leave_floor()
        return True

    def _must_wait(self, job: Job, others: Sequence[Job]) -> bool:
        """Whether ``job`` or one that runs has been there when workers died: the last try of such a one is alone.

        Of several schedulers of a process, in which ``others`` may run, the first one makes it.
        """
        running = [clip.job for _, clip in self._clips()] + [each.clip.job for each in self._decoding]
        running += others
        suspect = job.worker is None and job.attempts >= ATTEMPTS - 1
        return any(each.attempts >= ATTEMPTS for each in running) or (suspect and bool(running or self._rank))

    def _lane(self, job: Job, now: float) -> Lane | None:
        """The lane of the size of ``job``, in the place of an empty one if need be; ``None`` if there is none."""
        lane = self._lanes.get(job.size)
        if lane is not None:
            lane.closing = lane.closing and not lane.empty
            return lane
        if len(self._lanes) >= SIZES:
            empty = [size for size, lane in self._lanes.items() if lane.empty]
            if not empty:
                self._hurry(job, now)
                return None
            del self._lanes[empty[0]]
        try:
            self._open(job.size)
        except Exception as error:  # a size that is too large for the device, or for a bundle that has changed
            log.exception("there is no engine for %s", job.size)
            self._refuse(job, error)
            return None
        return self._lanes[job.size]

    def _refuse(self, job: Job, error: Exception) -> None:
        if self._store.claim(job.id, self._name) is not None:
            self._fail(job.id, "size_unavailable", f"no engine for its size can be made here ({error})")

    def _hurry(self, job: Job, now: float) -> None:
        """Close the lane that was opened first once ``job`` has waited long for a place."""
        lanes = list(self._lanes.values())
        if now > job.created + PATIENCE and not any(lane.closing for lane in lanes):
            lanes[0].closing = True

    def _open(self, size: Size) -> None:
        """Make the lane of ``size``, with fewer slots where the device has no memory for all."""
        slots = min(self._settings.slots, self._workshop.bundle.max_batch(*size))
        while True:
            try:
                engine = self._workshop.engine(size, slots)
                seconds = self._workshop.timed(engine)
                break
            except Exception as error:
                if slots == 1:
                    raise
                log.warning("no engine for %d clips of %s (%s); trying half of them", slots, size, one_line(str(error)))
                slots //= 2
        for rows, each in seconds.items():
            self._measure(size, rows, each)
        self._lanes[size] = Lane(size, engine, worthwhile_rows(seconds))

    def _open_together(self, size: Size) -> Lane:
        """The lane of ``size`` of all devices, which must be ours, in the place of an empty one."""
        if self._together is not None and self._together.size == size:
            return self._together
        self._together = None
        engine, devices = self._workshop.engine(size, 1, self._floor.team), self._floor.devices
        for rows, each in self._workshop.timed(engine).items():
            self._measure(size, rows, each, devices)
        self._together = Lane(size, engine, engine.rows, devices)
        return self._together

    def _make_room(self, lane: Lane, job: Job) -> bool:
        urgency = self._order.urgency
        while not lane.room(job.rows):
            last = lane.last(urgency)
            if last is None or urgency(last.job) <= urgency(job):
                self._room = self._room or any(urgency(clip.job) > urgency(job) for clip in lane.running)
                return False
            lane.pause(last)
            self._tallies.count("preemptions")
        return True

    def _claim(self, job: Job) -> Clip | None:
        """The clip of ``job``, if we get it and it can be made."""
        claimed = self._store.claim(job.id, self._name)
        if claimed is None:
            return None
        self._note("begun", job.id)
        if claimed[0].attempts == 1:
            waited = self._clock() - job.created
            self._tallies.time("queue_wait", waited)
            self._spans.note("queue", claimed[0], waited)
        start = time.perf_counter()
        try:
            clip = self._workshop.clip(*claimed)
        except StivError as error:
            self._fail(job.id, "invalid_request", str(error))
            return None
        except Exception as error:  # whatever is wrong with it, others go on
            log.exception("%s cannot be prepared", job.id, extra={"job": job.id})
            self._fail(job.id, "internal_error", f"it could not be prepared ({type(error).__name__})")
            return None
        self._note_stage("prepare", clip.job, time.perf_counter() - start)
        self._go_on(clip)
        return clip

    def _note_stage(self, stage: str, job: Job, seconds: float) -> None:
        self._tallies.time("stage", seconds, stage)
        self._spans.note(stage, job, seconds)

    def _note(self, what: str, job: str) -> None:
        log.info(what, extra={"job": job, "worker": self._name})

    def _go_on(self, clip: Clip) -> None:
        """Let ``clip`` go on from the latents that another worker kept, if there are any that fit."""
        arrays = self._results.latents(clip.job.id)
        clip.pause = None if arrays is None else pause_of(arrays, clip)
        clip.step = 0 if clip.pause is None else clip.steps_before(clip.pause.position)

    def _fail(self, job: str, code: str, message: str) -> None:
        expires = self._clock() + self._settings.keep_seconds
        failed = self._store.fail(job, self._name, code, one_line(message), expires)
        found = self._clean_up(job)
        if failed:
            self._note(f"failed: {code}", job)
        if failed and found is not None:
            self._spans.note("failed", found, 0.0, code=code)

    def _clean_up(self, job: str) -> Job | None:
        """Remove the files of a job that is no longer ours, unless another worker makes it, or has made it.

        Returns the job as it is now.
        """
        found = self._store.get(job)
        if found is None or found.state == State.FAILED:
            self._results.remove(job)
        return found

    def _tick(self, lane: Lane) -> None:
        rung, used, start = lane.rung, lane.used_rows, time.perf_counter()
        moved, tick = lane.tick()
        self._workshop.backend.synchronize()
        if tick.blocks:  # else it says nothing of what a call takes
            self._count_rows(rung, used)
            self._measure(lane.size, rung, time.perf_counter() - start, lane.devices)
        self._leave(lane, tick)
        self._keep(lane, [clip for clip in moved if clip in lane.running])
        self._tell()

    def _count_rows(self, computed: int, used: int) -> None:
        self._tallies.count("steps", str(computed))
        self._tallies.count("rows", "computed", computed)
        self._tallies.count("rows", "used", used)

    def _measure(self, size: Size, rows: int, seconds: float, devices: int = 1) -> None:
        self._floor.measure(size, rows, seconds, devices)
        self._fresh.add((size, rows, devices))

    def _leave(self, lane: Lane, tick: Tick) -> None:
        """See off those who are done."""
        for slot, error in tick.failed.items():
            self._tallies.count("suspect_videos", "not_finite")
            self._fail(lane.leave(slot).job.id, "not_finite", str(error))
        for slot, latents in tick.finished.items():
            clip = lane.leave(slot)
            self._note_stage("denoise", clip.job, time.perf_counter() - clip.since)
            self._tallies.count("clips", str(lane.devices))
            self._decoding.append(Decoding(clip, latents, self._workshop.decoding(clip, latents)))
        self._room = self._room or bool(tick.failed or tick.finished)

    def _decode(self) -> bool:
        """Decode a part of the clip that was finished first; whether there was one."""
        if not self._decoding:
            return False
        first = self._decoding[0]
        if not first.go_on():
            self._decoding.popleft()
            self._measure(first.clip.job.size, 0, first.seconds)
            self._note_stage("decode", first.clip.job, first.seconds)
            assert first.frames is not None
            self._hand_over(first.clip, first.frames, first.latents)
        return True

    def _hand_over(self, clip: Clip, frames: np.ndarray, latents: np.ndarray) -> None:
        """Let the other thread write a clip; wait while it has too many."""
        while len(self._writing) >= ENCODING:
            wait(list(self._writing.values()), return_when=FIRST_COMPLETED)
        future = self._writer.submit(self._write, clip, frames, latents)
        self._writing[clip.job.id] = future
        future.add_done_callback(lambda _: self._writing.pop(clip.job.id, None))

    def _write(self, clip: Clip, frames: np.ndarray, latents: np.ndarray) -> None:
        """Write the files of ``clip``, and then tell that it is done, unless it was cancelled meanwhile."""
        job, start = clip.job.id, time.perf_counter()
        for what in suspicions(frames):
            self._tallies.count("suspect_videos", what)
            log.warning("%s is %s", job, what, extra={"job": job})
        try:
            with self._results.files.writing(job) as folder:
                write_files(clip, frames, latents, self._workshop.backend.name, folder)
            self._note_stage("write", clip.job, time.perf_counter() - start)
            self._finish(clip.job)
        except StoreError as error:
            self._unwritten = error
        except Exception as error:  # whatever is wrong with it, others go on
            log.exception("%s cannot be written", job, extra={"job": job})
            self._fail_late(job, error)

    def _fail_late(self, job: str, error: Exception) -> None:
        try:
            self._fail(job, "storage_error", f"its result could not be written ({type(error).__name__})")
        except StoreError as unwritten:  # for the other thread, which has the clips
            self._unwritten = unwritten

    def _finish(self, job: Job) -> None:
        now = self._clock()
        size, expires = self._results.files.bytes(job.id), now + self._settings.keep_seconds
        if self._store.complete(job.id, self._name, size, expires):
            self._results.forget_latents(job.id)
            self._tallies.time("e2e", now - job.created)
            self._note("completed", job.id)
        else:
            self._clean_up(job.id)

    def _keep(self, lane: Lane, moved: list[Clip]) -> None:
        """Write the latents of those that have come another ``latents_every`` steps."""
        every = self._settings.latents_every
        for clip in moved:
            if every and clip.step % every == 0:
                lane.keep(clip)
                self._save(clip)
                clip.pause = None

    def _save(self, clip: Clip) -> None:
        """Write the latents of ``clip``; where that is not possible it would begin again, as if it had not paused."""
        if clip.pause is None:
            return
        try:
            self._results.save_latents(clip.job.id, **pause_arrays(clip.pause, clip))
        except OutputError as error:
            log.warning("the latents of %s are not kept (%s)", clip.job.id, error)
            return
        self._store.advance(self._name, {clip.job.id: clip.step})

    def _tell(self) -> None:
        """Note progress and times in the store, now and then."""
        now = time.monotonic()
        if now < self._told + TOLD:
            return
        self._told = now
        self._tell_tallies()
        self._show()
        steps = {clip.job.id: clip.step for _, clip in self._clips()}
        if steps:
            self._store.advance(self._name, steps)
            self._tell_costs()

    def _show(self) -> None:
        """Save a preview of each clip that somebody looks at."""
        preview = self._workshop.bundle.manifest.preview
        for lane, clip in self._clips():
            if preview is None or not self._results.previews.wanted(clip.job.id):
                continue
            latents = lane.estimate(clip)
            if latents is None:
                continue
            seconds = clip.job.frames / (clip.video.request.fps or 1)
            try:
                self._results.previews.save(clip.job.id, preview_picture(latents, preview, seconds))
            except OutputError as error:
                log.warning("no preview of %s (%s)", clip.job.id, error)

    def _tell_tallies(self) -> None:
        hits = self._workshop.prompt_hits
        if hits > self._prompt_hits:
            self._tallies.count("prompt_cache_hits", amount=hits - self._prompt_hits)
        self._prompt_hits = hits
        found = self._tallies.take()
        if found:
            self._store.tally(found)

    def _tell_costs(self) -> None:
        fresh = [each for each in self._floor.measured() if (each.size, each.rows, each.devices) in self._fresh]
        self._store.measure(self._workshop.bundle.hash, fresh)
        self._fresh.clear()

    def _end(self) -> None:
        """Let what runs finish while there is time; then give it back, to go on from here."""
        until = time.monotonic() + self._settings.grace_seconds
        while time.monotonic() + self._soonest() < until:
            with self._floor.device(self._rank) as mine:
                if mine:
                    self._drop_lost()
                    self._work()
        with self._floor.own(self._rank):
            for lane in reversed(self._open_lanes):
                self._give_back(lane)
                self._leave_floor()
            while self._decode():
                pass
        self.close()

    def _soonest(self) -> float:
        """Seconds until the next running clip is done, by the times measured; infinite if none runs."""
        costs = self._floor.costs()
        found = [
            (costs.alone if lane.devices == 1 else costs.soonest)(replace(clip.job, step=clip.step))
            for lane in self._open_lanes
            for clip in lane.running
        ]
        return min((each for each in found if each is not None), default=math.inf)

    def _give_back(self, lane: Lane) -> None:
        while not lane.between_steps():
            self._tick(lane)
        for clip in lane.running:
            lane.pause(clip)
        for clip in lane.paused:
            self._save(clip)
        self._store.requeue([clip.job.id for clip in lane.paused], self._name)
        lane.paused.clear()

    def close(self) -> None:
        """Wait until all files are written, and tell what was counted."""
        self._writer.shutdown()
        self._tell_tallies()
