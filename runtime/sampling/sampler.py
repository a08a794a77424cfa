"""The sampling loop: Euler or Heun with frame replacement, guidance and renorm, which the ``step`` graph computes.

Everything is allocated and bound when the sampler is made. A step writes a few scalars to the device and runs graphs;
see architecture.md and, for the same loop in plain PyTorch, ``stiv_ref/sampler.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from threading import Event
from typing import NamedTuple

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer, Call
from stiv_deploy.runtime.errors import Cancelled, RequestError, StivError
from stiv_deploy.runtime.sampling.conditioning import branch_mask
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.guidance import BRANCHES, GuidanceMode, branch_weights
from stiv_deploy.runtime.sampling.schedule import schedule


class Solver(StrEnum):
    """Ordinary differential equation solver: Euler (one model call a step) or Heun (two, second order)."""

    EULER = "euler"
    HEUN = "heun"


EULER_WEIGHTS = np.array([1, 0], dtype=np.float32)
MEAN_WEIGHTS = np.array([0.5, 0.5], dtype=np.float32)
"""Heun's corrector: the mean of the velocities at both ends of the step."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Everything about a sampling run that is not a tensor. ``image_scale`` is used by SIT-CFG only.

    Raises :class:`RequestError` for a value that cannot be sampled with.
    """

    steps: int = 50
    guidance_mode: GuidanceMode = GuidanceMode.JIT
    guidance_scale: float = 7.5
    image_scale: float = 1.5
    renorm: bool = True
    solver: Solver = Solver.EULER
    time_shift: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int | np.integer) or isinstance(self.steps, bool):
            raise RequestError(f"num_inference_steps must be a whole number, got {self.steps!r}")
        self.weights()
        self.times()

    def times(self) -> np.ndarray:
        """Sampling times, fp64 [steps + 1]."""
        return schedule(self.steps, self.time_shift)

    def weights(self) -> np.ndarray:
        """Branch weights, fp32 [branches]."""
        return branch_weights(self.guidance_mode, self.guidance_scale, self.image_scale)


@dataclass(frozen=True)
class StepRecord:
    """What an observer sees after a step: its index, the number of steps, the time reached, and the latents."""

    step: int
    total: int
    time: float
    read_latents: Callable[[], np.ndarray]
    """Copies the current latents, fp32 [B, T, C, h, w], to the host; waits for the device only when called."""


Observer = Callable[[StepRecord], None]
"""Called after each step; it stops the run by raising, for instance :class:`Cancelled`."""


class _Times(NamedTuple):
    """The scalars of every step, made before the loop: fp32 rows that are written as they are."""

    values: np.ndarray  # fp64 [steps + 1]
    dt: np.ndarray  # [steps, 1]
    next_timestep: np.ndarray  # [steps + 1, 1]
    rows: np.ndarray  # [steps + 1, model batch]

    @classmethod
    def of(cls, values: np.ndarray, model_batch: int) -> "_Times":
        timestep = values.astype(np.float32)[:, None]
        return cls(values, np.diff(values).astype(np.float32)[:, None], timestep, timestep.repeat(model_batch, axis=1))


class Sampler:
    """Integrates the flow from noise to latents with ``denoiser``; B, T, C, h, w below are its dimensions.

    With ``debug`` every step's latents are checked, so that the first bad step can be named; this waits for the device.
    """

    def __init__(self, denoiser: Denoiser, *, debug: bool = False) -> None:
        self.denoiser = denoiser
        self.debug = debug
        self._backend: Backend = denoiser.backend
        spec = denoiser.specs["step"]
        self._buffers = {
            tensor.name: self._backend.empty(tensor.sized(denoiser.dims), tensor.dtype)
            for tensor in (*spec.inputs, *spec.outputs)
            if tensor.name not in ("velocity", "next_latents", "next_model_input")
        }
        tensors = {tensor.name: tensor.sized(denoiser.dims) for tensor in spec.inputs}
        self._buffers["velocity"] = denoiser.velocity.reshape(*tensors["velocity"])
        self._buffers["next_model_input"] = denoiser.model_input.reshape(*tensors["velocity"])
        self._latents = (self._buffers["latents"], self._backend.empty(tensors["latents"], "float32"))
        self._write("previous_velocity", np.zeros(tensors["latents"], dtype=np.float32))
        self._begin = self._bind(latents=self._buffers["noise"], next_latents=self._latents[0])
        self._advance = self._both_ways()
        self._correct: tuple[Call, Call] | None = None

    def _bind(self, **buffers: Buffer) -> Call:
        return self.denoiser.bind("step", **(self._buffers | buffers))

    def _both_ways(self, **buffers: Buffer) -> tuple[Call, Call]:
        """Step calls from either latents buffer to the other."""
        first, second = self._latents
        return (
            self._bind(latents=first, next_latents=second, **buffers),
            self._bind(latents=second, next_latents=first, **buffers),
        )

    def _bind_corrector(self) -> None:
        """Bind Heun's second evaluation, whose previous velocity is the predictor's guided velocity."""
        if self._correct is None:
            spare = self._backend.empty(self._buffers["latents"].shape, "float32")
            predicted = self._buffers["guided_velocity"]
            self._correct = self._both_ways(previous_velocity=predicted, guided_velocity=spare)

    def run(
        self,
        noise: np.ndarray,
        clean: np.ndarray,
        frame_mask: np.ndarray,
        settings: SamplingSettings,
        observer: Observer | None = None,
        cancel: Event | None = None,
    ) -> np.ndarray:
        """Generate latents fp32 [B, T, C, h, w]; the given frames come out bit-equal to ``clean``.

        ``noise`` and ``clean`` fp32 [B, T, C, h, w]; ``frame_mask`` bool [B, T] marks the frames of ``clean`` that
        are given. Raises :class:`Cancelled` between steps once ``cancel`` is set, and :class:`StivError` if the
        result is not finite.
        """
        assert len(BRANCHES[settings.guidance_mode]) == self.denoiser.dims["branches"]
        times = _Times.of(settings.times(), self.denoiser.dims["model_batch"])
        if settings.solver is Solver.HEUN:
            self._bind_corrector()
        self._start(noise, clean, frame_mask, settings)
        current = 0
        for step in range(settings.steps):
            if cancel is not None and cancel.is_set():
                raise Cancelled(f"cancelled after {step} of {settings.steps} steps")
            self._step(step, current, times, settings.solver)
            current = 1 - current
            self._after(step, current, times, settings.steps, observer)
        return self._finished(self._latents[current])

    def _write(self, name: str, array: np.ndarray) -> None:
        self._backend.write(self._buffers[name], array)

    def _start(self, noise: np.ndarray, clean: np.ndarray, mask: np.ndarray, settings: SamplingSettings) -> None:
        """Upload the request and make the first latents and model input: a step with dt = 0 from the noise."""
        guided = settings.guidance_mode is not GuidanceMode.NONE
        self._write("noise", noise)
        self._write("clean", clean)
        self._write("frame_mask", mask)
        self._write("branch_mask", branch_mask(settings.guidance_mode, mask))
        self._write("branch_weights", settings.weights())
        self._write("renorm", np.array([settings.renorm and guided], dtype=np.float32))
        self._write("solver_weights", EULER_WEIGHTS)
        self._write("dt", np.zeros(1, dtype=np.float32))
        self._write("next_timestep", np.zeros(1, dtype=np.float32))
        self._write("velocity", np.zeros(self._buffers["velocity"].shape, dtype=np.float32))
        self._begin()

    def _step(self, step: int, current: int, times: _Times, solver: Solver) -> None:
        """From ``times[step]`` to the next; the last step, to t = 1, is Euler in either solver."""
        self._backend.write(self.denoiser.timestep, times.rows[step])
        self._write("dt", times.dt[step])
        self._write("next_timestep", times.next_timestep[step + 1])
        self.denoiser()
        self._advance[current]()
        if solver is Solver.HEUN and times.values[step + 1] < 1:
            assert self._correct is not None
            self._backend.write(self.denoiser.timestep, times.rows[step + 1])
            self._write("solver_weights", MEAN_WEIGHTS)
            self.denoiser()
            self._correct[current]()
            self._write("solver_weights", EULER_WEIGHTS)

    def _after(self, step: int, current: int, times: _Times, total: int, observer: Observer | None) -> None:
        latents = self._latents[current]
        if self.debug and not np.isfinite(self._backend.read(latents)).all():
            raise StivError(
                f"the latents are not finite after step {step + 1} of {total} (t = {times.values[step]:.4f})"
            )
        if observer is not None:
            observer(StepRecord(step, total, float(times.values[step + 1]), lambda: self._backend.read(latents)))

    def _finished(self, latents: Buffer) -> np.ndarray:
        result = self._backend.read(latents)
        if not np.isfinite(result).all():
            raise StivError(
                "the generated latents are not finite; lower the guidance scale, or use a bundle of higher precision "
                "(set debug to name the first bad step)"
            )
        return result
