"""The sampling loop, a step at a time: clips join and leave between evaluations and share one call of the model.

A *slot* holds a clip that is being made, a *row* of the model one of its guidance branches. Clips in one engine have
the same size; prompts, seeds, steps, guidance, given frames and solvers are each clip's own. Frame replacement,
guidance, renormalization and the solver's update are the ``step`` graph; the same loop in plain PyTorch, for one batch,
is ``stiv_ref/sampler.py`` (arXiv 2412.07730, section 2).

Everything is allocated and bound when the engine is made, for each of its *rungs*: how many rows a call of the model
has. A tick takes the smallest rung that holds the rows in use, writes a few numbers to the device and runs graphs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.runtime.sampling.conditioning import row_mask
from stiv_deploy.runtime.sampling.denoiser import Denoiser, RowModel
from stiv_deploy.runtime.sampling.guidance import GuidanceRow
from stiv_deploy.runtime.sampling.hooks import Hook, no_hook
from stiv_deploy.runtime.sampling.replay import Replay
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.skipping import KNOWN
from stiv_deploy.runtime.sampling.solvers import EULER, Evaluation, anew, evaluations, most_rows
from stiv_deploy.runtime.sampling.step_inputs import StepInputs
from stiv_deploy.runtime.sampling.text_stage import TextStage

MakeModel = Callable[[dict[str, int]], RowModel]


class Tick(NamedTuple):
    """What a tick did, by slot. ``moved`` slots completed a step, to the time given.

    ``finished`` latents, fp32 [T, C, h, w], have their given frames bit-equal to ``clean``. Slots that finished or
    failed are free. One without ``blocks`` ran none of the model's, as all clips skipped them.
    """

    moved: dict[int, float]
    finished: dict[int, np.ndarray]
    failed: dict[int, StivError]
    blocks: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class Pause:
    """A clip between two steps, on the host: all that its next evaluations need besides its :class:`Sample`.

    ``position`` evaluations are done; ``latents`` fp32 [T, C, h, w], and ``inputs`` fp32 [rows, T, C, h, w] are what
    the model sees next in its rows, the conditional one first. ``velocity`` fp32 [T, C, h, w] is the guided one of the
    evaluation before, None if the next one is a step of Euler's. ``residuals`` uint8 [rows, 2, n] are the bytes of the
    last but one and of the last of each row, None if no step to come is skipped by them.
    """

    position: int
    latents: np.ndarray
    inputs: np.ndarray
    velocity: np.ndarray | None = None
    residuals: np.ndarray | None = None


@dataclass
class _Running:
    """A clip in its slot: what is left of its evaluations, and its rows of the model, the conditional one first.

    ``rows`` are those that the evaluation at ``position`` needs, ``reserved`` the most that any from there on does. Of
    the two places for residuals of rows, ``oldest`` is the one that the next residual goes to.
    """

    sample: Sample
    planned: tuple[Evaluation, ...]
    rows: list[int]
    position: int = 0
    oldest: int = 0

    @property
    def skip(self) -> tuple[float, float] | None:
        """Weights by place of the known residuals, if the next evaluation skips the blocks."""
        weights = self.planned[self.position].residuals
        if weights is None:
            return None
        last, before = weights
        return (before, last) if self.oldest == 0 else (last, before)

    @property
    def until_skip(self) -> int | None:
        """Evaluations from the next one on until one skips the blocks; None if none does."""
        if not self.sample.settings.skipped_steps:
            return None
        left = enumerate(self.planned[self.position :])
        return next((count for count, each in left if each.residuals is not None), None)

    @property
    def remembers(self) -> bool:
        """Whether an evaluation from the next one on skips the blocks."""
        return self.until_skip is not None

    @property
    def looks_back(self) -> bool:
        """Whether one of those does so by a residual that is known already."""
        return self.until_skip is not None and self.until_skip < KNOWN

    @property
    def guidance(self) -> list[GuidanceRow]:
        return self.sample.settings.rows(self.planned[self.position].guided)

    @property
    def reserved(self) -> int:
        later = any(each.guided for each in self.planned[self.position :])
        return max(len(self.rows), len(self.sample.settings.rows(later)))

    @property
    def turns(self) -> bool:
        """Whether the next evaluation begins guidance or ends it."""
        return self.planned[self.position - 1].guided != self.planned[self.position].guided

    @property
    def done(self) -> bool:
        return self.position == len(self.planned)

    @property
    def between(self) -> bool:
        return self.position == 0 or not self.planned[self.position - 1].hold


class StepEngine:
    """Slots for ``dims["batch"]`` clips of one size over at most ``dims["model_batch"]`` rows of the model.

    ``rungs`` are the numbers of rows that calls of the model have, ascending up to the most there can be. A clip is the
    same, bit by bit where the backend computes every row alike, whatever runs beside it at the same rung. With
    ``debug`` latents are checked after every step, so that the first bad one can be named; this waits for the device.
    ``model`` makes the model of the rows, for dimensions; by default one on ``backend`` alone.
    """

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        dims: Mapping[str, int],
        text: TextStage,
        *,
        rungs: Sequence[int] = (),
        hook: Hook = no_hook,
        capture: bool = True,
        debug: bool = False,
        model: MakeModel | None = None,
    ) -> None:
        self.backend = backend
        self.debug = debug
        self.slots, self.rows = dims["batch"], dims["model_batch"]
        self.rungs = tuple(rungs) or (self.rows,)
        assert self.rungs == tuple(sorted({*self.rungs, self.rows}))
        made = None if model is None else model(dict(dims))
        self.denoiser: RowModel = made or Denoiser(backend, manifest, dict(dims))
        self._text = text
        self._inputs = StepInputs(self.denoiser)
        self._replay = partial(Replay, backend, hook=hook, capture=capture and self.denoiser.captures)
        timed = self._inputs.timed
        self._forward = {rows: self._replay(self.denoiser.calls(rows, **timed)) for rows in self.rungs}
        self._skipping: dict[tuple[int, bool], Replay] = {}
        self._advance = {rows: [hook("step", call) for call in self._inputs.both_ways(rows)] for rows in self.rungs}
        self._zeroed: dict[int, list[int]] = {}
        self._zeros = backend.upload(np.zeros(self.denoiser.model_input.shape[2:], np.float32))
        self._side = 0
        self._running: dict[int, _Running] = {}

    @property
    def running(self) -> list[int]:
        """Slots in use, in the order of admission."""
        return list(self._running)

    @property
    def used_rows(self) -> int:
        """Rows of the model in use."""
        return sum(len(running.rows) for running in self._running.values())

    @property
    def reserved_rows(self) -> int:
        """The most rows that the clips which are in will have in use, each at its own most."""
        return sum(running.reserved for running in self._running.values())

    @property
    def rung(self) -> int:
        """Rows of the next tick's call: the smallest rung that holds those in use."""
        return next(rows for rows in self.rungs if rows >= self.used_rows)

    def fits(self, sample: Sample) -> bool:
        """Whether there is a slot for ``sample`` now, and rows for all of it beside what the others will need."""
        return len(self._running) < self.slots and self.reserved_rows + most_rows(sample.settings) <= self.rows

    def admit(self, sample: Sample, pause: Pause | None = None) -> int:
        """Put ``sample`` into a free slot, to take part from the next tick on; it must fit, see :meth:`fits`.

        It begins, or goes on from ``pause`` bit by bit as if it had never paused (at the same rungs). Encodes its
        texts, unless they are kept, and queues copies; does not wait for the device.
        """
        assert self.fits(sample)
        slot = next(slot for slot in range(self.slots) if slot not in self._running)
        running = _Running(sample, evaluations(sample.settings), [], pause.position if pause else 0)
        self._running[slot] = running
        self._fill_slot(slot, sample)
        for each in running.guidance:
            self._add_row(slot, each, sample.start(row_mask(each.branch, sample.frame_mask)))
        self._guide(slot, running.guidance)
        if pause is not None:
            self._go_on(slot, pause)
        return slot

    def _guide(self, slot: int, guidance: list[GuidanceRow]) -> None:
        """Set how the next evaluations of the clip in ``slot`` weigh its rows."""
        running = self._running[slot]
        renorm = running.sample.settings.renormalizes and len(guidance) > 1  # of one row it changes nothing
        self._inputs.guide(slot, running.sample.frame_mask, guidance, renorm=renorm)
        self._inputs.gather(slot, running.rows)

    def _regroup(self, slot: int) -> None:
        """Give the clip in ``slot`` the rows that its next evaluation needs, if that begins guidance or ends it."""
        running = self._running[slot]
        guidance = running.guidance
        if len(guidance) == len(running.rows):
            return
        extra, running.rows = running.rows[len(guidance) :], running.rows[: len(guidance)]
        self._close(extra)
        if joining := guidance[len(running.rows) :]:
            self._join(slot, joining)
        self._guide(slot, guidance)

    def _join(self, slot: int, joining: Sequence[GuidanceRow]) -> None:
        """Add rows to a clip on its way: what the conditional one sees, and given frames as each of them sees those."""
        running = self._running[slot]
        given, timestep = running.sample.frame_mask, running.planned[running.position].timestep
        seen = self.backend.read(self.denoiser.model_input[running.rows[0]])
        path = running.sample.between(timestep)
        for each in joining:
            hidden = given & ~row_mask(each.branch, given)
            self._add_row(slot, each, np.where(hidden[:, None, None, None], path, seen))

    def _go_on(self, slot: int, pause: Pause) -> None:
        running = self._running[slot]
        self.backend.write(self._latents[slot], pause.latents)
        for row, seen in zip(running.rows, pause.inputs, strict=True):
            self.backend.write(self.denoiser.model_input[row], seen)
        if pause.velocity is None:
            running.planned = anew(running.planned, pause.position)
        else:
            self.backend.write(self._inputs.velocities[self._side][slot], pause.velocity)
        if pause.residuals is not None:
            self._skipper.residuals.write(running.rows, pause.residuals)

    def between_steps(self, slot: int) -> bool:
        """Whether the clip in ``slot`` is between two steps, not within one of several evaluations."""
        return self._running[slot].between

    def pause(self, slot: int) -> Pause:
        """The clip in ``slot``, which must be between two steps and stays in; waits for the device."""
        running = self._running[slot]
        assert running.between
        inputs = [self.backend.read(self.denoiser.model_input[row]) for row in running.rows]
        latents = self.backend.read(self._latents[slot])
        back = running.planned[running.position].weights != EULER
        velocity = self.backend.read(self._inputs.velocities[self._side][slot]) if back else None
        order = (running.oldest, 1 - running.oldest)
        return Pause(
            position=running.position,
            latents=latents,
            inputs=np.stack(inputs),
            velocity=velocity,
            residuals=self._skipper.residuals.read(running.rows, order) if running.looks_back else None,
        )

    def estimate(self, slot: int) -> np.ndarray | None:
        """The clip of ``slot`` as it looks like becoming, latents fp32 [T, C, h, w]; waits for the device.

        From where it is, straight on with its last guided velocity. ``None`` if it is not between two steps, or at the
        beginning.
        """
        running = self._running[slot]
        if not running.between or not running.position:
            return None
        latents = self.backend.read(self._latents[slot])
        left = np.float32(1 - running.planned[running.position - 1].next_timestep)
        ahead = latents + left * self.backend.read(self._inputs.velocities[self._side][slot])
        return np.where(self._inputs.given(slot)[:, None, None, None], latents, ahead)

    def _fill_slot(self, slot: int, sample: Sample) -> None:
        self.backend.write(self._inputs.noise[slot], sample.noise)
        self.backend.write(self._inputs.clean[slot], sample.clean)
        self.backend.write(self._latents[slot], sample.start(sample.frame_mask))

    def _add_row(self, slot: int, guidance: GuidanceRow, latents: np.ndarray) -> None:
        """One more row for the clip in ``slot``, which sees ``latents`` fp32 [T, C, h, w] next."""
        row, running = self.used_rows, self._running[slot]
        sample = running.sample
        running.rows.append(row)
        self.denoiser.set_row(row, self._text(sample.text if guidance.branch.text else sample.negative), sample.micro)
        zeroed = sample.zeroed(guidance.branch)
        self.backend.write(
            self.denoiser.model_input[row], np.where(zeroed[:, None, None, None], np.float32(0), latents)
        )
        self._inputs.see(row, slot, row_mask(guidance.branch, sample.frame_mask))
        self._zeroed[row] = [int(frame) for frame in np.flatnonzero(zeroed)]

    def tick(self) -> Tick:
        """One evaluation of the model for every running clip, each at its own time; at least one must be running.

        Where only some of the clips skip the blocks the others' run for all, and those do not look at them.
        """
        assert self._running
        rung, clips = self.rung, self._running.values()
        remember, blocks = any(each.remembers for each in clips), any(each.skip is None for each in clips)
        for slot, running in self._running.items():
            self._inputs.schedule(slot, running.rows, running.planned[running.position])
            if remember:
                self._inputs.skip(running.rows, running.skip)
        self._inputs.flush()
        (self._remembering(rung, blocks=blocks) if remember else self._forward[rung])()
        self._advance[rung][self._side]()
        self._side = 1 - self._side
        self._zero(range(self.used_rows))
        if remember:
            self._remember()
        return self._count(blocks=blocks)

    def _remember(self) -> None:
        """Keep the residuals of clips that have not skipped the blocks and are to skip some."""
        for running in self._running.values():
            if running.skip is None and running.remembers:
                for row in running.rows:
                    self._skipper.residuals.keep(row, running.oldest)
                running.oldest = 1 - running.oldest

    @property
    def _skipper(self) -> Denoiser:
        """The model of the rows, of which one can skip the blocks."""
        assert isinstance(self.denoiser, Denoiser)
        return self.denoiser

    def _remembering(self, rung: int, *, blocks: bool) -> Replay:
        """The calls of a tick in which some clip skips the blocks or is to; bound when they are first wanted."""
        if (rung, blocks) not in self._skipping:
            buffers = self._inputs.timed | self._inputs.skipping
            self._skipping[rung, blocks] = self._replay(self._skipper.skipping_calls(rung, blocks=blocks, **buffers))
        return self._skipping[rung, blocks]

    def _zero(self, rows: Iterable[int]) -> None:
        """Take out of the next input of ``rows`` what they are not to see at all: ``step`` has put it there noised."""
        for row in rows:
            for frame in self._zeroed.get(row, ()):
                self.backend.copy(self.denoiser.model_input[row][frame], self._zeros)

    def idle(self, rung: int) -> None:
        """One evaluation over the rows of ``rung`` for nobody, to load and to time it; no clip may be running."""
        assert not self._running
        self._inputs.flush()
        self._forward[rung]()
        self._advance[rung][self._side]()

    def _count(self, *, blocks: bool) -> Tick:
        """Count the evaluation, and take out what has finished."""
        tick = Tick({}, {}, {}, blocks)
        for slot, running in self._running.items():
            evaluation = running.planned[running.position]
            running.position += 1
            if not evaluation.hold:
                tick.moved[slot] = evaluation.next_timestep
                if running.done or self.debug:
                    self._look(slot, running, evaluation, tick)
        if tick.finished or tick.failed:
            self._release([*tick.finished, *tick.failed])
        for slot, running in self._running.items():
            if running.turns:
                self._regroup(slot)
        return tick

    def _look(self, slot: int, running: _Running, evaluation: Evaluation, tick: Tick) -> None:
        """Are a slot's latents finite, and are they the result?"""
        latents = self.backend.read(self._latents[slot])
        if not np.isfinite(latents).all():
            tick.failed[slot] = _not_finite(running, evaluation, named=self.debug)
        elif running.done:
            tick.finished[slot] = latents

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a clip's latents, [T, C, h, w]."""
        return self._latents.shape[1:]

    def change(self, slot: int, latents: np.ndarray) -> None:
        """Let the clip in ``slot`` go on from ``latents``, fp32 [T, C, h, w]; its given frames stay as they are.

        A solver that looks back starts anew there, unless they are what the clip had.
        """
        given, running = self._inputs.given(slot)[:, None, None, None], self._running[slot]
        had = self.backend.read(self._latents[slot])
        if np.array_equal(had, np.where(given, had, latents)):
            return
        for buffer in (self._latents[slot], *(self.denoiser.model_input[row] for row in running.rows)):
            self.backend.write(buffer, np.where(given, self.backend.read(buffer), latents))
        running.planned = anew(running.planned, running.position)
        self._regroup(slot)

    def evict(self, slot: int) -> None:
        """Give up the clip in ``slot``; the others do not notice."""
        self._release([slot])

    def _release(self, slots: Sequence[int]) -> None:
        """Free ``slots`` and their rows."""
        rows = [row for slot in slots for row in self._running[slot].rows]
        for slot in slots:
            del self._running[slot]
            self._inputs.rest(slot)
        self._close(rows)

    def _close(self, rows: Sequence[int]) -> None:
        """Fill the gaps that ``rows``, nobody's any more, leave among those in use with the last ones."""
        last = self.used_rows + len(rows)
        for hole in sorted(rows, reverse=True):
            last -= 1
            if hole != last:
                self._move_row(hole, last)

    def _move_row(self, target: int, source: int) -> None:
        slot, rows = next((slot, each.rows) for slot, each in self._running.items() if source in each.rows)
        rows[rows.index(source)] = target
        self.denoiser.move_row(target, source)
        self._inputs.move_row(target, source)
        self._zeroed[target] = self._zeroed.pop(source)
        self._inputs.gather(slot, rows)

    @property
    def _latents(self) -> Buffer:
        return self._inputs.latents[self._side]

    def read(self) -> np.ndarray:
        """The latents of all slots, fp32 [slots, T, C, h, w], a free one's last; waits for the device."""
        return self.backend.read(self._latents)


def _not_finite(running: _Running, evaluation: Evaluation, *, named: bool) -> StivError:
    if named:
        planned = running.planned
        done, steps = (sum(not each.hold for each in part) for part in (planned[: running.position], planned))
        where = f"step {done} of {steps} (t = {evaluation.next_timestep - evaluation.dt:.4f})"
        return StivError(f"the latents are not finite after {where}")
    return StivError(
        "the generated latents are not finite; lower the guidance scale, or use a bundle of higher precision "
        "(set debug to name the first bad step)"
    )
