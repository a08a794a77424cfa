"""Right implementations of a quantized bundle for the parity ladder, by the rules of
:mod:`~stiv_deploy.export.graphs.draws`.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from stiv_deploy.calibration.plan import PrecisionPlan
from stiv_deploy.calibration.quantize import fake_quantized
from stiv_deploy.calibration.scales import Scales
from stiv_deploy.export.graphs.draws import DRAWS, EXACT, WIGGLE, fake_quantized_wide
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.graphs.reference import Boundary
from stiv_deploy.export.parity.lean import OneAtATime, only
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.requests import Request
from stiv_deploy.runtime.bundle.contract import has_layer
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.sampler import SamplingInputs, sample
from stiv_deploy.stiv_ref.text import TextStates


class Draws:
    """Right implementations of a quantized bundle; every method gives one result for each, the plainest first.

    With ``lean`` they hold one graph at a time, and can do nothing but run single graphs.
    """

    def __init__(self, checkpoint: Checkpoint, manifest: Manifest, scales: Scales, *, lean: bool = False) -> None:
        record = manifest.quantization
        assert record is not None
        plan = PrecisionPlan(quantization=record.format, model=manifest.model.name, layers=dict(record.layers))
        dtype = torch_dtype(manifest.precision)
        self._layers = [name for name in plan.layers if plan.quantized(name)]
        self.graphs = {name.partition(".")[0] for name in self._layers}
        """Graphs with layers in 8 bits."""
        self.wiggle = WIGGLE[manifest.precision]

        def made(make: Callable[[Checkpoint], Oracle]) -> Oracle:
            return OneAtATime(lambda graph: make(only(checkpoint, graph))) if lean else make(checkpoint)

        self.plain = made(lambda source: quantized_oracle(source, dtype, scales, plan))
        self.wide = made(lambda source: wide_oracle(source, dtype, scales, plan))

    def judge(self, graph: str) -> bool:
        """Whether ``graph``, which may be a half of a block, has layers in 8 bits."""
        return any(has_layer(graph, layer) for layer in self._layers)

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
            *(self.wide.run(graph, moved(seed)) for seed in range(1, DRAWS)),
        ]

    def _inputs(self, request: Request) -> SamplingInputs:
        """Sampling inputs of the wide draws, which run as one batch."""
        count = DRAWS - 1
        noise, clean, mask, text, null, micro = self.wide.sampling_inputs(request)

        def each(value: Tensor) -> Tensor:
            return value.expand(count, *value.shape[1:])

        text, null = (TextStates(*(each(part) for part in encoded)) for encoded in (text, null))
        return SamplingInputs(self._repeated(noise), each(clean), each(mask), text, null, each(micro))

    def velocities(self, request: Request, points: Sequence[Tensor]) -> list[Tensor]:
        """Guided velocities [steps, T, C, h, w] at the latents ``points`` [1, T, C, h, w] of every step."""
        plain, wide, settings = self.plain.sampling_inputs(request), self._inputs(request), request.settings
        found = []
        for latents, times in zip(points, pairwise(request.times()), strict=True):
            first = self.plain.guided_velocity(latents.float(), plain, settings, times)
            others = self.wide.guided_velocity(self._repeated(latents.float()), wide, settings, times)
            found.append(torch.cat([first.double(), others.double()]))
        return list(torch.stack(found, dim=1))

    def free_runs(self, request: Request) -> list[Tensor]:
        """Latents [1, T, C, h, w] of whole runs."""
        first = sample(self.plain.boundary, self.plain.sampling_inputs(request), request.settings)
        others = sample(self.wide.boundary, self._inputs(request), request.settings)
        return [first, *others.split(1)]


def quantized_oracle(checkpoint: Checkpoint, dtype: torch.dtype, scales: Scales, plan: PrecisionPlan) -> Oracle:
    """The oracle whose model is the fake-quantized reference in ``dtype``."""
    oracle = Oracle(checkpoint, dtype)
    oracle.model = fake_quantized(oracle.model, scales, plan)
    oracle.boundary = Boundary(oracle.model)
    return oracle


def wide_oracle(checkpoint: Checkpoint, dtype: torch.dtype, scales: Scales, plan: PrecisionPlan) -> Oracle:
    """The oracle whose model is on the grid of the fake-quantized one in ``dtype`` and computes in float32."""
    oracle = Oracle(checkpoint, torch.float32)
    oracle.model = fake_quantized_wide(checkpoint.model, dtype, scales, plan)
    oracle.boundary = Boundary(oracle.model)
    return oracle
