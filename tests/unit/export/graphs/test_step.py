"""The step graph against the reference's own functions and its sampler."""

import math
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.export.graphs.modules import StepGraph
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.config import model_config
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


def each(value: float, dtype: torch.dtype = torch.float64, batch: int = 2) -> Tensor:
    """The same number for every sample."""
    return torch.full((batch,), value, dtype=dtype)


def solver(first: float, second: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[first, second]] * 2, dtype=dtype)


class Rows(NamedTuple):
    """Which rows are whose, as the graph takes it: branch-major, as if all samples had the same guidance."""

    sample_rows: Tensor
    row_weights: Tensor
    row_sample: Tensor
    row_mask: Tensor


def rows_of(mask: Tensor, sees: list[bool], branch_weights: Tensor) -> Rows:
    batch, count = len(mask), len(sees)
    index = torch.arange(count * batch).reshape(count, batch).T
    nothing = torch.zeros(batch, 3 - count)
    return Rows(
        torch.cat([index, nothing.long()], dim=1),
        torch.cat([branch_weights.expand(batch, -1), nothing.to(branch_weights.dtype)], dim=1),
        torch.arange(batch).repeat(count),
        torch.cat([mask if seen else torch.zeros_like(mask) for seen in sees]),
    )


GO_ON = torch.zeros(2, dtype=torch.bool)


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
    found = STEP(
        t["velocity"].flatten(0, 1), t["latents"], t["clean"], t["noise"], mask,
        *rows_of(mask, sees, weights(mode, scale, image_scale)),
        t["previous"], solver(1, 0), each(dt), each(following), each(renorm), GO_ON,
    )  # fmt: skip

    v = guide(mode, t["velocity"], scale, image_scale)
    v = cfg_renorm(v, t["velocity"][0], mask) if renorm else v
    latents = replace_frames(t["latents"] + dt * v, t["clean"], mask)
    hidden = noise_frames(latents, t["clean"], t["noise"], torch.full((2,), following, dtype=torch.float64), mask)
    model_input = torch.cat([latents if seen else hidden for seen in sees])
    size = max(1.0, abs(scale), abs(image_scale)) * 20
    for value, wanted in zip(found, (latents, v, model_input), strict=True):
        torch.testing.assert_close(value, wanted, rtol=EXACT, atol=EXACT * size)


@pytest.mark.parametrize("mode", GuidanceMode)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_given_frames_are_bit_equal(mode: GuidanceMode, dtype: torch.dtype) -> None:
    sees = SEES[mode]
    t = tensors(1, len(sees), dtype)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    latents, _, model_input = STEP(
        t["velocity"].flatten(0, 1), t["latents"], t["clean"], t["noise"], mask,
        *rows_of(mask, sees, weights(mode, 7.5, 1.5).to(dtype)),
        t["previous"], solver(1, 0, dtype), each(0.1, dtype), each(0.3, dtype), each(1, dtype), GO_ON,
    )  # fmt: skip
    assert torch.equal(latents[mask], t["clean"][mask])
    for seen, branch in zip(sees, model_input.unflatten(0, (-1, 2)), strict=True):
        assert torch.equal(branch[~mask], latents[~mask])
        assert torch.equal(branch[mask], t["clean"][mask]) == seen


def test_uninitialized_buffers() -> None:
    """Velocities of no weight may hold anything, and so may the latents that a sample at rest does not hold."""
    t = tensors(2, 2, torch.float32)
    mask = torch.tensor([[True, False, False]] * 2)
    rows = rows_of(mask, [True], torch.ones(1))
    anything = torch.full(SHAPE, math.nan)
    latents, guided, model_input = STEP(
        torch.cat([t["velocity"][0], anything]), t["latents"], t["clean"], t["noise"], mask, *rows, anything,
        solver(1, 0, torch.float32), each(0, torch.float32), each(0, torch.float32), each(0, torch.float32), GO_ON,
    )  # fmt: skip
    assert torch.equal(guided, t["velocity"][0])
    assert torch.equal(latents, replace_frames(t["latents"], t["clean"], mask))
    assert torch.equal(model_input, latents)


def test_all_frames_given_stay_finite() -> None:
    t = tensors(3, 2, torch.float32)
    mask = torch.ones(2, 3, dtype=torch.bool)
    outputs = STEP(
        t["velocity"].flatten(0, 1), t["latents"], t["clean"], t["noise"], mask,
        *rows_of(mask, [True, False], torch.tensor([4.0, -3.0])), t["previous"],
        solver(1, 0, torch.float32), each(0.1, torch.float32), each(0.2, torch.float32), each(1, torch.float32), GO_ON,
    )  # fmt: skip
    assert all(bool(output.isfinite().all()) for output in outputs)
    assert torch.equal(outputs[0], t["clean"])


def test_norms_of_a_large_clip_are_right_in_onnx_runtime(micro: Checkpoint, tmp_path: Path) -> None:
    """Sums of half a million squares: rounding of some units, and not of their square root times as much."""
    GraphWriter(micro, tmp_path, "float32").write("step")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    shape = (1, 20, micro.config.model.latent_channels, 80, 80)
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(each, generator=generator) for each in ((2, *shape[1:]), *[shape] * 4)]
    velocity, latents, clean, noise, previous = wide
    mask = torch.zeros(shape[:2], dtype=torch.bool)
    rows = rows_of(mask, [True, False], torch.tensor([4.0, -3.0]))
    one = torch.ones(1)
    inputs = (
        *(velocity, latents, clean, noise, mask), *rows, previous, torch.tensor([[1.0, 0.0]]),
        *(0.1 * one, 0.2 * one, one, torch.zeros(1, dtype=torch.bool)),
    )  # fmt: skip
    names = [each.name for each in session.get_inputs()]
    found = session.run(["guided_velocity"], {name: each.numpy() for name, each in zip(names, inputs, strict=True)})[0]
    exact = STEP(*(each.double() if each.is_floating_point() else each for each in inputs))[1]
    error = torch.linalg.vector_norm(torch.from_numpy(found) - exact) / torch.linalg.vector_norm(exact)
    assert error < 8 * 2**-24


def test_hold_keeps_the_latents_and_moves_the_next_input() -> None:
    t = tensors(6, 1)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    rows = rows_of(mask, [True], torch.ones(1, dtype=torch.float64))

    def step(hold: list[bool]) -> tuple[Tensor, ...]:
        return STEP(
            t["velocity"][0], t["latents"], t["clean"], t["noise"], mask, *rows, t["previous"], solver(1, 0),
            each(0.3), each(0.5), each(0), torch.tensor(hold),
        )  # fmt: skip

    moved, held = step([False, False]), step([True, False])
    assert torch.equal(held[0][0], t["latents"][0])
    assert torch.equal(held[0][1], moved[0][1])
    for free, kept in zip(moved[1:], held[1:], strict=True):
        assert torch.equal(free, kept)


class Alone(NamedTuple):
    """A sample of a mixed call: its guidance, and the rest of what is its own."""

    mode: GuidanceMode
    scale: float
    renorm: bool
    mask: list[bool]
    solver: tuple[float, float]
    dt: float
    following: float
    hold: bool


alone = st.builds(
    Alone,
    st.sampled_from(GuidanceMode),
    scales,
    st.booleans(),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.sampled_from([(1.0, 0.0), (0.5, 0.5), (1.5, -0.5)]),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
)


def mixed(chosen: list[Alone], order: list[int], t: dict[str, Tensor], velocity: Tensor) -> tuple[Tensor, ...]:
    """One call for all of ``chosen``, whose rows lie in ``velocity`` as ``order`` says."""
    sees = [seen for one in chosen for seen in SEES[one.mode]]
    owner = [index for index, one in enumerate(chosen) for _ in SEES[one.mode]]
    masks = torch.tensor([one.mask for one in chosen])
    place = {number: row for row, number in enumerate(order)}
    sample_rows, row_weights = torch.zeros(len(chosen), 3, dtype=torch.int64), torch.zeros(len(chosen), 3).double()
    for index, (mode, scale, *_) in enumerate(chosen):
        own = [place[number] for number, who in enumerate(owner) if who == index]
        sample_rows[index, : len(own)] = torch.tensor(own)
        row_weights[index, : len(own)] = weights(mode, scale, 1.5)
    row_mask = torch.stack([masks[owner[number]] & sees[number] for number in order])
    batch = {name: t[name][: len(chosen)] for name in ("latents", "clean", "noise", "previous")}
    numbers = [[one.dt, one.following, one.renorm] for one in chosen]
    return STEP(
        velocity[order], batch["latents"], batch["clean"], batch["noise"], masks, sample_rows, row_weights,
        torch.tensor([owner[number] for number in order]), row_mask, batch["previous"],
        torch.tensor([one.solver for one in chosen], dtype=torch.float64),
        *torch.tensor(numbers, dtype=torch.float64).unbind(1), torch.tensor([one.hold for one in chosen]),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(chosen=st.tuples(alone, alone), seed=st.integers(0, 2**31), data=st.data())
def test_samples_in_one_call_are_as_alone(chosen: tuple[Alone, Alone], seed: int, data: st.DataObject) -> None:
    """Bit-equal, in any order of rows; and what is not a number in one stays in that one."""
    counts = [len(SEES[one.mode]) for one in chosen]
    t = tensors(seed, 3)
    velocity = t["velocity"].flatten(0, 1)[: sum(counts)]
    order = data.draw(st.permutations(range(sum(counts))))
    together = mixed(list(chosen), order, t, velocity)
    ill = velocity.clone()
    ill[: counts[0]] = math.nan
    beside_nan = mixed(list(chosen), order, t, ill)
    for index, rows in enumerate((range(counts[0]), range(counts[0], sum(counts)))):
        own = {name: value[index:] for name, value in t.items() if name != "velocity"}
        by_itself = mixed([chosen[index]], list(range(len(rows))), own, velocity[rows.start : rows.stop])
        for number in (0, 1):
            assert torch.equal(together[number][index], by_itself[number][0])
        places = [order.index(row) for row in rows]
        assert torch.equal(together[2][places], by_itself[2])
        if index == 1:
            assert torch.equal(beside_nan[0][1], by_itself[0][0])
            assert torch.equal(beside_nan[2][places], by_itself[2])


class ToyModel:
    """An analytic velocity field behind the reference model's call: smooth, nonlinear, different in every branch."""

    config = model_config("tiny")

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
    rows = rows_of(mask, sees, weights(chosen.guidance_mode, chosen.guidance_scale, chosen.image_scale))
    pooled = torch.cat([text.pooled, null.pooled, null.pooled][: len(sees)])
    renorm = each(float(chosen.renorm and chosen.guidance_mode is not GuidanceMode.NONE))

    def velocity(x: Tensor, time: float) -> Tensor:
        return ToyModel()(x, x.new_full((len(x),), time), micro, pooled, pooled, pooled, TextKV(pooled, pooled))

    def step(v: Tensor, base: Tensor, previous: Tensor, w: tuple, dt: float, t: float, hold: bool = False) -> tuple:
        state = (v, base, clean, noise, mask, *rows, previous, solver(*w), each(dt), each(t), renorm)
        return STEP(*state, torch.full((2,), hold))

    latents, previous = replace_frames(noise, clean, mask), torch.full_like(noise, math.nan)
    model_input = torch.cat([latents if seen else noise for seen in sees])
    times, last = schedule(chosen.steps, chosen.time_shift).tolist(), math.inf
    for time, following in zip(times, times[1:], strict=False):
        dt, heun = following - time, chosen.solver is Solver.HEUN and following < 1
        v, w = velocity(model_input, time), (1 + dt / last / 2, -dt / last / 2)
        latents, previous, model_input = step(v, latents, previous, w, dt, following, heun)
        last = dt if chosen.solver is Solver.AB2 else math.inf
        if heun:
            v = velocity(model_input, following)
            latents, previous, model_input = step(v, latents, previous, (0.5, 0.5), dt, following)
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
