"""The engine's loop against the reference's and against analytic answers; its slots, rows and memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_clips import (
    FRAMES,
    MICRO,
    MODES,
    SIZE,
    drawn,
    finish,
    make_engine,
    reference_latents,
    run,
    sample_of,
    settings_of,
    tokens,
    tolerance,
)

from stiv_deploy.runtime.backends.base import ALIGNMENT, Backend, Call
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import RequestError, StivError
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.settings import Solver
from stiv_deploy.runtime.sampling.solvers import evaluations


@pytest.mark.parametrize("frames", [[], [0], [0, 2]], ids=["t2v", "first", "ends"])
@pytest.mark.parametrize("mode", list(GuidanceMode))
@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("renorm", [False, True])
def test_loop_is_the_reference_loop(
    toy_bundle: Bundle, toy: Any, frames: list[int], mode: GuidanceMode, solver: Solver, renorm: bool
) -> None:
    sample = sample_of(settings_of(mode, solver=solver, renorm=renorm, time_shift=2.0), frames)
    engine, wanted = make_engine(toy_bundle), reference_latents(toy_bundle, toy, sample)
    for _ in range(2):  # a second clip in the same slot is as the first
        latents = run(engine, sample)
        np.testing.assert_array_equal(latents[frames], sample.clean[frames])
        np.testing.assert_allclose(latents, wanted, rtol=0, atol=tolerance(5))


@pytest.mark.parametrize("mode", [GuidanceMode.JIT, GuidanceMode.SIT])
@pytest.mark.parametrize("solver", list(Solver))
def test_the_branch_without_the_image_gets_zero_latents(toy_bundle: Bundle, mode: GuidanceMode, solver: Solver) -> None:
    """At every evaluation, and in whichever row it is once a clip before it has ended."""
    engine = make_engine(toy_bundle, slots=2)
    engine.admit(sample_of(settings_of(mode, steps=2)))
    sample = sample_of(settings_of(mode, solver=solver, unseen=Unseen.ZERO), [0, 2], seed=5)
    slot = engine.admit(sample)
    made: dict[int, np.ndarray] = {}
    while engine.running:
        *seeing, blind = engine._running[slot].rows
        for row in seeing:
            np.testing.assert_array_equal(
                engine.backend.read(engine.denoiser.model_input[row])[[0, 2]], sample.clean[[0, 2]]
            )
        unseen = engine.backend.read(engine.denoiser.model_input[blind])
        assert not unseen[[0, 2]].any()
        assert unseen[1].all()
        made |= engine.tick().finished
    np.testing.assert_array_equal(made[slot][[0, 2]], sample.clean[[0, 2]])
    later = sample_of(settings_of(mode), [0])
    np.testing.assert_array_equal(run(engine, later), run(make_engine(toy_bundle, slots=2), later))


def exponential(bundle_of: Callable[[float], Path], slope: float) -> Bundle:
    """Without conditions and rotary shift the toy's velocity is slope^2 * x + (terms in t)."""
    return Bundle.open(bundle_of(slope))


def terms_in_time(toy_bundle: Bundle, slope: float) -> tuple[np.ndarray, float]:
    """p and q of v = slope^2 * x + p + q * t for a model without conditions; p fp64 [T, 1, h, w]."""
    tables = rope.rope_tables(
        toy_bundle.manifest.model, {"latent_height": SIZE, "latent_width": SIZE, "token_frames": FRAMES}
    )
    space = (tables["spatial_cos"].sum(1) + tables["spatial_sin"].sum(1)).reshape(SIZE, SIZE).astype(np.float64)
    time = (tables["temporal_cos"].sum(1) + tables["temporal_sin"].sum(1)).astype(np.float64)
    return 0.01 * (time[:, None, None, None] + space) * (1 + slope), 1 + 0.025 * (1 + slope)


def analytic(toy_bundle: Bundle, slope: float, noise: np.ndarray) -> np.ndarray:
    """Solution at t = 1 of dx/dt = k x + p + q t, x(0) = noise, in fp64."""
    k = slope * slope
    p, q = terms_in_time(toy_bundle, slope)
    if k == 0:
        return noise + p + q / 2
    growth = math.exp(k)
    return noise * growth + p * (growth - 1) / k + q * (growth - 1 - k) / k**2


def error(toy_bundle: Bundle, slope: float, solver: Solver, steps: int) -> float:
    nothing = tokens(np.zeros(5, dtype=np.int64))
    sample = sample_of(settings_of("none", solver=solver, steps=steps), micro=np.zeros_like(MICRO), text=nothing)
    latents = run(make_engine(toy_bundle), sample)
    return float(np.abs(latents - analytic(toy_bundle, slope, drawn(0).astype(np.float64))).max())


@pytest.mark.parametrize("solver", [Solver.HEUN, Solver.AB2])
def test_second_order_is_exact_where_velocity_is_linear_in_time_but_for_one_step(
    bundle_of: Callable[..., Path], solver: Solver
) -> None:
    toy_bundle = exponential(bundle_of, 0.0)
    q, steps = terms_in_time(toy_bundle, 0.0)[1], 8
    # Heun's last step and AB2's first are Euler, which misses q/2 of the squared step.
    assert error(toy_bundle, 0.0, solver, steps) == pytest.approx(q / (2 * steps**2), rel=1e-3)
    assert error(toy_bundle, 0.0, Solver.EULER, steps) == pytest.approx(q / (2 * steps), rel=1e-4)


def test_orders_of_convergence(bundle_of: Callable[..., Path]) -> None:
    toy_bundle = exponential(bundle_of, 1.0)
    for solver, order in ((Solver.EULER, 1), (Solver.HEUN, 2), (Solver.AB2, 2)):
        coarse, fine = (error(toy_bundle, 1.0, solver, steps) for steps in (16, 32))
        # Halving the step divides the error by 2^order, up to a term of the next order in the step (1/16).
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_hidden_row_gets_noised_frames_and_the_others_clean_ones(toy_bundle: Bundle) -> None:
    seen: list[np.ndarray] = []

    def hook(graph: str, call: Call) -> Call:
        def observed() -> None:
            if graph == "embed":
                seen.append(engine.backend.read(engine.denoiser.model_input))
            call()

        return observed

    engine = make_engine(toy_bundle, hook=hook)
    run(engine, sample_of(settings_of("sit", steps=4), [0]))
    noise, clean = drawn(0)[0], drawn(1)[0]
    assert len(seen) == 4
    for step, rows in enumerate(seen):
        time = np.float32(step / 4)
        np.testing.assert_array_equal(rows[0, 0], clean)
        np.testing.assert_array_equal(rows[1, 0], clean)
        np.testing.assert_array_equal(rows[2, 0], time * clean + (1 - time) * noise)
        np.testing.assert_array_equal(rows[0, 1:], rows[2, 1:])


@pytest.mark.parametrize("shared", [True, False])
def test_nothing_is_allocated_bound_or_read_in_a_tick(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    if not shared:
        monkeypatch.setattr(OnnxRuntimeBackend, "host_view", Backend.host_view)
    engine = make_engine(toy_bundle, slots=2)
    backend = engine.backend
    chosen = [settings_of(mode, solver=Solver.HEUN) for mode in ("jit", "sit")]
    for each in chosen:
        engine.admit(sample_of(each))
    written: list[int] = []
    reads: list[int] = []
    write, read = backend.write, backend.read
    forbidden = lambda *_: pytest.fail("allocated or bound in a tick")  # noqa: E731
    monkeypatch.setattr(backend, "empty", forbidden)
    monkeypatch.setattr(backend, "bind", forbidden)
    monkeypatch.setattr(backend, "read", lambda buffer: reads.append(1) or read(buffer))

    def counted(buffer: Any, array: np.ndarray) -> None:
        written.append(array.nbytes)
        write(buffer, array)

    monkeypatch.setattr(backend, "write", counted)
    engine.tick()
    written.clear()
    finish(engine)
    assert len(reads) == 2, "only the results are read"
    ticks = len(evaluations(chosen[0])) - 1
    assert len(written) == (0 if shared else ticks), "one write a tick, of all that the host decides"
    assert max(written, default=0) <= 12 * ALIGNMENT


def test_ticks_tell_who_moved_and_how_far(toy_bundle: Bundle) -> None:
    engine = make_engine(toy_bundle, slots=2)
    euler, heun = (
        engine.admit(sample_of(settings_of("jit", steps=2, solver=each))) for each in (Solver.EULER, Solver.HEUN)
    )
    ticks = [engine.tick() for _ in range(3)]
    # Heun: predictor and corrector, then one Euler step to the end.
    assert [tick.moved for tick in ticks] == [{euler: 0.5}, {euler: 1.0, heun: 0.5}, {heun: 1.0}]
    assert [list(tick.finished) for tick in ticks] == [[], [euler], [heun]]
    np.testing.assert_array_equal(engine.read()[heun], ticks[2].finished[heun])
    np.testing.assert_array_equal(engine.read()[euler], ticks[1].finished[euler])


@pytest.mark.parametrize(("scale", "rows"), [(3.0, 2), (1.0, 1), (0.0, 2)])
def test_a_branch_of_no_weight_is_not_run(toy_bundle: Bundle, toy: Any, scale: float, rows: int) -> None:
    sample = sample_of(settings_of("jit", guidance_scale=scale))
    engine = make_engine(toy_bundle)
    engine.admit(sample)
    assert engine.used_rows == rows
    np.testing.assert_allclose(
        finish(engine)[0], reference_latents(toy_bundle, toy, sample), rtol=0, atol=tolerance(sample.settings.steps)
    )


@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("mode", ["jit", "sit"])
def test_guidance_has_rows_only_while_it_lasts(toy_bundle: Bundle, toy: Any, mode: str, solver: Solver) -> None:
    """The rows go to others meanwhile, but for those that a clip whose guidance is to come needs."""
    chosen = settings_of(mode, solver=solver, guidance_from=0.3, guidance_until=0.7)
    sample, most = sample_of(chosen, [0]), MODES[mode]
    engine = make_engine(toy_bundle, slots=2, rungs=(1, 2, 3, 6))
    slot, used, finished = engine.admit(sample), [], {}
    assert engine.reserved_rows == most
    while engine.running:
        used.append(engine.used_rows)
        finished |= engine.tick().finished
    assert used == [most if 0.3 <= each.timestep <= 0.7 else 1 for each in evaluations(chosen)]
    np.testing.assert_allclose(
        finished[slot], reference_latents(toy_bundle, toy, sample), rtol=0, atol=tolerance(sample.settings.steps)
    )


def test_slots_and_rows_are_counted(toy_bundle: Bundle) -> None:
    engine = make_engine(toy_bundle, slots=2, rungs=(2, 4))
    jit, sit = (sample_of(settings_of(mode)) for mode in ("jit", "sit"))
    assert engine.fits(sit)
    first = engine.admit(jit)
    assert not engine.fits(sit)
    assert engine.fits(jit)
    engine.admit(jit)
    assert not engine.fits(sample_of(settings_of("none")))
    engine.evict(first)
    assert engine.fits(jit)
    assert (engine.used_rows, engine.running) == (2, [1])


@pytest.fixture
def exploding(bundle_of: Callable[..., Path]) -> Bundle:
    """A model whose latents overflow fp32 after a few steps: its velocity is 1e12 times its input."""
    return Bundle.open(bundle_of(1e6))


def test_result_that_is_not_finite(exploding: Bundle) -> None:
    with pytest.raises(StivError, match="latents are not finite") as caught:
        run(make_engine(exploding), sample_of(settings_of("none")))
    assert "\n" not in str(caught.value)


def test_debug_names_the_step(exploding: Bundle) -> None:
    with pytest.raises(StivError, match=r"not finite after step 4 of 5 \(t = 0.6"):  # (0.2 * 1e12)^4 > 3.4e38
        run(make_engine(exploding, debug=True), sample_of(settings_of("none")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"image_scale": math.inf}, "image_guidance_scale must be finite"),
        ({"time_shift": 0.0}, "time_shift must be positive and finite"),
        ({"guidance_from": 0.6, "guidance_until": 0.5}, "guidance runs from time 0.6 until 0.5; give 0 .noise. <="),
        ({"guidance_until": math.nan}, "guidance runs from time 0 until nan"),
    ],
)
def test_settings_are_checked_when_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings_of("jit", **changes)


def test_an_idle_call_changes_nobody(toy_bundle: Bundle) -> None:
    engine, sample = make_engine(toy_bundle, slots=2, rungs=(2, 6)), sample_of(settings_of())
    before = run(engine, sample)
    for rung in engine.rungs:
        engine.idle(rung)
    np.testing.assert_array_equal(run(engine, sample), before)
