"""The sampling loop on fake models whose answers are known: solver order, frame replacement, what each branch sees."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.stiv_ref.config import Student
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.flow import schedule
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, sample
from stiv_deploy.stiv_ref.text import TextStates

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
FREE = SamplingSettings(steps=8, guidance_mode=GuidanceMode.NONE, renorm=False)


@dataclass
class FakeModel:
    """Calls ``velocity(latents, timestep [N, 1, 1, 1, 1], is_null bool [N])`` and remembers what it was given."""

    velocity: Velocity
    calls: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    text_calls: int = 0
    config: Any = field(default_factory=lambda: SimpleNamespace(student=None))
    scales: list[Tensor] = field(default_factory=list)

    def text_kv(self, states: Tensor) -> str:
        self.text_calls += 1
        return f"kv of {len(states)}"

    def __call__(
        self, latents: Tensor, timestep: Tensor, micro: Tensor, *text: Tensor, text_kv: str, **student: Tensor
    ) -> Tensor:
        states, mask, pooled = text
        self.scales += student.values()
        assert len(latents) == len(timestep) == len(micro) == len(states) == len(mask) == len(pooled)
        assert text_kv == f"kv of {len(latents)}"
        null = states[:, 0, 0] == 0
        self.calls.append((latents.clone(), timestep.clone(), null))
        return self.velocity(latents, timestep[:, None, None, None, None], null)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def request(batch: int = 2, frames: int = 3, mask: Tensor | None = None) -> SamplingInputs:
    """Noise, clean latents and texts: states of 1 for the prompt and of 0 for the empty one."""

    def text(value: float) -> TextStates:
        return TextStates(torch.full((batch, 4, 6), value), torch.ones(batch, 4), torch.full((batch, 6), value))

    shape = (batch, frames, 2, 3, 3)
    frame_mask = torch.zeros(batch, frames, dtype=torch.bool) if mask is None else mask
    return SamplingInputs(normal(*shape), normal(*shape, seed=1), frame_mask, text(1), text(0), torch.ones(batch, 6))


def run(velocity: Velocity, inputs: SamplingInputs, settings: SamplingSettings) -> Tensor:
    return sample(FakeModel(velocity), inputs, settings)  # type: ignore[arg-type]


def test_constant_velocity_is_exact_in_one_step() -> None:
    inputs = request()
    got = run(lambda x, t, null: torch.ones_like(x), inputs, SamplingSettings(steps=1, guidance_mode=GuidanceMode.NONE))
    torch.testing.assert_close(got, inputs.noise + 1)


def test_euler_of_3_t_squared() -> None:
    """dx/dt = 3 t^2 moves by 1; Euler's left sums with n steps give 1 - 3/(2n) + 1/(2n^2)."""
    inputs = request()
    for steps in (1, 4, 10):
        got = run(
            lambda x, t, null: 3 * t**2 + 0 * x, inputs, SamplingSettings(steps=steps, guidance_mode=GuidanceMode.NONE)
        )
        wanted = 1 - 1.5 / steps + 0.5 / steps**2
        torch.testing.assert_close(got - inputs.noise, torch.full_like(got, wanted))


def heun_last_step_euler(x: float, steps: int, f: Callable[[float, float], float]) -> float:
    """The documented scheme in plain Python: trapezoid with an Euler predictor, the last step plain Euler."""
    h = 1 / steps
    for step in range(steps):
        t = step * h
        first = f(x, t)
        slope = first if step == steps - 1 else 0.5 * (first + f(x + h * first, t + h))
        x += h * slope
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", list(Solver))
def test_order_of_the_solvers(solver: Solver, shift: float) -> None:
    """dx/dt = -x + 2t from x(0) = 1, exactly 2t - 2 + 3 e^-t. Errors fall as n^-1 (Euler) and n^-2 (Heun, AB2).

    Heun's final Euler step and AB2's first make one local error of order h^2, so the whole stays of second order.
    """
    inputs = request(1)._replace(noise=torch.ones(1, 3, 2, 3, 3, dtype=torch.float64))
    exact = 3 * math.exp(-1)
    errors = []
    for steps in (64, 128, 256):
        chosen = SamplingSettings(steps=steps, guidance_mode=GuidanceMode.NONE, solver=solver, time_shift=shift)
        errors.append(abs(run(lambda x, t, null: -x + 2 * t, inputs, chosen).flatten()[0].item() - exact))
    order = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert order == pytest.approx([1 if solver is Solver.EULER else 2] * 2, abs=0.15)


def test_heun_equals_its_definition() -> None:
    inputs = request(1)._replace(noise=torch.full((1, 3, 2, 3, 3), 0.7, dtype=torch.float64))
    chosen = SamplingSettings(steps=5, guidance_mode=GuidanceMode.NONE, solver=Solver.HEUN)
    got = run(lambda x, t, null: torch.sin(3 * x) + t, inputs, chosen)
    wanted = heun_last_step_euler(0.7, 5, lambda x, t: math.sin(3 * x) + t)
    torch.testing.assert_close(got, torch.full_like(got, wanted), rtol=1e-12, atol=1e-12)


def test_ab2_with_weights_of_its_own_equals_its_definition() -> None:
    """In plain Python; the first step is Euler, and so is the first that is not guided any more."""
    weights = ((1.7, -0.6), (1.4, -0.5), (2.0, -1.1), (0.9, 0.2))
    inputs = request(1)._replace(noise=torch.full((1, 3, 2, 3, 3), 0.7, dtype=torch.float64))
    chosen = SamplingSettings(
        steps=5, solver=Solver.AB2, solver_weights=weights, guidance_scale=3, renorm=False, guidance_until=0.5
    )
    got = run(lambda x, t, null: torch.sin(3 * x) + t * (1 + ~null[:, None, None, None, None]), inputs, chosen)
    x, before = 0.7, 0.0
    for step, pair in enumerate([(1.0, 0.0), *weights]):
        t = step / 5
        now, then = (1.0, 0.0) if step == 3 else pair
        velocity = math.sin(3 * x) + (t + 3 * t if t <= 0.5 else 2 * t)
        x, before = x + (now * velocity + then * before) / 5, velocity
    torch.testing.assert_close(got, torch.full_like(got, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ab2_equals_its_definition(shift: float) -> None:
    """The integral over each step of the line through two velocities, in plain Python; the first step is Euler."""
    inputs = request(1)._replace(noise=torch.full((1, 3, 2, 3, 3), 0.7, dtype=torch.float64))
    chosen = SamplingSettings(steps=5, guidance_mode=GuidanceMode.NONE, solver=Solver.AB2, time_shift=shift)
    got = run(lambda x, t, null: torch.sin(3 * x) + t, inputs, chosen)
    x, known = 0.7, []
    times = schedule(5, shift).tolist()
    for t, end in zip(times, times[1:], strict=False):
        known.append((t, math.sin(3 * x) + t))
        (t0, v0), (t1, v1) = known[-2:] if len(known) > 1 else (known[0], (1.0, known[0][1]))
        middle = (t + end) / 2
        x += (end - t) * (v0 + (middle - t0) / (t1 - t0) * (v1 - v0))
    torch.testing.assert_close(got, torch.full_like(got, x), rtol=1e-12, atol=1e-12)


def test_model_calls_per_step_and_text_once() -> None:
    for solver, calls in ((Solver.EULER, 4), (Solver.HEUN, 7), (Solver.AB2, 4)):
        fake = FakeModel(lambda x, t, null: x)
        sample(fake, request(), SamplingSettings(steps=4, solver=solver))  # type: ignore[arg-type]
        assert len(fake.calls) == calls
        assert fake.text_calls == 1


def test_time_shift_moves_the_evaluations() -> None:
    fake = FakeModel(lambda x, t, null: x)
    sample(fake, request(), SamplingSettings(steps=2, guidance_mode=GuidanceMode.NONE, time_shift=3.0))  # type: ignore[arg-type]
    assert [call[1][0].item() for call in fake.calls] == pytest.approx([0, 0.25])


masks = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda flags: torch.tensor(flags).reshape(2, 4))


@settings(max_examples=25)
@given(mask=masks, mode=st.sampled_from(GuidanceMode), solver=st.sampled_from(Solver), renorm=st.booleans())
def test_given_frames_are_bit_equal_before_every_step_and_in_the_result(
    mask: Tensor, mode: GuidanceMode, solver: Solver, renorm: bool
) -> None:
    inputs = request(2, 4, mask)
    seen: list[Tensor] = []
    fake = FakeModel(lambda x, t, null: torch.cos(x) + t)
    got = sample(
        fake,  # type: ignore[arg-type]
        inputs,
        SamplingSettings(steps=3, guidance_mode=mode, solver=solver, renorm=renorm, guidance_scale=3.0),
        lambda step, latents, velocity: seen.append(latents),
    )
    assert len(seen) == 3
    for latents in (*seen, got):
        assert torch.equal(latents[mask], inputs.clean[mask])
    for latents, _, _ in fake.calls:  # Heun's second evaluation too
        assert torch.equal(latents[:2][mask], inputs.clean[mask])


@pytest.mark.parametrize("mode", list(GuidanceMode))
@pytest.mark.parametrize("solver", list(Solver))
def test_what_each_branch_sees(mode: GuidanceMode, solver: Solver) -> None:
    """Text and image: (yes, yes); JIT adds (no, noised); SIT adds (no, yes) and (no, noised)."""
    mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    inputs = request(2, 4, mask)
    fake = FakeModel(lambda x, t, null: torch.cos(x) + t)
    sample(fake, inputs, SamplingSettings(steps=3, guidance_mode=mode, solver=solver))  # type: ignore[arg-type]
    has_text, sees_image = {
        GuidanceMode.NONE: ([True], [True]),
        GuidanceMode.JIT: ([True, False], [True, False]),
        GuidanceMode.SIT: ([True, False, False], [True, True, False]),
    }[mode]
    for latents, timestep, null in fake.calls:
        t = timestep[0].item()
        assert (timestep == t).all()  # one timestep per call: the clean frame has none of its own
        noised = t * inputs.clean + (1 - t) * inputs.noise
        branches = latents.chunk(len(has_text))
        for branch, is_null, text, sees in zip(branches, null.chunk(len(has_text)), has_text, sees_image, strict=True):
            assert (is_null != text).all()
            torch.testing.assert_close(branch[mask], (inputs.clean if sees else noised)[mask], rtol=0, atol=1e-12)
            assert torch.equal(branch[~mask], branches[0][~mask])


def two_faced(x: Tensor, t: Tensor, null: Tensor) -> Tensor:
    """A velocity that depends on text, time and place."""
    return torch.where(null[:, None, None, None, None], torch.sin(x), torch.cos(2 * x) + t)


def test_jit_at_scale_one_is_no_guidance() -> None:
    inputs = request(2, 4, torch.tensor([[True, False, False, False]] * 2))
    plain = run(two_faced, inputs, FREE)
    for renorm in (True, False):
        guided = run(two_faced, inputs, SamplingSettings(steps=8, guidance_scale=1.0, renorm=renorm))
        torch.testing.assert_close(guided, plain, rtol=1e-12, atol=1e-12)


def test_sit_with_equal_scales_is_jit() -> None:
    inputs = request(2, 4, torch.tensor([[True, False, False, False]] * 2))
    jit = run(two_faced, inputs, SamplingSettings(steps=8, guidance_scale=2.5))
    sit = run(
        two_faced,
        inputs,
        SamplingSettings(steps=8, guidance_scale=2.5, image_scale=2.5, guidance_mode=GuidanceMode.SIT),
    )
    torch.testing.assert_close(sit, jit, rtol=1e-10, atol=1e-10)


def test_guided_velocity_is_observed_with_the_conditional_norm() -> None:
    inputs = request(1, 4, torch.tensor([[True, False, False, False]]))
    fake, observed = FakeModel(two_faced), []
    sample(fake, inputs, SamplingSettings(steps=3, guidance_scale=6.0), lambda *seen: observed.append(seen))  # type: ignore[arg-type]
    for (_, before, guided), (latents, timestep, null) in zip(observed, fake.calls, strict=True):
        conditional, unconditional = two_faced(latents, timestep[:, None, None, None, None], null).chunk(2)
        torch.testing.assert_close(guided[:, 1:].norm(), conditional[:, 1:].norm())
        raw = (unconditional + 6.0 * (conditional - unconditional))[:, 1:]
        torch.testing.assert_close(guided[:, 1:] / guided[:, 1:].norm(), raw / raw.norm())
        assert torch.equal(before, latents[:1])
    assert [step for step, _, _ in observed] == [0, 1, 2]


def test_no_renorm_without_guidance() -> None:
    inputs = request()
    for renorm in (True, False):
        chosen = SamplingSettings(steps=3, guidance_mode=GuidanceMode.NONE, renorm=renorm)
        assert torch.equal(
            run(two_faced, inputs, chosen),
            run(two_faced, inputs, SamplingSettings(steps=3, guidance_mode=GuidanceMode.NONE)),
        )


def test_real_model_in_a_batch_equals_single_runs(random_model: Callable[..., Stiv]) -> None:
    model = random_model(latent_channels=2, patch=(1, 3))
    inputs = request(2, 3, torch.tensor([[True, False, False], [False, False, False]]))
    text = TextStates(normal(2, 4, 12), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), normal(2, 12))
    null = TextStates(normal(2, 4, 12, seed=4), torch.tensor([[1, 0, 0, 0]] * 2), normal(2, 12, seed=5))
    inputs = inputs._replace(text=text, null_text=null, micro=torch.ones(2, 6, dtype=torch.float64))
    chosen = SamplingSettings(steps=3, guidance_scale=2.0)
    together = sample(model, inputs, chosen)
    for index in range(2):
        one = slice(index, index + 1)
        alone = SamplingInputs(
            *(tensor[one] for tensor in inputs[:3]),
            TextStates(*(part[one] for part in text)),
            TextStates(*(part[one] for part in null)),
            inputs.micro[one],
        )
        torch.testing.assert_close(sample(model, alone, chosen), together[one], rtol=1e-9, atol=1e-9)


STUDENT = SimpleNamespace(student=Student(guidance=(2.0, 6.0)))
FLOW_MAP = SimpleNamespace(student=Student(guidance=(2.0, 6.0), flow_map=True))


@pytest.mark.parametrize("mode", [GuidanceMode.NONE, GuidanceMode.JIT])
def test_a_student_is_guided_in_one_row(mode: GuidanceMode) -> None:
    model = FakeModel(lambda latents, _time, _null: latents, config=STUDENT)
    sample(model, request(), SamplingSettings(steps=2, guidance_mode=mode, guidance_scale=3.0))  # type: ignore[arg-type]
    assert [len(latents) for latents, _, _ in model.calls] == [2, 2]
    assert all(torch.equal(scale, torch.full((2,), 3.0, dtype=torch.float64)) for scale in model.scales)
    assert len(model.scales) == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_mode": GuidanceMode.SIT}, "guidance mode sit"),
        ({"guidance_scale": 7.5}, "guidance scale 7.5: this student was trained for 2 to 6"),
        ({"renorm": False}, "renormalized"),
        ({"guidance_until": 0.5}, "interval whole"),
    ],
)
def test_what_a_student_cannot_do_is_refused(changes: dict[str, Any], said: str) -> None:
    model = FakeModel(lambda latents, _time, _null: latents, config=STUDENT)
    with pytest.raises(ConfigError, match=said):
        sample(model, request(), replace(SamplingSettings(guidance_scale=3.0), **changes))  # type: ignore[arg-type]
    assert not model.calls


def test_a_flow_map_goes_exactly_from_time_to_time() -> None:
    """The mean velocity of dx/dt = x is x (e^h - 1) / h, and it is asked for the step's own h."""
    model = FakeModel(lambda latents, _time, _null: latents, config=FLOW_MAP)

    def mean(latents: Tensor, time: Tensor, _null: Tensor) -> Tensor:
        length = model.scales[-1][:, None, None, None, None] - time
        return latents * length.expm1() / length

    model.velocity = mean
    given = request()
    for steps in (1, 2, 3):
        made = sample(model, given, SamplingSettings(steps=steps, guidance_scale=3.0, time_shift=2.0))  # type: ignore[arg-type]
        torch.testing.assert_close(made, given.noise * math.e)


@pytest.mark.parametrize("solver", [Solver.HEUN, Solver.AB2])
def test_a_flow_map_has_no_other_solver(solver: Solver) -> None:
    model = FakeModel(lambda latents, _time, _null: latents, config=FLOW_MAP)
    with pytest.raises(ConfigError, match=f"solver {solver}: a flow map"):
        sample(model, request(), SamplingSettings(guidance_scale=3.0, solver=solver))  # type: ignore[arg-type]
