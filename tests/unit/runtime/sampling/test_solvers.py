"""Evaluations by themselves, with the step's arithmetic in fp64, on an equation that has an exact solution."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.solvers import evaluations


def settings_of(steps: int, solver: Solver, shift: float = 1.0) -> SamplingSettings:
    return SamplingSettings(steps=steps, solver=solver, time_shift=shift, guidance_mode=GuidanceMode.NONE)


def integrate(steps: int, solver: Solver) -> float:
    """x(1) of dx/dt = x + t, x(0) = 1, by the rule of the ``step`` graph."""
    base = seen = 1.0
    previous = math.nan
    for each in evaluations(settings_of(steps, solver)):
        velocity = seen + each.timestep
        now, before = each.weights
        seen = base + each.dt * (now * velocity + (before * previous if before else 0.0))
        base = base if each.hold else seen
        previous = velocity
    return base


@given(steps=st.integers(1, 40), solver=st.sampled_from(list(Solver)), shift=st.sampled_from([0.5, 1.0, 3.0]))
def test_steps_follow_the_schedule(steps: int, solver: Solver, shift: float) -> None:
    settings = settings_of(steps, solver, shift)
    times, planned = settings.times().tolist(), evaluations(settings)
    whole = [each for each in planned if not each.hold]
    assert [each.next_timestep for each in whole] == times[1:]
    assert [each.dt for each in whole] == [end - start for start, end in zip(times, times[1:], strict=False)]
    assert len(planned) == (2 * steps - 1 if solver is Solver.HEUN else steps)
    assert planned[0].weights == (1.0, 0.0), "there is no previous velocity at first"
    for each, following in zip(planned, planned[1:], strict=False):
        assert following.timestep == each.next_timestep


@pytest.mark.parametrize(("solver", "order"), [(Solver.EULER, 1), (Solver.HEUN, 2)])
def test_order_of_convergence(solver: Solver, order: int) -> None:
    coarse, fine = (abs(integrate(steps, solver) - (2 * math.e - 2)) for steps in (64, 128))
    # Halving the step divides the error by 2^order, up to terms of the next order (1/64, times a small constant).
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)
