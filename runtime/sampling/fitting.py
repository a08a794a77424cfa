"""AB2's weights fitted to a model: in every step those that lead nearest to the exact flow.

AB2 goes on along the line through two velocities, whose weights follow from the times of the steps alone. Any other two
weights cost as little, and where steps are long, better ones can be found: clips are sampled step by step beside their
own exact flow, and each step takes the pair that leads nearest to where that is by then (least squares over all clips).
So later steps make good, as far as they can, what earlier ones missed. Weights fitted along the exact flow itself do
not: they are worse than AB2's own (docs/results.md, "Fitted weights"). The idea is that of solvers bespoke to a model
(arXiv 2403.01329, arXiv 2505.21114), which optimize all steps together by gradients; this needs but one run.
"""

from collections.abc import Sequence

import numpy as np

from stiv_deploy.runtime.bundle.bounds import WEIGHT_LIMIT
from stiv_deploy.runtime.sampling.solvers import adams_bashforth

STATES = 240
"""States of the exact flow that are kept at most."""
NEAR = 4
"""States that one between them is interpolated from."""
ALIKE = 1e-3
"""Velocities that differ by less than such a part are one: which of them counts does not matter, nor is it known."""
DIGITS = 6
"""Digits of a weight behind the point, far below what its clips determine."""
Pair = tuple[float, float]


class ExactPath:
    """The exact flow of the clips numbered ``chosen``: states of a fine run over ``times``, and what lies between."""

    def __init__(self, times: Sequence[float], chosen: Sequence[int]) -> None:
        self._all, self._chosen = times, list(chosen)
        self._every = -(-len(times) // STATES)
        self._times: list[float] = []
        self._states: list[np.ndarray] = []

    def __call__(self, step: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Hear of the run's ``step``, the first being 1, from latents fp32 [clips, T, C, h, w] ``before`` it on."""
        if step == 1:
            self._keep(0, before)
        if step % self._every == 0 or step == len(self._all) - 1:
            self._keep(step, after)
        return after

    def _keep(self, step: int, latents: np.ndarray) -> None:
        self._times.append(self._all[step])
        self._states.append(latents[self._chosen])

    def at(self, time: float) -> np.ndarray:
        """Latents fp64 [chosen, T, C, h, w] at ``time``, by the cubic through the four states that are nearest."""
        after = int(np.searchsorted(self._times, time))
        first = min(max(after - NEAR // 2, 0), max(len(self._times) - NEAR, 0))
        places = range(first, min(first + NEAR, len(self._times)))
        parts = lagrange([self._times[place] for place in places], time)
        return np.sum(
            [part * self._states[place].astype(np.float64) for place, part in zip(places, parts, strict=True)], axis=0
        )


def lagrange(times: Sequence[float], time: float) -> list[float]:
    """What each of the values at ``times`` counts in the polynomial through them all, at ``time``."""
    return [float(np.prod([(time - other) / (own - other) for other in times if other != own])) for own in times]


class WeightFit:
    """Fits AB2's weights over ``times`` to the clips numbered ``chosen``, whose exact flow is ``path``.

    It is asked after each step, taken by Euler's rule, where all clips shall go on from instead; then ``weights`` are
    those of all steps but the first, which stays Euler's. Clips count by the relative L2 error of their latents.

    ``guided`` bool [clips, steps] says which evaluations are guided; None: no clip's guidance begins or ends on its
    way. In a step with which it does, a clip goes Euler's way, as AB2 then does
    (:func:`~stiv_deploy.runtime.sampling.solvers.evaluations`), and does not count; where no other one is left, the
    step has AB2's own weights.
    """

    def __init__(
        self, times: Sequence[float], path: ExactPath, chosen: Sequence[int], guided: np.ndarray | None = None
    ) -> None:
        self._times, self._path, self._chosen, self._guided = times, path, np.array(chosen), guided
        self._scales = np.linalg.norm(_flat(path.at(1.0)), axis=1, keepdims=True)
        self._before: np.ndarray | None = None
        self.weights: list[Pair] = []

    def __call__(self, step: int, latents: np.ndarray, after: np.ndarray) -> np.ndarray:
        """Where clips that step number ``step`` took from ``latents`` to ``after`` go on from, fp32 [clips, ...]."""
        start, end = self._times[step - 1], self._times[step]
        wide = latents.astype(np.float64)
        velocity, before = (after - wide) / (end - start), self._before
        self._before = velocity
        if before is None:
            return after
        turned = self._turned(step, len(latents))
        pair = self._fitted(step, ~turned, wide, (end - start) * velocity, (end - start) * before)
        self.weights.append(pair)
        moved = wide + (end - start) * (pair[0] * velocity + pair[1] * before)
        return np.where(turned.reshape(-1, *[1] * (after.ndim - 1)), after, moved).astype(np.float32)

    def _turned(self, step: int, clips: int) -> np.ndarray:
        """Of which clips guidance begins or ends with step number ``step``, bool [clips]."""
        if self._guided is None:
            return np.zeros(clips, bool)
        turned: np.ndarray = self._guided[:, step - 1] != self._guided[:, step - 2]
        return turned

    def _fitted(self, step: int, counts: np.ndarray, start: np.ndarray, *moves: np.ndarray) -> Pair:
        """The pair for ``step`` by those chosen clips that ``counts``, bool [clips], marks."""
        counted = counts[self._chosen]
        chosen, scales = self._chosen[counted], self._scales[counted]
        before, now, end = self._times[step - 2 : step + 1]
        if not len(chosen):
            return adams_bashforth((end - now) / (now - before))
        columns = np.stack([(_flat(move[chosen]) / scales).ravel() for move in moves], axis=1)
        wanted = (_flat(self._path.at(end)[counted] - start[chosen]) / scales).ravel()
        pair = np.linalg.lstsq(columns, wanted, rcond=ALIKE)[0]
        this, last = np.clip(pair, -WEIGHT_LIMIT, WEIGHT_LIMIT)
        return round(float(this), DIGITS), round(float(last), DIGITS)


def _flat(latents: np.ndarray) -> np.ndarray:
    return latents.reshape(len(latents), -1)
