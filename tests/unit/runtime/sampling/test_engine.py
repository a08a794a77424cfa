"""The engine's loop against the reference's, one clip and many: who runs beside a clip must not be seen in it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.backends.base import Backend, Call
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, dimensions
from stiv_deploy.runtime.errors import RequestError, StivError
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.conditioning import frame_mask
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.host_tables import ALIGNMENT
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.solvers import evaluations
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens
from stiv_deploy.stiv_ref import sampler as reference
from stiv_deploy.stiv_ref.guidance import GuidanceMode as ReferenceMode
from stiv_deploy.stiv_ref.guidance import Unseen as ReferenceUnseen
from stiv_deploy.stiv_ref.text import TextStates

EPS = float(np.finfo(np.float32).eps)
FRAMES, SIZE = 3, 4
LATENTS = (FRAMES, 4, SIZE, SIZE)
IDS = np.array([3, 4, 2, 0, 0])
OTHER_IDS = np.array([5, 2, 0, 0, 0])
NULL_IDS = np.array([2, 0, 0, 0, 0])
MICRO = np.array([8, 8, 0, 0, 1, 3], dtype=np.float32)


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENTS, dtype=np.float32)


def tokens(ids: np.ndarray) -> Tokens:
    return Tokens(ids, (ids > 0).astype(np.int64))


def make_engine(bundle: Bundle, slots: int = 1, rungs: tuple[int, ...] = (), **options: Any) -> StepEngine:
    manifest, backend = bundle.manifest, options.pop("backend", None) or OnnxRuntimeBackend(bundle, threads=1)
    rows = rungs[-1] if rungs else SAMPLE_ROWS * slots
    dims = dimensions(
        manifest.model,
        batch=slots,
        model_batch=rows,
        video_frames=FRAMES,
        height=2 * SIZE,
        width=2 * SIZE,
        text_tokens=5,
    )
    return StepEngine(backend, manifest, dims, TextStage(backend, manifest), rungs=rungs, **options)


def settings_of(mode: str = "jit", **changes: Any) -> SamplingSettings:
    base = SamplingSettings(steps=5, guidance_mode=GuidanceMode(mode), guidance_scale=3.0, image_scale=1.5)
    return dataclasses.replace(base, **changes)


def sample_of(chosen: SamplingSettings, frames: list[int] | None = None, seed: int = 0, **changes: Any) -> Sample:
    plain = Sample(
        noise=drawn(seed),
        clean=drawn(seed + 1),
        frame_mask=frame_mask(FRAMES, frames or []),
        micro=MICRO,
        text=tokens(IDS),
        negative=tokens(NULL_IDS),
        settings=chosen,
    )
    return dataclasses.replace(plain, **changes)


def finish(engine: StepEngine) -> dict[int, np.ndarray]:
    """Run what is in the engine to its end: latents by slot; raises what failed."""
    finished: dict[int, np.ndarray] = {}
    while engine.running:
        tick = engine.tick()
        finished |= tick.finished
        for error in tick.failed.values():
            raise error
    return finished


def run(engine: StepEngine, sample: Sample) -> np.ndarray:
    slot = engine.admit(sample)
    return finish(engine)[slot]


class ToyModel:
    """The toy velocity behind the call of ``stiv_ref.model.Stiv``, for the reference sampler."""

    def __init__(self, toy_bundle: Bundle, toy: Any) -> None:
        self.toy = toy
        dims = {"latent_height": SIZE, "latent_width": SIZE, "token_frames": FRAMES}
        tables = rope.rope_tables(toy_bundle.manifest.model, dims)
        space = tables["spatial_cos"].sum(1) + tables["spatial_sin"].sum(1)
        self.place = (tables["temporal_cos"].sum(1) + tables["temporal_sin"].sum(1))[:, None] + space

    def text(self, ids: np.ndarray) -> TextStates:
        mask = (ids > 0).astype(np.int64)
        states, pooled = self.toy.text(ids, mask)
        return TextStates(torch.from_numpy(states), torch.from_numpy(mask), torch.from_numpy(pooled))

    def text_kv(self, _states: torch.Tensor) -> None:
        return None

    def __call__(
        self, model_input: torch.Tensor, timestep: torch.Tensor, micro: torch.Tensor, *text: Any, **_: Any
    ) -> Any:
        states, mask, pooled = (part.numpy() for part in text)
        velocity = self.toy.velocity(
            model_input.numpy(), timestep.numpy(), micro.numpy(), states, mask, pooled, self.place
        )
        return torch.from_numpy(velocity)


def reference_latents(toy_bundle: Bundle, toy: Any, sample: Sample) -> np.ndarray:
    model = ToyModel(toy_bundle, toy)
    inputs = reference.SamplingInputs(
        noise=torch.from_numpy(sample.noise[None]),
        clean=torch.from_numpy(sample.clean[None]),
        frame_mask=torch.from_numpy(sample.frame_mask[None]),
        text=model.text(sample.text.ids[None]),
        null_text=model.text(sample.negative.ids[None]),
        micro=torch.from_numpy(sample.micro[None]),
    )
    values = dataclasses.asdict(sample.settings)
    values |= {"guidance_mode": ReferenceMode(values["guidance_mode"]), "solver": reference.Solver(values["solver"])}
    values |= {"unseen": ReferenceUnseen(values["unseen"])}
    return reference.sample(model, inputs, reference.SamplingSettings(**values)).numpy()[0]  # type: ignore[arg-type]


def tolerance(steps: int) -> float:
    """Every evaluation does about 60 fp32 operations on values below ~30 (velocities times guidance weights of at most
    3); errors are carried on by a slope below 1, so that they add up over at most two evaluations a step. AB2 takes
    them by weights that sum to 1 + r, times a step that is r times the last one: over a run less than 1 + r <= 4.5.
    """
    return 2 * steps * 60 * 30 * EPS


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


WORDS = [np.array([a, b, 2, 0, 0]) for a in (3, 4, 5) for b in (6, 7)]
MODES = {"none": 1, "jit": 2, "sit": 3}


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any clip; no two drawn seeds share their noise."""
    chosen = settings_of(
        draw(st.sampled_from(list(MODES))),
        steps=draw(st.integers(1, 5)),
        solver=draw(st.sampled_from(list(Solver))),
        guidance_scale=draw(st.sampled_from([0.0, 1.0, 3.0, 4.5])),
        image_scale=draw(st.sampled_from([1.0, 1.5])),
        renorm=draw(st.booleans()),
        time_shift=draw(st.sampled_from([1.0, 2.0, 3.5])),
        guidance_from=draw(st.sampled_from([0.0, 0.0, 0.2, 0.5])),
        guidance_until=draw(st.sampled_from([1.0, 1.0, 0.5, 0.7])),
    )
    frames = draw(st.sets(st.integers(0, FRAMES - 1)))
    text, negative = (tokens(draw(st.sampled_from(WORDS))) for _ in range(2))
    return sample_of(chosen, sorted(frames), draw(st.integers(0, 999)), text=text, negative=negative)


arrivals = st.lists(st.tuples(st.integers(0, 6), samples()), min_size=1, max_size=6)
SLOTS = 3


def scheduled(engine: StepEngine, arriving: list[tuple[int, Sample]]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Run all, each as soon after its tick as it fits; clips with their latents as they finish."""
    waiting, running, now = sorted(arriving, key=lambda each: each[0]), {}, 0
    while waiting or engine.running:
        while waiting and waiting[0][0] <= now and engine.fits(waiting[0][1]):
            sample = waiting.pop(0)[1]
            running[engine.admit(sample)] = sample
        if engine.running:
            tick = engine.tick()
            assert not tick.failed
            yield from ((running.pop(slot), latents) for slot, latents in tick.finished.items())
        now += 1


@pytest.fixture(scope="module")
def shared(bundle_path: Path) -> tuple[Bundle, dict[str, StepEngine]]:
    """Engines that are made once: one rung, a ladder of rungs, and one clip alone at the first one's rung."""
    bundle = Bundle.open(bundle_path)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    top = SLOTS * SAMPLE_ROWS
    ladder = {"one": (top,), "ladder": (1, 2, 4, top), "alone": (top,)}
    return bundle, {name: make_engine(bundle, SLOTS, rungs, backend=backend) for name, rungs in ladder.items()}


def check_schedule(shared: tuple[Bundle, dict[str, StepEngine]], toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    """A clip is bit-equal alone and among others at the same rung, and near the reference's whatever the rung."""
    bundle, engines = shared
    alone = {id(sample): run(engines["alone"], sample) for _, sample in arriving}
    for sample, latents in scheduled(engines["one"], arriving):
        np.testing.assert_array_equal(latents, alone[id(sample)])
        np.testing.assert_array_equal(latents[sample.frame_mask], sample.clean[sample.frame_mask])
    for sample, latents in scheduled(engines["ladder"], arriving):
        wanted = reference_latents(bundle, toy, sample)
        # 4.5 instead of 3 is the largest weight here, and shift or renormalization do not enlarge a velocity.
        np.testing.assert_allclose(latents, wanted, rtol=0, atol=1.5 * tolerance(5))


quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(quick, max_examples=200)


@quick
@given(arriving=arrivals)
def test_company_is_not_seen(shared: Any, toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    check_schedule(shared, toy, arriving)


@pytest.mark.slow
@thorough
@given(arriving=arrivals)
def test_company_is_not_seen_in_many_schedules(shared: Any, toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    check_schedule(shared, toy, arriving)


def test_a_clip_that_leaves_or_fails_is_not_seen_in_the_others(toy_bundle: Bundle) -> None:
    kept, other = sample_of(settings_of("jit"), seed=5), sample_of(settings_of("sit"), [0], seed=7)
    bad = dataclasses.replace(other, noise=np.full(LATENTS, np.nan, dtype=np.float32))
    wanted = run(make_engine(toy_bundle, slots=3), kept)
    engine = make_engine(toy_bundle, slots=3)
    failing, leaving, staying = engine.admit(bad), engine.admit(other), engine.admit(kept)
    first = engine.tick()
    engine.evict(leaving)
    ticks = [first]
    while engine.running:
        ticks.append(engine.tick())
    assert list(ticks[-1].failed) == [failing]
    np.testing.assert_array_equal(ticks[-1].finished[staying], wanted)


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


def test_an_idle_call_changes_nobody(toy_bundle: Bundle) -> None:
    engine, sample = make_engine(toy_bundle, slots=2, rungs=(2, 6)), sample_of(settings_of())
    before = run(engine, sample)
    for rung in engine.rungs:
        engine.idle(rung)
    np.testing.assert_array_equal(run(engine, sample), before)


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
