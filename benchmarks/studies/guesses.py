"""Models that guess a part of some evaluations: what their blocks add, or their branch without text.

Both are for one run of the reference sampler with one evaluation a step. Where blocks are skipped, any two weights of
the last two residuals (:mod:`skips`) cost the same, as those of AB2's velocities do, so they too are fitted.
"""

from collections.abc import Collection, Mapping, Sequence

import above  # noqa: F401  # isort: split
import torch
from skips import Guessing, through
from torch import Tensor

from stiv_deploy.stiv_ref.block import additive_mask
from stiv_deploy.stiv_ref.model import Stiv, TextKV

Pair = tuple[float, float]


class SkippedBlocks(Guessing):
    """Skips the blocks of ``steps``, in whose stead the last two residuals stand, weighed by the step's own pair.

    ``pairs`` has those of the last residual and the one before, by step. For a step that is not in it, the blocks run
    all the same, and the pair that comes nearest to their residual (least squares) is found and goes on from there.
    """

    def __init__(self, model: Stiv, steps: Collection[int], pairs: Mapping[int, Pair]) -> None:
        super().__init__(model, steps)
        self.pairs = dict(pairs)
        self._known: list[Tensor] = []

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
        step, rope = self.next(), self.model.rope_tables(latents.shape)
        first, modulation, condition = self.model.embed(latents, timestep, micro, pooled, rope)
        if step in self.pairs:
            residual = self._guess(step)
        else:
            mask = additive_mask(token_mask)
            residual = self._heard(step, through(self.model, first, modulation, text_kv, mask, rope) - first)
        return self.model.unpatchify(self.model.head(first + residual, condition), latents.shape)

    def _guess(self, step: int) -> Tensor:
        last, before = self.pairs[step]
        return last * self._known[-1] + before * self._known[-2]

    def _heard(self, step: int, residual: Tensor) -> Tensor:
        if step in self.steps:
            self.pairs[step] = nearest(self._known[::-1], residual)
            return self._guess(step)
        self._known = [*self._known[-1:], residual]
        return residual


def nearest(two: Sequence[Tensor], wanted: Tensor) -> Pair:
    """Weights of ``two`` tensors whose sum comes nearest to the one that is ``wanted``."""
    columns = torch.stack([each.flatten() for each in two], dim=1).double()
    first, second = torch.linalg.lstsq(columns, wanted.reshape(-1, 1).double()).solution[:, 0].tolist()
    return first, second


class ReusedDifference(Guessing):
    """Evaluates the branch with text alone in ``steps``; the other one differs from it as it last did."""

    def __call__(
        self,
        latents: Tensor,
        timestep: Tensor,
        micro: Tensor,
        states: Tensor,
        token_mask: Tensor,
        pooled: Tensor,
        text_kv: TextKV,
    ) -> Tensor:
        """Velocities of both branches [2 * B, T, C, h, w], from what both take, as joint guidance has them."""
        inputs = (latents, timestep, micro, states, token_mask, pooled)
        if self.next() not in self.steps:
            both = self.model(*inputs, text_kv=text_kv)
            with_text, without = both.chunk(2)
            self._difference = with_text - without
            return both
        half = len(latents) // 2
        text = TextKV(text_kv.k[:, :half], text_kv.v[:, :half])
        velocity = self.model(*(each[:half] for each in inputs), text_kv=text)
        return torch.cat([velocity, velocity - self._difference])
