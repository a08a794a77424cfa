"""Skipping the blocks of an evaluation: which ones, and what stands for what the blocks would have added.

The *residual* of an evaluation is what all blocks together add to its tokens. An evaluation that skips runs ``embed``
and ``head`` alone and takes the residual from those before: the last one (order 0), or the line through the last two
over time (order 1), as MagCache (arXiv 2506.09045) and TaylorSeer (arXiv 2503.06923) do.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence

import above  # noqa: F401  # isort: split
from arithmetic import stiv_operations
from torch import Tensor

from stiv_deploy.runtime.sampling import skipping
from stiv_deploy.stiv_ref.block import RopeTables, additive_mask
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.model import Stiv, TextKV

LONGEST = 3
"""Steps in a row that MagCache's rule skips at most."""
Residuals = Sequence[tuple[float, Tensor]]
"""Times and residuals [rows, T', S, D] of evaluations, the last one last."""


def skippable(steps: int, shift: float, late_stretch: float = 1.0) -> list[int]:
    """Numbers of the steps that a mask may skip (:func:`~stiv_deploy.runtime.sampling.skipping.skippable`)."""
    return skipping.skippable(schedule(steps, shift, late_stretch).tolist())


def every(period: int, steps: int, shift: float) -> tuple[int, ...]:
    """Of the skippable steps, all but every ``period``-th; the first of them is skipped."""
    return tuple(step for place, step in enumerate(skippable(steps, shift)) if (place + 1) % period)


def within_budget(budget: float, ratios: Sequence[float], steps: int, shift: float) -> tuple[int, ...]:
    """MagCache's rule: skip while the errors that the ``ratios`` predict add up to less than ``budget``.

    ``ratios`` [steps] are norms of the residuals over those of the step before; their product since the last full step
    is how much larger the residual has become than the one that is taken for it.
    """
    chosen, allowed = [], set(skippable(steps, shift))
    ratio, spent, length = 1.0, 0.0, 0
    for step in range(steps):
        ratio *= ratios[step]
        spent, length = spent + abs(1 - ratio), length + 1
        if step in allowed and spent < budget and length <= LONGEST:
            chosen.append(step)
        else:
            ratio, spent, length = 1.0, 0.0, 0
    return tuple(chosen)


def extrapolated(known: Residuals, time: float, order: int) -> Tensor:
    """The residual at ``time`` by the last of ``known`` (order 0) or the line through the last two (order 1)."""
    (last_time, last) = known[-1]
    if order == 0 or len(known) < 2:
        return last
    before_time, before = known[-2]
    return last + (time - last_time) / (last_time - before_time) * (last - before)


Evaluated = dict[tuple[float, bytes], tuple[Tensor, Tensor]]
"""Residuals and velocities by the time and the latents that they were computed at."""


class Guessing:
    """A model for one run of the reference sampler, one evaluation a step, of which it guesses a part in ``steps``."""

    def __init__(self, model: Stiv, steps: Collection[int]) -> None:
        self.model, self.steps, self.done = model, frozenset(steps), 0

    @property
    def config(self) -> StivConfig:
        """The model's own."""
        return self.model.config

    def text_kv(self, states: Tensor) -> TextKV:
        """The model's own."""
        return self.model.text_kv(states)

    def next(self) -> int:
        """Number of the step that begins."""
        self.done += 1
        return self.done - 1


class Skipping(Guessing):
    """A model that skips the blocks of some ``steps``.

    ``norms`` are those of the residuals of all evaluations that ran their blocks, [rows] each. What runs of the same
    model and conditions begin with is computed once: it stands in ``evaluated``.
    """

    def __init__(self, model: Stiv, steps: Collection[int], order: int, evaluated: Evaluated) -> None:
        super().__init__(model, steps)
        self.order, self.evaluated = order, evaluated
        self.known: list[tuple[float, Tensor]] = []
        self.norms: list[Tensor] = []

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        micro: Tensor,
        _states: Tensor,
        token_mask: Tensor,
        pooled: Tensor,
        text_kv: TextKV,
    ) -> Tensor:
        """The velocity, as :meth:`Stiv.forward` predicts it, with or without its blocks."""
        time, rope = float(timestep[0]), self.model.rope_tables(latents.shape)
        skips = self.next() in self.steps

        def evaluated() -> tuple[Tensor, Tensor]:
            first, modulation, condition = self.model.embed(latents, timestep, micro, pooled, rope)
            if skips:
                last = first + extrapolated(self.known, time, self.order)
            else:
                last = through(self.model, first, modulation, text_kv, additive_mask(token_mask), rope)
            return last - first, self.model.unpatchify(self.model.head(last, condition), latents.shape)

        return evaluated()[1] if skips else self._kept(time, latents, evaluated)

    def _kept(self, time: float, latents: Tensor, evaluated: Callable[[], tuple[Tensor, Tensor]]) -> Tensor:
        key = time, hashlib.sha256(latents.numpy().tobytes()).digest()
        if key not in self.evaluated:
            self.evaluated[key] = evaluated()
        residual, velocity = self.evaluated[key]
        self.known = [*self.known[-1:], (time, residual)]
        self.norms.append(residual.flatten(1).norm(dim=1))
        return velocity


def through(model: Stiv, x: Tensor, modulation: Tensor, text: TextKV, mask: Tensor, rope: RopeTables) -> Tensor:
    """Tokens [rows, T', S, D] behind all blocks, from those before them; the arguments are a block's own."""
    for block, k, v in zip(model.blocks, text.k, text.v, strict=True):
        x = block(x, modulation, k, v, mask, rope)
    return x


def norm_ratios(norms: Sequence[Tensor]) -> list[float]:
    """Mean over the rows of each residual's norm over that of the step before; the first is 1."""
    ratios = [float((now / before).mean()) for before, now in zip(norms, norms[1:], strict=False)]
    return [1.0, *ratios]


def fixed_share(config: StivConfig, latents_shape: tuple[int, ...], text_tokens: int) -> float:
    """Share of an evaluation's arithmetic that ``embed`` and ``head`` have: what a skipped one still costs.

    ``latents_shape`` is [T, C, h, w], of one row. Reads and writes are not counted, to the advantage of skips.
    """
    found = stiv_operations(config, latents_shape, text_tokens)
    return found.ends / found.total
