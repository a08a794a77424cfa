import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stiv_deploy.runtime.backends.base import Call
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.errors import Cancelled, RequestError, StivError
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.conditioning import frame_mask
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.guidance import BRANCHES, GuidanceMode
from stiv_deploy.runtime.sampling.sampler import Sampler, SamplingSettings, Solver, StepRecord
from stiv_deploy.stiv_ref import sampler as reference
from stiv_deploy.stiv_ref.guidance import GuidanceMode as ReferenceMode
from stiv_deploy.stiv_ref.text import TextStates

EPS = float(np.finfo(np.float32).eps)
BATCH, FRAMES, SIZE = 2, 3, 4
LATENTS = (BATCH, FRAMES, 4, SIZE, SIZE)
IDS = np.array([[3, 4, 2, 0, 0], [5, 2, 0, 0, 0]])
NULL_IDS = np.array([[2, 0, 0, 0, 0]] * 2)
MICRO = np.tile(np.array([8, 8, 0, 0, 1, 3], dtype=np.float32), (BATCH, 1))

Settings = Callable[..., SamplingSettings]


def drawn(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(LATENTS, dtype=np.float32)


def make_sampler(toy_bundle: Bundle, mode: GuidanceMode, *, conditions: bool = True, **options: Any) -> Sampler:
    """A sampler whose branches have the test's text, or no text and no size if ``conditions`` is false."""
    dims = dimensions(
        toy_bundle.manifest.model,
        batch=BATCH,
        branches=len(BRANCHES[mode]),
        video_frames=FRAMES,
        height=2 * SIZE,
        width=2 * SIZE,
        text_tokens=5,
    )
    sampler = Sampler(Denoiser(OnnxRuntimeBackend(toy_bundle), toy_bundle.manifest, dims, **options))
    ids = np.concatenate([IDS if branch.text else NULL_IDS for branch in BRANCHES[mode]]) * conditions
    sampler.denoiser.set_text(ids, (ids > 0).astype(np.int64))
    sampler.denoiser.set_micro(np.tile(MICRO, (len(BRANCHES[mode]), 1)) * np.float32(conditions))
    return sampler


def settings_of(mode: str = "jit", **changes: Any) -> SamplingSettings:
    base = SamplingSettings(steps=5, guidance_mode=GuidanceMode(mode), guidance_scale=3.0, image_scale=1.5)
    return dataclasses.replace(base, **changes)


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


def reference_latents(toy_bundle: Bundle, toy: Any, mask: np.ndarray, settings: SamplingSettings) -> np.ndarray:
    model = ToyModel(toy_bundle, toy)
    inputs = reference.SamplingInputs(
        noise=torch.from_numpy(drawn(0)),
        clean=torch.from_numpy(drawn(1)),
        frame_mask=torch.from_numpy(mask),
        text=model.text(IDS),
        null_text=model.text(NULL_IDS),
        micro=torch.from_numpy(MICRO),
    )
    values = dataclasses.asdict(settings)
    values |= {"guidance_mode": ReferenceMode(values["guidance_mode"]), "solver": reference.Solver(values["solver"])}
    return reference.sample(model, inputs, reference.SamplingSettings(**values)).numpy()  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [[], [0], [0, 2]], ids=["t2v", "first", "ends"])
@pytest.mark.parametrize("mode", list(GuidanceMode))
@pytest.mark.parametrize("solver", list(Solver))
@pytest.mark.parametrize("renorm", [False, True])
def test_loop_is_the_reference_loop(
    toy_bundle: Bundle, toy: Any, given: list[int], mode: GuidanceMode, solver: Solver, renorm: bool
) -> None:
    settings = settings_of(mode, solver=solver, renorm=renorm, time_shift=2.0)
    mask = frame_mask(BATCH, FRAMES, given)
    sampler = make_sampler(toy_bundle, mode)
    wanted = reference_latents(toy_bundle, toy, mask, settings)
    # Every evaluation does about 60 fp32 operations on values below ~30 (velocities times guidance weights of at most
    # 3); errors are carried on by a slope below 1, so that they add up over at most 10 evaluations.
    tolerance = 10 * 60 * 30 * EPS
    for _ in range(2):  # a second run on the same buffers is the same run
        latents = sampler.run(drawn(0), drawn(1), mask, settings)
        np.testing.assert_array_equal(latents[:, given], drawn(1)[:, given])
        np.testing.assert_allclose(latents, wanted, rtol=0, atol=tolerance)


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
    sampler = make_sampler(toy_bundle, GuidanceMode.NONE, conditions=False)
    settings = settings_of("none", solver=solver, steps=steps)
    latents = sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings)
    return float(np.abs(latents - analytic(toy_bundle, slope, drawn(0).astype(np.float64))).max())


def test_heun_is_exact_where_velocity_is_linear_in_time_but_for_its_last_step(bundle_of: Callable[..., Path]) -> None:
    toy_bundle = exponential(bundle_of, 0.0)
    q, steps = terms_in_time(toy_bundle, 0.0)[1], 8
    # The last step is Euler, which misses q/2 of the squared step.
    assert error(toy_bundle, 0.0, Solver.HEUN, steps) == pytest.approx(q / (2 * steps**2), rel=1e-3)
    assert error(toy_bundle, 0.0, Solver.EULER, steps) == pytest.approx(q / (2 * steps), rel=1e-4)


def test_orders_of_convergence(bundle_of: Callable[..., Path]) -> None:
    toy_bundle = exponential(bundle_of, 1.0)
    for solver, order in ((Solver.EULER, 1), (Solver.HEUN, 2)):
        coarse, fine = (error(toy_bundle, 1.0, solver, steps) for steps in (16, 32))
        # Halving the step divides the error by 2^order, up to a term of the next order in the step (1/16).
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_hidden_branch_gets_noised_frames_and_the_others_clean_ones(toy_bundle: Bundle) -> None:
    seen: list[np.ndarray] = []

    def hook(graph: str, call: Call) -> Call:
        def observed() -> None:
            if graph == "embed":
                seen.append(sampler.denoiser.backend.read(sampler.denoiser.model_input))
            call()

        return observed

    sampler = make_sampler(toy_bundle, GuidanceMode.SIT, hook=hook)
    settings = settings_of("sit", steps=4)
    sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES, [0]), settings)
    noise, clean = drawn(0)[:, 0], drawn(1)[:, 0]
    assert len(seen) == 4
    for step, model_input in enumerate(seen):
        branches = model_input.reshape(3, *LATENTS)
        time = np.float32(step / 4)
        np.testing.assert_array_equal(branches[0][:, 0], clean)
        np.testing.assert_array_equal(branches[1][:, 0], clean)
        np.testing.assert_array_equal(branches[2][:, 0], time * clean + (1 - time) * noise)
        np.testing.assert_array_equal(branches[0][:, 1:], branches[2][:, 1:])


def test_nothing_is_allocated_bound_or_read_inside_the_loop(
    toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = make_sampler(toy_bundle, GuidanceMode.JIT)
    settings = settings_of("jit", solver=Solver.HEUN)
    sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings)
    written: list[int] = []
    write, reads = sampler.denoiser.backend.write, []
    read = sampler.denoiser.backend.read
    forbidden = lambda *_: pytest.fail("allocated or bound in the loop")  # noqa: E731
    monkeypatch.setattr(sampler.denoiser.backend, "empty", forbidden)
    monkeypatch.setattr(sampler.denoiser.backend, "bind", forbidden)
    monkeypatch.setattr(sampler.denoiser.backend, "read", lambda buffer: reads.append(1) or read(buffer))

    def counted(buffer: Any, array: np.ndarray) -> None:
        written.append(array.nbytes)
        write(buffer, array)

    monkeypatch.setattr(sampler.denoiser.backend, "write", counted)
    records: list[StepRecord] = []
    sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings, records.append)
    assert len(reads) == 1, "only the result is read"
    per_step = written[10:]  # after the request's own tensors and first scalars
    assert max(per_step) <= 4 * 2 * BATCH, "a step writes scalars and timesteps only"


def test_observer_sees_each_step_and_may_read_latents(toy_bundle: Bundle) -> None:
    sampler = make_sampler(toy_bundle, GuidanceMode.JIT)
    settings = settings_of("jit", steps=4)
    steps: list[tuple[int, int, float]] = []
    latents: list[np.ndarray] = []

    def observer(record: StepRecord) -> None:
        steps.append((record.step, record.total, record.time))
        latents.append(record.read_latents())

    result = sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings, observer)
    assert steps == [(0, 4, 0.25), (1, 4, 0.5), (2, 4, 0.75), (3, 4, 1.0)]
    np.testing.assert_array_equal(latents[-1], result)
    assert not np.array_equal(latents[0], latents[1])


def test_cancel_stops_between_steps_and_leaves_the_sampler_usable(toy_bundle: Bundle) -> None:
    sampler = make_sampler(toy_bundle, GuidanceMode.JIT)
    mask, settings = frame_mask(BATCH, FRAMES), settings_of("jit")
    wanted = sampler.run(drawn(0), drawn(1), mask, settings)
    cancel, steps = threading.Event(), []

    def observer(record: StepRecord) -> None:
        steps.append(record.step)
        if record.step == 2:
            cancel.set()

    with pytest.raises(Cancelled, match="cancelled after 3 of 5 steps") as caught:
        sampler.run(drawn(0), drawn(1), mask, settings, observer, cancel)
    assert caught.value.exit_code == 130
    assert steps == [0, 1, 2]
    np.testing.assert_array_equal(sampler.run(drawn(0), drawn(1), mask, settings), wanted)


def test_observer_may_stop_by_raising(toy_bundle: Bundle) -> None:
    def stop(_: StepRecord) -> None:
        raise Cancelled("enough")

    sampler = make_sampler(toy_bundle, GuidanceMode.NONE)
    with pytest.raises(Cancelled, match="enough"):
        sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings_of("none"), stop)


@pytest.fixture
def exploding(bundle_of: Callable[..., Path]) -> Bundle:
    """A model whose latents overflow fp32 after a few steps: its velocity is 1e12 times its input."""
    return Bundle.open(bundle_of(1e6))


def test_result_that_is_not_finite(exploding: Bundle) -> None:
    sampler = make_sampler(exploding, GuidanceMode.NONE)
    with pytest.raises(StivError, match="latents are not finite") as caught:
        sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings_of("none"))
    assert "\n" not in str(caught.value)


def test_debug_names_the_step(exploding: Bundle) -> None:
    sampler = make_sampler(exploding, GuidanceMode.NONE)
    sampler.debug = True
    with pytest.raises(StivError, match=r"not finite after step 4 of 5"):  # (0.2 * 1e12)^4 > 3.4e38
        sampler.run(drawn(0), drawn(1), frame_mask(BATCH, FRAMES), settings_of("none"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"steps": 2.5}, "num_inference_steps must be a whole number"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
        ({"image_scale": math.inf}, "image_guidance_scale must be finite"),
        ({"time_shift": 0.0}, "time_shift must be positive and finite"),
    ],
)
def test_settings_are_checked_when_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        settings_of("jit", **changes)
