"""The step graph against the reference's own functions and its sampler."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.export.graphs.modules import StepGraph
from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.guidance import GuidanceMode, cfg_renorm, jit_cfg, sit_cfg
from stiv_deploy.stiv_ref.model import TextKV
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, sample
from stiv_deploy.stiv_ref.text import TextStates

STEP = StepGraph()
SHAPE = (2, 3, 4, 2, 5)  # (B, T, C, h, w)
SEES = {GuidanceMode.NONE: [True], GuidanceMode.JIT: [True, False], GuidanceMode.SIT: [True, True, False]}
EXACT = 1e-12  # fp64: a few roundings of 1e-16 and a sum of 120


def weights(mode: GuidanceMode, scale: float, image_scale: float) -> Tensor:
    rules = {
        GuidanceMode.NONE: [1.0],
        GuidanceMode.JIT: [scale, 1 - scale],
        GuidanceMode.SIT: [scale, image_scale - scale, 1 - image_scale],
    }
    return torch.tensor(rules[mode], dtype=torch.float64)


def guide(mode: GuidanceMode, velocity: Tensor, scale: float, image_scale: float) -> Tensor:
    match mode:
        case GuidanceMode.NONE:
            return velocity[0]
        case GuidanceMode.JIT:
            return jit_cfg(*velocity, scale)
        case GuidanceMode.SIT:
            return sit_cfg(*velocity, scale, image_scale)


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([value], dtype=dtype)


def tensors(seed: int, branches: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = {"velocity": (branches, *SHAPE), "latents": SHAPE, "clean": SHAPE, "noise": SHAPE, "previous": SHAPE}
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in names.items()}


masks = st.lists(st.booleans(), min_size=6, max_size=6).map(lambda bits: torch.tensor(bits).reshape(2, 3))
scales = st.floats(-2, 12)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    mode=st.sampled_from(GuidanceMode),
    mask=masks,
    scale=scales,
    image_scale=scales,
    renorm=st.booleans(),
    dt=st.floats(0, 1),
    following=st.floats(0, 1),
)
def test_euler_step_is_the_references(
    seed: int,
    mode: GuidanceMode,
    mask: Tensor,
    scale: float,
    image_scale: float,
    renorm: bool,
    dt: float,
    following: float,
) -> None:
    sees = SEES[mode]
    t = tensors(seed, len(sees))
    branch_mask = torch.stack([mask if seen else torch.zeros_like(mask) for seen in sees])
    found = STEP(
        t["velocity"], t["latents"], t["clean"], t["noise"], mask, branch_mask, weights(mode, scale, image_scale),
        t["previous"], torch.tensor([1.0, 0.0], dtype=torch.float64), scalar(dt), scalar(following), scalar(renorm),
    )  # fmt: skip

    v = guide(mode, t["velocity"], scale, image_scale)
    v = cfg_renorm(v, t["velocity"][0], mask) if renorm else v
    latents = replace_frames(t["latents"] + dt * v, t["clean"], mask)
    hidden = noise_frames(latents, t["clean"], t["noise"], torch.full((2,), following, dtype=torch.float64), mask)
    model_input = torch.stack([latents if seen else hidden for seen in sees])
    size = max(1.0, abs(scale), abs(image_scale)) * 20
    for value, wanted in zip(found, (latents, v, model_input), strict=True):
        torch.testing.assert_close(value, wanted, rtol=EXACT, atol=EXACT * size)


@pytest.mark.parametrize("mode", GuidanceMode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_frames_are_bit_equal(mode: GuidanceMode, dtype: torch.dtype) -> None:
    sees = SEES[mode]
    t = tensors(1, len(sees), dtype)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    branch_mask = torch.stack([mask if seen else torch.zeros_like(mask) for seen in sees])
    latents, _, model_input = STEP(
        t["velocity"], t["latents"], t["clean"], t["noise"], mask, branch_mask, weights(mode, 7.5, 1.5).to(dtype),
        t["previous"], torch.tensor([1.0, 0.0], dtype=dtype), scalar(0.1, dtype), scalar(0.3, dtype), scalar(1, dtype),
    )  # fmt: skip
    assert torch.equal(latents[mask], t["clean"][mask])
    for seen, branch in zip(sees, model_input, strict=True):
        assert torch.equal(branch[~mask], latents[~mask])
        assert torch.equal(branch[mask], t["clean"][mask]) == seen


def test_first_model_input_and_uninitialized_buffers() -> None:
    """``dt`` 0 and velocity 0 give the first model input; the previous velocity may hold anything."""
    t = tensors(2, 2, torch.float32)
    mask = torch.tensor([[True, False, False]] * 2)
    latents, guided, model_input = STEP(
        torch.zeros(2, *SHAPE), t["noise"], t["clean"], t["noise"], mask, torch.stack([mask, torch.zeros_like(mask)]),
        torch.tensor([7.5, -6.5]), torch.full(SHAPE, math.nan), torch.tensor([1.0, 0.0]), torch.zeros(1),
        torch.zeros(1), torch.ones(1),
    )  # fmt: skip
    assert torch.equal(guided, torch.zeros(SHAPE))
    assert torch.equal(latents, replace_frames(t["noise"], t["clean"], mask))
    assert torch.equal(model_input[0], latents)
    assert torch.equal(model_input[1], t["noise"])


def test_all_frames_given_stay_finite() -> None:
    t = tensors(3, 2, torch.float32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    outputs = STEP(
        t["velocity"], t["latents"], t["clean"], t["noise"], mask, torch.stack([mask, ~mask]),
        torch.tensor([4.0, -3.0]), t["previous"], torch.tensor([1.0, 0.0]), scalar(0.1, torch.float32),
        scalar(0.2, torch.float32), torch.ones(1),
    )  # fmt: skip
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert torch.equal(outputs[0], t["clean"])


class ToyModel:
    """An analytic velocity field behind the reference model's call: smooth, nonlinear, different in every branch."""

    def text_kv(self, states: Tensor) -> TextKV:
        return TextKV(states, states)

    def __call__(
        self, x: Tensor, timestep: Tensor, micro: Tensor, states: Tensor, mask: Tensor, pooled: Tensor, text_kv: TextKV
    ) -> Tensor:
        t, p = (value[:, None, None, None, None] for value in (timestep, pooled.mean(1)))
        return torch.sin(2 * x + p) + t * x.roll(1, dims=1) - p


def run_step_graph(inputs: SamplingInputs, chosen: SamplingSettings) -> Tensor:
    """The runtime's loop, as the contract describes it, over :class:`StepGraph` and the toy model."""
    sees = SEES[chosen.guidance_mode]
    noise, clean, mask, text, null, micro = inputs
    branch_mask = torch.stack([mask if seen else torch.zeros_like(mask) for seen in sees])
    pooled = torch.cat([text.pooled, null.pooled, null.pooled][: len(sees)])
    w = weights(chosen.guidance_mode, chosen.guidance_scale, chosen.image_scale)
    renorm = scalar(float(chosen.renorm and chosen.guidance_mode is not GuidanceMode.NONE))

    def velocity(model_input: Tensor, time: float) -> Tensor:
        flat = model_input.flatten(0, 1)
        v = ToyModel()(flat, flat.new_full((len(flat),), time), micro, pooled, pooled, pooled, TextKV(pooled, pooled))
        return v.unflatten(0, model_input.shape[:2])

    def step(v: Tensor, base: Tensor, previous: Tensor, solver: list[float], dt: float, t: float) -> tuple[Tensor, ...]:
        solver_weights = torch.tensor(solver, dtype=torch.float64)
        return STEP(
            v, base, clean, noise, mask, branch_mask, w, previous, solver_weights, scalar(dt), scalar(t), renorm
        )

    anything = torch.full_like(noise, math.nan)
    first = torch.zeros(len(sees), *noise.shape, dtype=torch.float64)
    latents, _, model_input = step(first, noise, anything, [1, 0], 0, 0)
    times = schedule(chosen.steps, chosen.time_shift).tolist()
    for time, following in zip(times, times[1:], strict=False):
        base, dt = latents, following - time
        latents, guided, model_input = step(velocity(model_input, time), base, anything, [1, 0], dt, following)
        if chosen.solver is Solver.HEUN and following < 1:
            v = velocity(model_input, following)
            latents, _, model_input = step(v, base, guided, [0.5, 0.5], dt, following)
    return latents


@pytest.mark.parametrize("mode", GuidanceMode)
@pytest.mark.parametrize("solver", Solver)
@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("mask", [[0, 0, 0], [1, 0, 0], [1, 0, 1]])
def test_a_whole_run_is_the_reference_samplers(
    mode: GuidanceMode, solver: Solver, renorm: bool, mask: list[int]
) -> None:
    t = tensors(4, 1)
    generator = torch.Generator().manual_seed(5)
    text, null = (
        TextStates(torch.zeros(2, 1, 1), torch.ones(2, 1), torch.randn(2, 3, generator=generator, dtype=torch.float64))
        for _ in range(2)
    )
    given = torch.tensor([mask, [0, 0, 0]], dtype=torch.bool)
    inputs = SamplingInputs(t["noise"], t["clean"], given, text, null, torch.zeros(2, 6))
    chosen = SamplingSettings(
        steps=6, guidance_mode=mode, guidance_scale=3.0, image_scale=1.5, renorm=renorm, solver=solver, time_shift=2.0
    )
    wanted = sample(ToyModel(), inputs, chosen)  # type: ignore[arg-type]
    found = run_step_graph(inputs, chosen)
    # Each of 11 evaluations multiplies an error by at most 1 + dt * Lipschitz (some 20 here, with guidance).
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)
    assert torch.equal(found[given], t["clean"][given])
