"""Weights fitted to an exact flow that is known in closed form, beside AB2's own and beside brute force."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.bundle.bounds import WEIGHT_LIMIT
from stiv_deploy.runtime.sampling.fitting import DIGITS, STATES, ExactPath, WeightFit, lagrange
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.solvers import evaluations

CLIPS = np.random.default_rng(0).standard_normal((6, 2, 1, 2, 3))
MEANS = np.array([0.5, -1.0, 0.8])
"""The data of the flow, three mixed normals, of one deviation."""
SPREAD = 0.2
CHOSEN = (0, 2, 4)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """E[data - noise | x_t = x] of the mixture."""
    variance = (t * SPREAD) ** 2 + (1 - t) ** 2
    shares = np.exp(-((x[..., None] - t * MEANS) ** 2) / (2 * variance))
    shares /= shares.sum(-1, keepdims=True)
    each = MEANS + (t * SPREAD**2 - (1 - t)) / variance * (x[..., None] - t * MEANS)
    return (shares * each).sum(-1)


def sampled(settings: SamplingSettings, follow: Any = None) -> np.ndarray:
    """Latents fp64 by the evaluations of ``settings``, which ``follow`` may change after each."""
    x, previous = CLIPS, np.zeros_like(CLIPS)
    for step, each in enumerate(evaluations(settings), 1):
        current = velocity(x, each.timestep)
        after = x + each.dt * (each.weights[0] * current + each.weights[1] * previous)
        x, previous = after if follow is None else follow(step, x, after), current
    return x


def fine(steps: int = 480) -> tuple[ExactPath, np.ndarray]:
    settings = SamplingSettings(steps=steps, solver=Solver.AB2, time_shift=1.5)
    path = ExactPath(settings.times().tolist(), CHOSEN)
    return path, sampled(settings, path)


def fitted(steps: int, path: ExactPath) -> tuple[SamplingSettings, np.ndarray]:
    """AB2 with the weights that a fit has found, and where its clips ended."""
    euler = SamplingSettings(steps=steps, solver=Solver.EULER)
    fit = WeightFit(euler.times().tolist(), path, CHOSEN)
    ended = sampled(euler, fit)
    return SamplingSettings(steps=steps, solver=Solver.AB2, solver_weights=tuple(fit.weights)), ended


def errors(latents: np.ndarray, exact: np.ndarray) -> np.ndarray:
    wrong, right = ((each).reshape(len(exact), -1) for each in (latents - exact, exact))
    return np.linalg.norm(wrong, axis=1) / np.linalg.norm(right, axis=1)


times = st.lists(st.integers(0, 1000), min_size=4, max_size=4, unique=True).map(lambda each: [t / 1000 for t in each])


@given(times, st.floats(0, 1), st.lists(st.floats(-1, 1), min_size=4, max_size=4))
def test_four_values_make_a_cubic(known: list[float], time: float, coefficients: list[float]) -> None:
    parts = lagrange(known, time)
    made = sum(part * np.polyval(coefficients, own) for part, own in zip(parts, known, strict=True))
    # Parts are products of three quotients: each adds its share of roundings, of values of at most 4.
    assert made == pytest.approx(
        np.polyval(coefficients, time), abs=4 * 20 * np.finfo(float).eps * sum(map(abs, parts))
    )


@pytest.mark.parametrize("steps", [2, 40, 480])
def test_a_path_passes_through_its_states_and_keeps_a_few_hundred(steps: int) -> None:
    settings = SamplingSettings(steps=steps, solver=Solver.AB2)
    found, kept = settings.times().tolist(), []
    path = ExactPath(found, CHOSEN)

    def both(step: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        kept.append(after[list(CHOSEN)])
        return path(step, before, after)

    ended = sampled(settings, both)
    np.testing.assert_array_equal(path.at(0.0), CLIPS[list(CHOSEN)])
    np.testing.assert_allclose(path.at(1.0), ended[list(CHOSEN)], rtol=1e-12)
    assert len(path._times) <= STATES + 2
    if steps <= STATES:
        np.testing.assert_allclose(path.at(found[1]), kept[0], rtol=1e-12)


def test_between_two_states_a_path_is_smooth() -> None:
    coarse, fine_path = fine(120)[0], fine(1920)[0]
    middle = (1 / 3 + 0.4, 0.123, 0.9871)
    for time in middle:
        # The rule of the runs errs by the square of the step, cubics by its fourth power.
        assert errors(coarse.at(time), fine_path.at(time)).max() < 2e-3


@pytest.mark.parametrize("steps", [3, 4, 6, 10])
def test_fitted_weights_lead_nearer_to_the_exact_flow_of_other_clips_too(steps: int) -> None:
    path, exact = fine()
    settings, _ = fitted(steps, path)
    assert len(settings.solver_weights) == steps - 1
    plain = SamplingSettings(steps=steps, solver=Solver.AB2)
    own, rule = (errors(sampled(each), exact) for each in (settings, plain))
    assert own[::2].mean() < rule[::2].mean()
    assert own[1::2].mean() < rule[1::2].mean()


def test_clips_of_a_fit_end_where_its_weights_lead() -> None:
    path, _ = fine()
    settings, ended = fitted(6, path)
    # The fit goes on from float32, and its weights are rounded: a rounding a step, which the flow may stretch.
    scale = 6 * (np.finfo(np.float32).eps + 2 * 10.0**-DIGITS)
    np.testing.assert_allclose(sampled(settings), ended, rtol=0, atol=4 * scale * np.abs(ended).max())


def test_no_other_pair_leads_nearer_in_a_step() -> None:
    """By brute force around the second step's pair; clips count by their relative errors."""
    path, exact = fine()
    settings, _ = fitted(5, path)
    found = SamplingSettings(steps=5).times().tolist()
    first = velocity(CLIPS, 0.0)
    x = CLIPS + found[1] * first
    second = velocity(x, found[1])
    norms = np.linalg.norm(exact.reshape(len(exact), -1), axis=1)

    def missed(pair: tuple[float, float]) -> float:
        after = x + (found[2] - found[1]) * (pair[0] * second + pair[1] * first)
        wrong = (after - _everywhere(path, found[2])).reshape(len(after), -1)
        return float(((np.linalg.norm(wrong, axis=1) / norms)[list(CHOSEN)] ** 2).sum())

    own = settings.solver_weights[0]
    for turn in np.linspace(0, 2 * math.pi, 16, endpoint=False):
        assert missed(own) < missed((own[0] + 0.01 * math.cos(turn), own[1] + 0.01 * math.sin(turn)))


def test_velocities_that_are_alike_share_their_weight() -> None:
    """A flow that goes straight on, but for roundings, has no weights of its own: none that it gets may be large."""
    times = SamplingSettings(steps=5).times().tolist()
    path = ExactPath(times, CHOSEN)
    goal = CLIPS + 3
    for step in range(1, 6):
        before, after = (CLIPS + time * 3 for time in times[step - 1 : step + 1])
        path(step, before.astype(np.float32), after.astype(np.float32))
    fit, x = WeightFit(times, path, CHOSEN), CLIPS.astype(np.float32)
    for step in range(1, 6):
        x = fit(step, x, (x + 3 * (times[step] - times[step - 1])).astype(np.float32))
    np.testing.assert_allclose(fit.weights, 0.5, atol=1e-5)
    np.testing.assert_allclose(x, goal, atol=20 * np.finfo(np.float32).eps * np.abs(goal).max())


def test_a_clip_whose_guidance_turns_goes_eulers_way_and_does_not_count() -> None:
    path, _ = fine()
    euler = SamplingSettings(steps=5)
    guided = np.ones((len(CLIPS), 5), bool)
    guided[[0, 1], 2:] = False  # one that chooses and one that judges, with the third step
    guided[:, 4] = ~guided[:, 3]  # all, with the last one
    whole, turning = (
        WeightFit(euler.times().tolist(), path, CHOSEN),
        WeightFit(euler.times().tolist(), path, CHOSEN, guided),
    )
    ways: list[np.ndarray] = []

    def follow(step: int, x: np.ndarray, after: np.ndarray) -> np.ndarray:
        made = turning(step, x, after)
        ways.append((made == after.astype(np.float32)).reshape(len(CLIPS), -1).all(axis=1))
        return made

    sampled(euler, whole)
    sampled(euler, follow)
    assert [each.tolist() for each in ways[1:]] == [[False] * 6, [True] * 2 + [False] * 4, [False] * 6, [True] * 6]
    assert turning.weights[0] == whole.weights[0]
    assert turning.weights[1] != whole.weights[1], "a clip less counts"
    assert turning.weights[3] == (1.5, -0.5), "none is left to fit to: the rule's own, of equal steps"


def test_weights_stay_within_their_bounds() -> None:
    """A flow that stands nearly still where much is missed would take any weight."""
    times, steps = [0.0, 0.5, 1.0], (CLIPS, CLIPS + 1.0, CLIPS + 2.0)
    path = ExactPath(times, CHOSEN)
    for step in (1, 2):
        path(step, steps[step - 1], steps[step])
    fit, x = WeightFit(times, path, CHOSEN), CLIPS
    for step in (1, 2):
        x = fit(step, x, x + 1e-6)
    assert np.abs(fit.weights).max() == WEIGHT_LIMIT


def _everywhere(path: ExactPath, time: float) -> np.ndarray:
    """The path's clips in their places; of the others nothing is known."""
    whole = np.full_like(CLIPS, np.nan)
    whole[list(CHOSEN)] = path.at(time)
    return whole
