"""Steps that skip the model's blocks: what stands for what these would have added to the tokens.

The *residual* of an evaluation is what all blocks together add to its tokens. It changes slowly along a clip's way, so
that a step can run ``embed`` and ``head`` alone, and take the line through the last two residuals over time instead of
a third (TaylorSeer, arXiv 2503.06923, of order one; MagCache, arXiv 2506.09045, takes the last one as it is).
"""

from collections.abc import Collection, Iterator, Sequence

KNOWN = 2
"""Residuals that a skipped step goes on along."""
FIRST_SHARE, FIRST_TIME = 0.2, 0.12
"""The first share of the steps, and steps before that time, are not proposed: there a clip's course is decided."""
Pair = tuple[float, float]


def skippable(times: Sequence[float]) -> list[int]:
    """Numbers of the steps over ``times`` [steps + 1] that may be proposed, from 0 on."""
    steps = len(times) - 1
    return [step for step in range(steps) if step >= max(KNOWN, FIRST_SHARE * steps) and times[step] >= FIRST_TIME]


def residual_weights(times: Sequence[float], skipped: Collection[int]) -> Iterator[Pair | None]:
    """For each step over ``times`` [steps + 1] the weights of the last residual and of the one before, if ``skipped``.

    They are those of the line through both, at the time of the step.
    """
    known, skipped = list[float](), frozenset(skipped)
    for step, time in enumerate(times[:-1]):
        if step not in skipped:
            known = [*known[-1:], time]
            yield None
            continue
        before, last = known
        ahead = (time - last) / (last - before)
        yield 1 + ahead, -ahead
