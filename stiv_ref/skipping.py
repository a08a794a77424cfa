"""Steps that skip the model's blocks: the line through what these added last stands for what they would add.

The *residual* of an evaluation is what all blocks together add to its tokens. It changes slowly along a clip's way, so
that the line through the last two, over time, is a good guess of the next one (TaylorSeer, arXiv 2503.06923, of order
one; MagCache, arXiv 2506.09045, takes the last one as it is).
"""

from collections.abc import Collection

import torch
from torch import Tensor


class Skipping:
    """The residuals of one run, whose evaluations at ``times`` skip the blocks; :meth:`begin` says which one follows.

    Each of those comes after two others, whose residuals are of the same rows.
    """

    def __init__(self, times: Collection[float]) -> None:
        self._times, self._now = frozenset(times), 0.0
        self._known: list[tuple[float, Tensor]] = []

    def begin(self, time: float) -> None:
        """The evaluation at ``time`` follows."""
        self._now = time

    def guess(self) -> Tensor | None:
        """What stands for the residual [B, T', S, D] at this time, in at least fp32; None where the blocks run."""
        if self._now not in self._times:
            return None
        (before_time, before), (last_time, last) = self._known
        ahead = (self._now - last_time) / (last_time - before_time)
        return (1 + ahead) * last - ahead * before

    def remember(self, first: Tensor, last: Tensor) -> None:
        """Keep the residual of tokens [B, T', S, D] in front of the blocks and behind them.

        It is rounded to the tokens' type, as where it is kept on a device.
        """
        wide = torch.promote_types(first.dtype, torch.float32)
        residual = (last.to(wide) - first.to(wide)).to(first.dtype).to(wide)
        self._known = [*self._known[-1:], (self._now, residual)]
