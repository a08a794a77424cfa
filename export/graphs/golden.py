"""Golden answers of a bundle: every graph's module of the reference in float64, on inputs that are drawn anew.

The gate of an output is that of the parity ladder: twice what plain PyTorch loses in the graph's own precision, at the
size where it loses most, and 4 units of rounding. In 8 bits right implementations differ in codes that flip: there the
answer is that of the fake-quantized reference, and the gate follows from its draws
(:mod:`~stiv_deploy.export.graphs.draws`).

Graphs are taken one after another, so that memory holds one of them in float64. The runs of the sampling loop are in
:mod:`~stiv_deploy.export.graphs.golden_runs`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.quantize import require_modelopt
from stiv_deploy.export.graphs.check import VAE_PIXELS as CHECKED_PIXELS
from stiv_deploy.export.graphs.check import check_sizes
from stiv_deploy.export.graphs.draws import (
    DRAWS,
    EXACT,
    UNIT_ROUNDING,
    WIGGLE,
    fake_quantized_wide,
    quantized_gate,
    rel_l2,
)
from stiv_deploy.export.graphs.golden_runs import Simulated, run_answers
from stiv_deploy.export.graphs.reference import Boundary
from stiv_deploy.export.graphs.writer import GraphWriter, in_precision
from stiv_deploy.runtime.bundle.contract import PIXEL_GRAPHS, VAE_GRAPHS, ModelFacts, TensorSpec
from stiv_deploy.runtime.bundle.golden import Golden, GraphAnswer, RunAnswers, Sizes, answer
from stiv_deploy.runtime.bundle.manifest import Bucket, GraphRecord
from stiv_deploy.runtime.bundle.sketch import seed_of, uniform
from stiv_deploy.runtime.pipeline.tiling import plan_tiles
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.runtime.sampling.golden_inputs import golden_inputs
from stiv_deploy.stiv_ref.model import Stiv

FACTOR, FLOOR = 2.0, 4.0
ROW_BYTES = 2**20
"""Largest size of a block's tokens in float32 (1 MiB) that answers have more than one row of the batch for."""
VAE_PIXELS = 2**14
"""Pixels of a frame, times latent frames, that answers of the VAE are of where a frame has fewer."""
WIDE_BYTES = 2**32
"""Largest size of a graph's parameters in float64 (4 GiB); the answers of larger ones are computed in float32."""
FIRST = "odd"
"""The size that every graph has an answer for, and that comes first."""


def golden_answers(
    writer: GraphWriter, records: Mapping[str, GraphRecord], buckets: Sequence[Bucket], progress: Progress
) -> Golden:
    """The answers of all graphs that ``writer`` has written; of quantized ones only where they can be simulated."""
    seen: set[str] = set()
    graphs: list[GraphAnswer] = []
    answers = _Answers(writer)
    for name, record in records.items():
        progress(f"golden answers: {name}", len(records), len(records))
        graphs += answers(name, answer_sizes(name, buckets, writer.facts, everywhere=record.topology not in seen))
        seen.add(record.topology)
    progress("golden answers: sampling", len(records), len(records))
    return Golden(vocabulary=answers.vocabulary, graphs=tuple(graphs), sampling=answers.runs(buckets[0]))


def answer_sizes(name: str, buckets: Sequence[Bucket], facts: ModelFacts, *, everywhere: bool) -> dict[str, Sizes]:
    """Sizes by what they are; of a graph whose like has been at all sizes only the odd one of the first bucket."""
    cases = {
        f"{which} of bucket {bucket.name}": _few_rows(_piece(name, dims, bucket, facts), bucket, facts)
        for bucket in buckets
        for which, dims in check_sizes(bucket, facts).items()
    }
    first = next(label for label in cases if label.startswith(FIRST))
    rest = {label: sizes for label, sizes in cases.items() if label != first}
    return {first: cases[first]} | (rest if everywhere else {})


def _piece(name: str, dims: dict[str, int], bucket: Bucket, facts: ModelFacts) -> dict[str, int]:
    """``dims``, for graphs of pictures few frames: :data:`VAE_PIXELS`, or one frame in the pieces of a check."""
    if name not in PIXEL_GRAPHS:
        return dims
    pixels = min(CHECKED_PIXELS, max(VAE_PIXELS, dims["height"] * dims["width"]))
    return plan_tiles(facts, bucket, dims | {"batch": bucket.batch.min}, pixels=pixels).piece(facts)


def _few_rows(dims: Mapping[str, int], bucket: Bucket, facts: ModelFacts) -> Sizes:
    """``dims`` with as many samples and rows as :data:`ROW_BYTES` has room for, and the bucket allows."""
    rows = ROW_BYTES // (4 * facts.width * dims["token_frames"] * dims["tokens"])
    most = max(bucket.batch.min, rows)
    values = {name: dims[name] for name in Sizes.model_fields}
    return Sizes(**values | {name: min(values[name], most) for name in ("batch", "model_batch")})


TF32_ROUNDING = 2.0**-11
"""Of the operands of TF32 products: as many bits as float16 has."""


class _Outputs(NamedTuple):
    """A graph's outputs at one size: what is right, in float64, and the largest relative errors that pass.

    ``engine_gates`` are those of engines, where they compute in another type.
    """

    truth: list[Tensor]
    gates: list[float]
    engine_gates: list[float] | None = None


class _Answers:
    """The answers of the graphs of ``writer``."""

    def __init__(self, writer: GraphWriter) -> None:
        self.writer = writer
        self.vocabulary = writer.checkpoint.config.text.vocabulary

    def __call__(self, name: str, sizes: Mapping[str, Sizes]) -> list[GraphAnswer]:
        """Of one graph; none where its 8 bits cannot be simulated here."""
        quantized = self.writer.quantizes(name)
        if quantized and not can_simulate():
            return []
        found = [(self._drawn if quantized else self._exact)(name, self.inputs(name, each)) for each in sizes.values()]
        gates = _largest(outputs.gates for outputs in found)
        reduced = [outputs.engine_gates for outputs in found if outputs.engine_gates is not None]
        engine_gates = _largest(reduced) if reduced else [None] * len(gates)
        return [
            self._answer(name, label, sizes[label], outputs.truth, list(zip(gates, engine_gates, strict=True)))
            for label, outputs in zip(sizes, found, strict=True)
        ]

    def runs(self, bucket: Bucket) -> RunAnswers | None:
        """Of the sampling loop; none where 8 bits cannot be simulated here."""
        if self.writer.quantization is None:
            return run_answers(self.writer, bucket, None)
        if not can_simulate():
            return None
        simulated = Simulated(Boundary(self.writer.simulated_model), Boundary(self._simulated_wide_model))
        return run_answers(self.writer, bucket, simulated)

    def _answer(
        self, name: str, label: str, sizes: Sizes, truth: list[Tensor], gates: list[tuple[float, float | None]]
    ) -> GraphAnswer:
        tensors = zip(self.writer.specs[name].outputs, truth, gates, strict=True)
        outputs = tuple(answer(tensor.name, right.numpy(), *gate) for tensor, right, gate in tensors)
        return GraphAnswer(graph=name, size=label, sizes=sizes, outputs=outputs)

    def inputs(self, name: str, sizes: Sizes) -> dict[str, Tensor]:
        """Inputs of a graph, in the types of the contract."""
        spec = self.writer.specs[name]
        drawn = golden_inputs(name, spec, sizes.dims(self.writer.facts), self.vocabulary)
        return {each.name: torch.from_numpy(drawn[each.name]).to(getattr(torch, each.dtype)) for each in spec.inputs}

    def _exact(self, name: str, inputs: Mapping[str, Tensor]) -> _Outputs:
        """What is right, and the gates that follow from what plain PyTorch loses in the graph's own type."""
        module, plain = self.writer.modules[name], self.writer.plain(name)
        wide = wide_type(module)
        truth = _run(in_precision(module, wide), inputs, wide)
        tensors = zip(self.writer.specs[name].outputs, _run(plain, inputs), truth, strict=True)
        gates = [FACTOR * rel_l2(value, right) + FLOOR * unit_of(plain, tensor) for tensor, value, right in tensors]
        return _Outputs(truth, gates, self._engine_gates(name, inputs, truth))

    def _engine_gates(self, name: str, inputs: Mapping[str, Tensor], truth: Sequence[Tensor]) -> list[float] | None:
        """The same rule for the type that engines compute the VAE in: its 16 bits, else TF32.

        What plain PyTorch loses there is what it loses in bfloat16, in proportion to the units of rounding.
        """
        writer = self.writer
        if name not in VAE_GRAPHS or writer.dtype == torch.float32:
            return None
        unit = TF32_ROUNDING if writer.vae_precision == "float32" else UNIT_ROUNDING[writer.vae_precision]
        reduced = _run(in_precision(writer.modules[name], torch.bfloat16), inputs, torch.bfloat16)
        errors = [rel_l2(*pair) * unit / UNIT_ROUNDING["bfloat16"] for pair in zip(reduced, truth, strict=True)]
        return [FACTOR * error + FLOOR * unit for error in errors]

    def _drawn(self, name: str, inputs: Mapping[str, Tensor]) -> _Outputs:
        """What the fake-quantized reference gives in float32, and gates from the distances of other draws to it."""
        plain, wide, precision = self.writer.simulated(name), self._simulated_wide[name], _name(self.writer.dtype)
        truth = _run(wide, inputs, torch.float32)
        moved = (wiggled(inputs, precision, seed) for seed in range(1, DRAWS))
        draws = [_run(plain, inputs), *(_run(wide, each, torch.float32) for each in moved)]
        distances = ([_distance(*pair) for pair in zip(draw, truth, strict=True)] for draw in draws)
        return _Outputs(truth, [quantized_gate(precision, each) for each in zip(*distances, strict=True)])

    @cached_property
    def _simulated_wide_model(self) -> Stiv:
        """The fake-quantized model that computes in float32, on the grid of the bundle's precision."""
        writer = self.writer
        assert writer.quantization is not None
        scales, plan = writer.quantization.scales, writer.quantization.plan
        return fake_quantized_wide(writer.checkpoint.model, writer.dtype, scales, plan)

    @cached_property
    def _simulated_wide(self) -> Mapping[str, nn.Module]:
        """Its graphs' modules."""
        simulated = replace(self.writer.checkpoint, model=self._simulated_wide_model)
        return self.writer.modules_of(simulated)


def _largest(gates: Iterable[Sequence[float]]) -> list[float]:
    """Of each output, over sizes."""
    return [max(each) for each in zip(*gates, strict=True)]


def can_simulate() -> bool:
    """Whether ModelOpt is here, which simulates 8 bits."""
    try:
        require_modelopt()
    except CalibrationError:
        return False
    return True


def wide_type(module: nn.Module) -> torch.dtype:
    """Float64, or float32 for a module of more than :data:`WIDE_BYTES`."""
    parameters = sum(each.numel() for each in module.parameters())
    return torch.float64 if 8 * parameters <= WIDE_BYTES else torch.float32


def unit_of(plain: nn.Module, tensor: TensorSpec) -> float:
    """The rounding of a graph's weights or of its output, whichever is coarser."""
    dtype = next((each.dtype for each in plain.parameters()), torch.float32)
    return max(UNIT_ROUNDING[_name(dtype)], UNIT_ROUNDING.get(tensor.dtype, 0.0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wiggled(inputs: Mapping[str, Tensor], precision: str, seed: int) -> dict[str, Tensor]:
    """``inputs`` in float32, with relative changes as another implementation's rounding makes them."""

    def moved(name: str, value: Tensor) -> Tensor:
        if name in EXACT or not value.is_floating_point():
            return value
        change = torch.from_numpy(2 * uniform(tuple(value.shape), seed_of("wiggle", name, seed)) - 1)
        return (value.double() * (1 + WIGGLE[precision] * change)).float()

    return {name: moved(name, value) for name, value in inputs.items()}


def _distance(value: Tensor, truth: Tensor) -> float:
    """Relative L2 distance as sketches tell it: with the spread that they have when a bundle is verified."""
    return answer("", truth.numpy(), 1.0).error(value.numpy())


@torch.no_grad()
def _run(module: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs of a module, in float64, for ``inputs`` as they are or in ``dtype``."""
    given = [value.to(dtype) if dtype and value.is_floating_point() else value for value in inputs.values()]
    outputs = module(*given)
    return [each.double() for each in (outputs if isinstance(outputs, tuple) else (outputs,))]
