"""How far a correct 8-bit backend may be from the truth: measured from several correct ones, not assumed.

Rounding to 8 bits is not continuous. Two right implementations differ by about the unit roundoff u of the 16-bit type
in every value; a value that close to the middle of two codes gets the other code, and is then off by a whole step
instead of u. With P the share of such values the implementations differ by sqrt(12 P) of the quantization error e
(a step is sqrt(12) times its rms error): P of 1 % makes 0.35 e. Measured on the small model (float16, two PyTorch
implementations, one of them in float32): 0.25 to 0.5 e after a block, 0.4 to 0.95 e after a step, e after a free run.

But a code that flips turns an error of half a step up into half a step down, so that the *size* of e barely changes:
its spread is the distance divided by the root of the number of independent errors that it sums. Measured, standard
deviation over implementations: 0.5 to 1.5 % of e after a block, 1 to 8 % in one step, 0.4 to 0.8 % over 10 steps, 12 to
22 % after a free run, whose error has few directions (where the digit is).

So every gate takes :data:`DRAWS` right implementations, in the same run and on the same inputs: the fake-quantized
reference in the bundle's precision, and in float32 on the same grid, its inputs wiggled by :data:`WIGGLE`. With m and s
the mean and standard deviation of their errors the gate is ``1.1 m + 5.08 s + u``: 1.1 is the project's promise, 5.08 s
what an implementation that loses nothing more exceeds once in a thousand (Student's t, 7 degrees of freedom, times
sqrt(1 + 1 / 8): prediction interval of one more draw), u what is rounded outside the quantizers. The same rule gates
the distance to the first draw itself, with the distances of the other draws to it.
"""

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stiv_deploy.calibration.layers import LARGEST
from stiv_deploy.calibration.plan import PrecisionPlan
from stiv_deploy.calibration.quantize import fake_quantized
from stiv_deploy.calibration.scales import Scales, scale_of
from stiv_deploy.export.parity.oracle import Boundary, Oracle, Tensors
from stiv_deploy.export.parity.requests import Request
from stiv_deploy.export.precision import torch_dtype
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingInputs, sample
from stiv_deploy.stiv_ref.text import TextStates

UNIT_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WIGGLE = UNIT_ROUNDING | {"float32": 2.0**-18}
"""Relative changes of inputs that stand for another implementation's rounding. In 16 bits that of the values outweighs
that of float32 sums; in float32 it is the sums, in another order: sqrt(n) u, 64 u for the 4608 terms of a wide FFN."""
QUANTIZED_FACTOR = 1.1
DRAWS = 8
SPREADS = 4.785 * math.sqrt(1 + 1 / DRAWS)
"""Standard deviations of :data:`DRAWS` draws above their mean that one more draw exceeds with probability 0.001."""
EXACT = ("timestep", "micro", "text_mask")
"""Graph inputs that are not wiggled: u in a time turns the angles of its embedding by u * 1000."""


def rel_l2(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error in fp64; NaN anywhere gives NaN, which no gate passes."""
    got, truth = got.double(), truth.double()
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


def quantized_gate(precision: str, errors: Sequence[float]) -> float:
    """The largest relative L2 error that passes, from ``errors`` of right implementations; see the module's text."""
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return QUANTIZED_FACTOR * statistics.fmean(errors) + SPREADS * spread + UNIT_ROUNDING[precision]


def on_grid(scales: Scales, dtype: torch.dtype) -> Scales:
    """``scales`` whose ranges are those that scales rounded to ``dtype`` span, for a model of a wider type."""
    largest = LARGEST[scales.quantization]

    def rounded(name: str, value: Tensor) -> Tensor:
        if name.endswith(".smooth"):
            return value
        return (scale_of(value, scales.quantization, dtype).double() * largest).float()

    return replace(scales, amax={name: rounded(name, value) for name, value in scales.amax.items()})


def fake_quantized_wide(model: Stiv, dtype: torch.dtype, scales: Scales, plan: PrecisionPlan) -> Stiv:
    """A copy of ``model`` with the weights and the 8-bit grid of one in ``dtype``, that computes in float32."""
    return fake_quantized(copy.deepcopy(model).to(dtype).float(), on_grid(scales, dtype), plan)


class Draws:
    """Right implementations of a quantized bundle; every method gives one result for each, the plainest first."""

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, scales: Scales) -> None:
        record = manifest.quantization
        assert record is not None
        plan = PrecisionPlan(quantization=record.format, model=manifest.model.name, layers=dict(record.layers))
        dtype = torch_dtype(manifest.precision)
        self.graphs = {name.partition(".")[0] for name in plan.layers if plan.quantized(name)}
        """Graphs with layers in 8 bits."""
        self.wiggle = WIGGLE[manifest.precision]
        self.plain = quantized_oracle(checkpoint, dtype, scales, plan)
        self._wide = Oracle(checkpoint, torch.float32)
        self._wide.model = fake_quantized_wide(checkpoint.model, dtype, scales, plan)
        self._wide.boundary = Boundary(self._wide.model)

    def _wiggled(self, value: Tensor, seed: int) -> Tensor:
        """``value`` with relative changes uniform within :data:`WIGGLE`."""
        noise = torch.rand(value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (value.double() * (1 + (2 * noise - 1) * self.wiggle)).to(value.dtype)

    def _repeated(self, value: Tensor) -> Tensor:
        """``value`` [1, ...], wiggled, once for each wide draw [DRAWS - 1, ...]."""
        return torch.cat([self._wiggled(value, seed) for seed in range(1, DRAWS)])

    def graph(self, graph: str, given: Mapping[str, Tensor]) -> list[Tensors]:
        """Outputs of one graph for the inputs ``given``."""

        def moved(seed: int) -> Tensors:
            free = {name for name, value in given.items() if value.is_floating_point() and name not in EXACT}
            inputs = {name: value.float() if name in free else value for name, value in given.items()}
            return {name: self._wiggled(value, seed) if name in free else value for name, value in inputs.items()}

        return [
            self.plain.run(graph, given),
            *(self._wide.run(graph, moved(seed)) for seed in range(1, DRAWS)),
        ]

    def _inputs(self, request: Request) -> SamplingInputs:
        """Sampling inputs of the wide draws, which run as one batch."""
        count = DRAWS - 1
        noise, clean, mask, text, null, micro = self._wide.sampling_inputs(request)

        def each(value: Tensor) -> Tensor:
            return value.expand(count, *value.shape[1:])

        text, null = (TextStates(*(each(part) for part in encoded)) for encoded in (text, null))
        return SamplingInputs(self._repeated(noise), each(clean), each(mask), text, null, each(micro))

    def velocities(self, request: Request, points: Sequence[Tensor]) -> list[Tensor]:
        """Guided velocities [steps, T, C, h, w] at the latents ``points`` [1, T, C, h, w] of every step."""
        plain, wide, settings = self.plain.sampling_inputs(request), self._inputs(request), request.settings
        found = []
        for latents, time in zip(points, request.times(), strict=False):
            first = self.plain.guided_velocity(latents.float(), plain, settings, time)
            others = self._wide.guided_velocity(self._repeated(latents.float()), wide, settings, time)
            found.append(torch.cat([first.double(), others.double()]))
        return list(torch.stack(found, dim=1))

    def free_runs(self, request: Request) -> list[Tensor]:
        """Latents [1, T, C, h, w] of whole runs."""
        first = sample(self.plain.boundary, self.plain.sampling_inputs(request), request.settings)
        others = sample(self._wide.boundary, self._inputs(request), request.settings)
        return [first, *others.split(1)]


def quantized_oracle(checkpoint: Checkpoint, dtype: torch.dtype, scales: Scales, plan: PrecisionPlan) -> Oracle:
    """The oracle whose model is the fake-quantized reference in ``dtype``."""
    oracle = Oracle(checkpoint, dtype)
    oracle.model = fake_quantized(oracle.model, scales, plan)
    oracle.boundary = Boundary(oracle.model)
    return oracle
