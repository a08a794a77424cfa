"""Evaluations by themselves, with the step's arithmetic in fp64, on a flow that has an exact solution."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.solvers import EULER, Evaluation, adams_bashforth, anew, evaluations

NOISE = np.linspace(-2.0, 2.0, 7)
MEAN, SPREAD = 0.8, 0.7
"""The data of the analytic flow: normal, of this mean and standard deviation."""


def settings_of(steps: int, solver: Solver, shift: float = 1.0) -> SamplingSettings:
    return SamplingSettings(steps=steps, solver=solver, time_shift=shift, guidance_mode=GuidanceMode.NONE)


def spread(t: float) -> float:
    """Standard deviation of x_t = t * data + (1 - t) * noise."""
    return math.hypot(t * SPREAD, 1 - t)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    """E[data - noise | x_t = x], what a model of the normal data learns; x(t) = t * MEAN + spread(t) * x(0)."""
    return MEAN + (t * SPREAD**2 - (1 - t)) / spread(t) ** 2 * (x - t * MEAN)


def integrate(planned: tuple[Evaluation, ...], noise: np.ndarray = NOISE) -> np.ndarray:
    """x(1) of x(0) = ``noise``, by the rule of the ``step`` graph."""
    base = seen = noise
    previous = np.full_like(noise, math.nan)
    for each in planned:
        now, before = each.weights
        current = velocity(seen, each.timestep)
        seen = base + each.dt * (now * current + (before * previous if before else 0.0))
        base = base if each.hold else seen
        previous = current
    return base


def error(steps: int, solver: Solver, shift: float) -> float:
    exact = MEAN + SPREAD * NOISE
    return float(np.abs(integrate(evaluations(settings_of(steps, solver, shift))) - exact).max())


def slope(solver: Solver, shift: float) -> float:
    """By how many powers of two errors fall when steps are halved, a line fitted to five numbers of steps."""
    steps = [64, 128, 256, 512, 1024]
    errors = [error(each, solver, shift) for each in steps]
    return -float(np.polyfit(np.log2(steps), np.log2(errors), 1)[0])


shifts = st.sampled_from([0.5, 1.0, 3.0])


@given(steps=st.integers(1, 40), solver=st.sampled_from(list(Solver)), shift=shifts)
def test_steps_follow_the_schedule(steps: int, solver: Solver, shift: float) -> None:
    settings = settings_of(steps, solver, shift)
    times, planned = settings.times().tolist(), evaluations(settings)
    whole = [each for each in planned if not each.hold]
    assert [each.next_timestep for each in whole] == times[1:]
    assert [each.dt for each in whole] == [end - start for start, end in zip(times, times[1:], strict=False)]
    assert len(planned) == (2 * steps - 1 if solver is Solver.HEUN else steps)
    assert planned[0].weights == EULER, "there is no previous velocity at first"
    for each, following in zip(planned, planned[1:], strict=False):
        assert following.timestep == each.next_timestep


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4], ids=["uniform", "shifted", "shifted to the data"])
@pytest.mark.parametrize(("solver", "order"), [(Solver.EULER, 1), (Solver.HEUN, 2), (Solver.AB2, 2)])
def test_order_of_convergence(solver: Solver, order: int, shift: float) -> None:
    # The term of the next order is some 1/64 of the error at the fewest steps, times a constant of the flow.
    assert slope(solver, shift) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ab2_is_nearer_than_the_others_at_equal_evaluations(shift: float) -> None:
    ab2, euler, heun = error(21, Solver.AB2, shift), error(21, Solver.EULER, shift), error(11, Solver.HEUN, shift)
    assert ab2 < min(euler, heun)


@given(steps=st.integers(2, 40), shift=shifts)
def test_ab2_is_exact_where_velocity_is_a_line_in_time(steps: int, shift: float) -> None:
    """From its second step on, on steps of any length: the weighted velocities' mean is that of the step."""
    first, *others = evaluations(settings_of(steps, Solver.AB2, shift))
    assert first.weights == EULER
    for before, each in zip((first, *others), others, strict=False):
        now, past = each.weights
        mean = now * (2 + 3 * each.timestep) + past * (2 + 3 * before.timestep)
        assert mean == pytest.approx(2 + 3 * (each.timestep + each.dt / 2), rel=1e-12)


def test_weights_of_equal_steps_are_the_known_ones() -> None:
    assert adams_bashforth(1.0) == (1.5, -0.5)
    assert [each.weights for each in evaluations(settings_of(2, Solver.AB2, 3.0))] == [EULER, (2.5, -1.5)]


def test_where_guidance_begins_and_ends_nothing_looks_back() -> None:
    """There the velocity jumps, so that the line through the one before leads nowhere."""
    chosen = dataclasses.replace(settings_of(5, Solver.AB2), guidance_from=0.2, guidance_until=0.4)
    planned = evaluations(chosen)
    assert [each.guided for each in planned] == [False, True, True, False, False]
    assert [each.weights == EULER for each in planned] == [True, True, False, True, False]
    assert planned[2].weights == evaluations(settings_of(5, Solver.AB2))[2].weights


def test_a_time_at_the_end_of_guidance_is_guided_whatever_its_last_bits_are() -> None:
    chosen = dataclasses.replace(settings_of(3, Solver.EULER, 2.0), guidance_from=0.2, guidance_until=0.5)
    assert [each.guided for each in evaluations(chosen)] == [False, True, True]
    for bits in (-1, 1):
        assert chosen.guides(np.nextafter(0.5, bits).item())
        assert chosen.guides(np.nextafter(0.2, bits).item())


@pytest.mark.parametrize("position", [0, 3])
def test_a_run_whose_latents_were_changed_looks_not_back_once(position: int) -> None:
    planned = evaluations(settings_of(6, Solver.AB2))
    again = anew(planned, position)
    assert again[position] == planned[position]._replace(weights=EULER)
    assert (*again[:position], planned[position], *again[position + 1 :]) == planned


def test_a_corrector_of_changed_latents_is_an_euler_step() -> None:
    planned = evaluations(settings_of(4, Solver.HEUN))
    assert anew(planned, 2) == planned, "a predictor looks not back"
    again = Evaluation(0.25, 0.5, 0.25, scale=planned[0].scale)
    assert anew(planned, 3) == (*planned[:3], again, *planned[4:])


def test_given_weights_stand_for_the_rules_own_but_for_the_first_and_where_guidance_ends() -> None:
    weights = ((1.7, -0.6), (1.4, -0.5), (2.0, -1.1), (0.9, 0.2))
    own = SamplingSettings(steps=5, solver=Solver.AB2, guidance_until=0.5)
    planned = evaluations(dataclasses.replace(own, solver_weights=weights))
    assert [each.weights for each in planned] == [EULER, weights[0], weights[1], EULER, weights[3]]
    assert [each._replace(weights=EULER) for each in planned] == [
        each._replace(weights=EULER) for each in evaluations(own)
    ]
    assert anew(planned, 2)[2].weights == EULER


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"solver": Solver.EULER}, "solver_weights are of ab2, the solver is euler; leave them out"),
        ({"steps": 4}, "solver_weights are of every step but the first, 3 here, got 2"),
        ({"steps": 1}, "solver_weights are of every step but the first, 0 here, got 2"),
    ],
)
def test_weights_of_other_steps_or_solvers_are_refused(changes: dict[str, Any], message: str) -> None:
    fitted = {"steps": 3, "solver": Solver.AB2, "solver_weights": ((1.5, -0.5), (1.5, -0.5))}
    SamplingSettings(**fitted)
    with pytest.raises(RequestError, match=message):
        SamplingSettings(**fitted | changes)
