"""Clips of the engine that are looked at, changed, paused and gone on with."""

import dataclasses

import numpy as np
import pytest
from engine_clips import drawn, finish, make_engine, run, sample_of, settings_of

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.sampling.settings import Solver


@pytest.mark.parametrize(("mode", "frames"), [("sit", []), ("none", [0, 2])])
def test_a_clip_goes_on_from_the_latents_of_another(toy_bundle: Bundle, mode: str, frames: list[int]) -> None:
    """From another clip's latents in the middle it ends where that one ends, and given frames stay its own."""
    engine, chosen = make_engine(toy_bundle, slots=2), settings_of(mode)
    other = sample_of(chosen, frames, seed=5)
    clean = other.clean if frames else drawn(9)
    own, neighbour = (
        engine.admit(sample_of(chosen, frames, seed=seed, clean=clean, noise=drawn(seed))) for seed in (0, 7)
    )
    twin = make_engine(toy_bundle, slots=2)
    (wanted,) = (twin.admit(each) for each in (other,))
    for each in (engine, twin):
        each.tick()
        each.tick()
    latents = twin.read()[wanted]
    engine.change(own, np.where(other.frame_mask[:, None, None, None], np.float32(99), latents))
    np.testing.assert_array_equal(engine.read()[own], latents)
    made = finish(engine)
    np.testing.assert_array_equal(made[own], finish(twin)[wanted])
    alone = run(make_engine(toy_bundle, slots=2), sample_of(chosen, frames, seed=7, clean=clean, noise=drawn(7)))
    np.testing.assert_array_equal(made[neighbour], alone)


def test_after_a_change_a_clip_looks_not_back(toy_bundle: Bundle) -> None:
    """AB2 from other latents takes one Euler step; from its own it goes on as if nobody had asked."""
    chosen = settings_of("jit", solver=Solver.AB2, steps=3)
    plain = run(make_engine(toy_bundle), sample_of(chosen, [0]))
    engine, made = make_engine(toy_bundle), {}
    for name, shift in (("same", 0.0), ("moved", 1.0)):
        slot = engine.admit(sample_of(chosen, [0]))
        engine.tick()
        engine.tick()
        before = engine.read()[slot] + np.float32(shift)
        engine.change(slot, before)
        made[name] = finish(engine)[slot]
    np.testing.assert_array_equal(made["same"], plain)
    euler = run(make_engine(toy_bundle), sample_of(settings_of("jit", solver=Solver.EULER, steps=3), [0]))
    assert not np.array_equal(plain, euler)
    stepper = make_engine(toy_bundle)
    other = stepper.admit(sample_of(dataclasses.replace(chosen, solver=Solver.EULER), [0]))
    stepper.tick()
    stepper.tick()
    stepper.change(other, before)
    np.testing.assert_array_equal(made["moved"], finish(stepper)[other])


def test_unchanged_latents_do_not_disturb_a_corrector(toy_bundle: Bundle) -> None:
    """Between Heun's two evaluations the model's input is the predictor's result, not the clip's latents."""
    chosen = settings_of("jit", solver=Solver.HEUN)
    engine = make_engine(toy_bundle)
    slot = engine.admit(sample_of(chosen))
    engine.tick()
    engine.change(slot, engine.read()[slot])
    np.testing.assert_array_equal(finish(engine)[slot], run(make_engine(toy_bundle), sample_of(chosen)))


@pytest.mark.parametrize("mode", ["none", "jit", "sit"])
@pytest.mark.parametrize(("solver", "ticks"), [(Solver.EULER, 3), (Solver.HEUN, 4), (Solver.AB2, 3)])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0)])
def test_a_clip_goes_on_from_a_pause_bit_by_bit(
    toy_bundle: Bundle, mode: str, solver: Solver, ticks: int, interval: tuple[float, float]
) -> None:
    """In another engine, as another process would, and in another slot and other rows."""
    start, end = interval
    sample = sample_of(settings_of(mode, solver=solver, guidance_from=start, guidance_until=end), [0])
    whole = run(make_engine(toy_bundle), sample)
    first, second = make_engine(toy_bundle), make_engine(toy_bundle, slots=2)
    slot = first.admit(sample)
    for _ in range(ticks):
        first.tick()
    pause = first.pause(slot)
    np.testing.assert_array_equal(finish(first)[slot], whole)  # looking changes nothing
    second.admit(sample_of(settings_of("jit"), seed=7))
    slot = second.admit(sample, pause)
    np.testing.assert_array_equal(finish(second)[slot], whole)


@pytest.mark.parametrize("ticks", [1, 2, 3, 4])
def test_a_clip_with_weights_of_its_own_goes_on_from_a_pause_bit_by_bit(toy_bundle: Bundle, ticks: int) -> None:
    """Those that look not back too, whose weight of this velocity need not be Euler's."""
    weights = ((1.3, -0.2), (0.0, 1.2), (1.7, 0.0), (1.0, 0.0))
    sample = sample_of(settings_of(solver=Solver.AB2, steps=5, solver_weights=weights), [0])
    whole = run(make_engine(toy_bundle), sample)
    first, second = make_engine(toy_bundle), make_engine(toy_bundle)
    slot = first.admit(sample)
    for _ in range(ticks):
        first.tick()
    slot = second.admit(sample, first.pause(slot))
    np.testing.assert_array_equal(finish(second)[slot], whole)


def test_a_clip_of_other_latents_goes_on_from_a_pause_bit_by_bit(toy_bundle: Bundle) -> None:
    sample = sample_of(settings_of(solver=Solver.AB2, time_shift=2.0))
    first, second = make_engine(toy_bundle), make_engine(toy_bundle)
    slot = first.admit(sample)
    first.tick()
    first.tick()
    first.change(slot, first.read()[slot] + 1)
    pause = first.pause(slot)
    assert pause.velocity is None
    whole = finish(first)[slot]
    slot = second.admit(sample, pause)
    np.testing.assert_array_equal(finish(second)[slot], whole)


def test_within_a_step_there_is_no_pause(toy_bundle: Bundle) -> None:
    engine = make_engine(toy_bundle)
    slot = engine.admit(sample_of(settings_of(solver=Solver.HEUN)))
    between = []
    for _ in range(4):
        between.append(engine.between_steps(slot))
        engine.tick()
    assert between == [True, False, True, False]


@pytest.mark.parametrize("solver", [Solver.EULER, Solver.HEUN])
def test_an_estimate_goes_straight_on_to_the_end(toy_bundle: Bundle, solver: Solver) -> None:
    """With the velocity that the last step went with, as two looks at the latents tell; given frames are as given."""
    engine, sample = make_engine(toy_bundle), sample_of(settings_of(solver=solver), frames=[1])
    slot = engine.admit(sample)
    assert engine.estimate(slot) is None
    before, at = engine.read()[slot], 0.0
    while True:
        tick = engine.tick()
        if tick.finished:
            break
        if slot not in tick.moved:
            assert engine.estimate(slot) is None  # within a step of two evaluations
            continue
        now, to = engine.read()[slot], tick.moved[slot]
        found = engine.estimate(slot)
        if solver is Solver.EULER:
            expected = now + (1 - to) * (now - before) / (to - at)
            np.testing.assert_allclose(found[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(found[1], sample.clean[1])
        before, at = now, to
