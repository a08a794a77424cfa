"""Does an exported graph compute what the reference computes? ONNX Runtime against torch, over a bucket's sizes."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from stiv_deploy.runtime.backends.onnxruntime import set_quantization
from stiv_deploy.runtime.bundle.contract import (
    MASKED,
    PIXEL_GRAPHS,
    SAMPLE_ROWS,
    Format,
    GraphSpec,
    ModelFacts,
    Precision,
    TensorSpec,
    dimensions,
    is_half,
)
from stiv_deploy.runtime.bundle.engine_files import SHARED, shard
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.runtime.pipeline.tiling import plan_tiles

FLOAT32_GATE = 1e-5
"""Largest relative L2 error of a float32 graph against torch in float32.

Both round at u = 6e-8 and differ in the order of their sums. Rounding errors of a sum of n terms grow as sqrt(n) * u
when they are random: 4e-6 for n = 4608, the widest sum (FFN of the 1152-wide model). A graph chains a few such sums,
and norms bring each back to unit size. A wrong axis, table or epsilon gives 1e-3 and more.
"""
HALF_FACTOR = 2.0
"""A half-precision graph may have twice the error of plain torch in the same precision, both against float32."""
QUANTIZED_FACTOR = 1.1
"""A quantized graph may have 1.1 times the error of the fake-quantized reference, both against float32.

Both quantize the same tensors with the same scales; where their 16-bit values differ by a rounding, a few codes flip.
"""
_NAMES: dict[torch.dtype, Precision] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FLOOR = {torch.float32: FLOAT32_GATE, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Floor of the gates, the unit roundoff of half precisions: two right results may round each value differently."""


SCALES = (1.0, 8.0)
"""Guidance scales that a student's graph is checked with."""
VAE_PIXELS = 2**18
"""Pixels of a frame, times latent frames, that a check of the VAE takes: a frame of 512x512, some 10 s of a CPU."""
TOKEN_BYTES = 2**26
"""Largest size of a block's tokens in float32 (64 MiB) that a check takes with more than one row of the batch."""


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """Result of one graph at one size: the worst output's error and its gate. ``rel_l2`` is None if not executed.

    ``against`` says what it was compared with.
    """

    graph: str
    size: str
    rel_l2: float | None
    gate: float
    passed: bool
    against: str = "the reference"


def check_sizes(bucket: Bucket, facts: ModelFacts) -> dict[str, dict[str, int]]:
    """Symbol values to check at: minimum, typical, maximum and an odd size inside, not square where there is room.

    Sizes whose tokens exceed :data:`TOKEN_BYTES` have a smaller batch: its rows are computed alike, and a check holds
    several times its tokens (hidden layer of the FFN, reference and simulation beside the graph).
    """
    corners: tuple[Literal["min", "typical", "max"], ...] = ("min", "typical", "max")
    sizes: dict[str, dict[str, int]] = {which: bucket.dims(facts, which) for which in corners}
    batch = _odd_inside(bucket.batch, 1, 0.5)
    sizes["odd"] = dimensions(
        facts,
        batch=batch,
        model_batch=batch * SAMPLE_ROWS,
        video_frames=_odd_inside(bucket.frames, facts.frame_multiple, 0.3, facts.frame_padding),
        height=_odd_inside(bucket.height, facts.pixel_multiple, 0.2),
        width=_odd_inside(bucket.width, facts.pixel_multiple, 0.5),
        text_tokens=max(1, facts.max_text_tokens // 2 - 1),
    )
    return {which: _fitting(dims, facts) for which, dims in sizes.items()}


def graph_sizes(graph: str, bucket: Bucket, facts: ModelFacts) -> dict[str, dict[str, int]]:
    """:func:`check_sizes`, for graphs of pictures cut to pieces of :data:`VAE_PIXELS`, which the runtime cuts too.

    Halves of blocks are checked at the smallest shard besides.
    """
    sizes = check_sizes(bucket, facts)
    if is_half(graph):
        return sizes | {"smallest shard": sizes["typical"] | shard(facts, SHARED[graph.partition("_")[0]], 1)}
    if graph not in PIXEL_GRAPHS:
        return sizes
    return {which: plan_tiles(facts, bucket, dims, pixels=VAE_PIXELS).piece(facts) for which, dims in sizes.items()}


def _fitting(dims: dict[str, int], facts: ModelFacts) -> dict[str, int]:
    """``dims`` with as many samples and rows as :data:`TOKEN_BYTES` has room for, at least one of each."""
    rows = max(1, TOKEN_BYTES // (4 * facts.width * dims["token_frames"] * dims["tokens"]))
    return dims | {"batch": min(dims["batch"], rows), "model_batch": min(dims["model_batch"], rows)}


def _odd_inside(allowed: Range, multiple: int, share: float, padding: int = 0) -> int:
    """A multiple, less ``padding``, about ``share`` of the way through a range, an odd one where there is one."""
    low, high = -(-(allowed.min + padding) // multiple), (allowed.max + padding) // multiple
    units = low + round(share * (high - low))
    if units % 2 == 0:
        units += 1 if units < high else -(units > low)
    return units * multiple - padding


def draw_inputs(spec: GraphSpec, dims: dict[str, int], vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    """Seeded values for a graph's inputs, of the kind that each has in use, in the contract's types."""
    drawn = {}
    for tensor in spec.inputs:
        values = _draw(tensor, tensor.sized(dims), {"token_ids": vocabulary} | _indices(dims), seed)
        drawn[tensor.name] = torch.from_numpy(np.asarray(values)).to(getattr(torch, tensor.dtype))
    return drawn


def _indices(dims: Mapping[str, int]) -> dict[str, int]:
    """How many rows and samples the indices of the ``step`` graph choose from."""
    return {"sample_rows": dims.get("model_batch", 1), "row_sample": dims.get("batch", 1)}


def _draw(tensor: TensorSpec, shape: tuple[int, ...], limits: Mapping[str, int], seed: int) -> np.ndarray:
    """Values in float32 or int64, indices below ``limits``; the ones not named here are standard normal."""
    stem = tensor.name.removesuffix("_cos").removesuffix("_sin")  # a table's cosine and sine share their angles
    random = np.random.default_rng([seed, *stem.encode()])
    rules: dict[str, Callable[[], Any]] = {
        **{name: partial(random.integers, 0, limit, shape) for name, limit in limits.items()},
        "token_mask": lambda: _lengths(random, shape).astype(np.int64),
        "text_mask": lambda: np.where(_lengths(random, (shape[0], shape[-1])), 0, MASKED).reshape(shape),
        "timestep": lambda: random.random(shape),
        "next_timestep": lambda: random.random(shape),
        "guidance": lambda: random.uniform(*SCALES, shape),
        "target_time": lambda: random.random(shape),
        "micro": lambda: random.integers(0, 512, shape),
        "video": lambda: random.uniform(-1, 1, shape),
        "spatial": lambda: random.uniform(-np.pi, np.pi, shape),
        "temporal": lambda: random.uniform(-np.pi, np.pi, shape),
        "frame_mask": lambda: random.random(shape) < 0.3,
        "row_mask": lambda: random.random(shape) < 0.3,
        "hold": lambda: random.random(shape) < 0.3,
        "skipped": lambda: np.arange(*shape) % 2 == 0,
        "renorm": lambda: np.ones(shape),
        "dt": lambda: random.random(shape),
    }
    values = rules.get(stem, lambda: random.standard_normal(shape))()
    if tensor.name.endswith("_cos"):
        return np.cos(values)
    return np.sin(values) if tensor.name.endswith("_sin") else values


def _lengths(random: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Bool [rows, length]: true for the first 1 to ``length`` positions of each row."""
    rows, length = shape
    return np.arange(length) < random.integers(1, length + 1, (rows, 1))


def executable(spec: GraphSpec) -> bool:
    """Whether ONNX Runtime can run the graph on a CPU: it has no bfloat16 kernels there."""
    return all(tensor.dtype != "bfloat16" for tensor in (*spec.inputs, *spec.outputs))


def open_session(
    path: Path, quantization: Format | None = None, precision: Precision = "float32"
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as torch uses, quiet; else as the runtime opens it."""
    options = onnxruntime.SessionOptions()
    set_quantization(options, quantization, precision)
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False  # it would keep what each of the sizes took
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def relative_error(value: np.ndarray | Tensor, reference: np.ndarray | Tensor) -> float:
    """Relative L2 error in fp64, ``|value - reference| / |reference|``; infinite if ``value`` is not finite."""
    value, reference = (np.asarray(array, dtype=np.float64) for array in (value, reference))
    if not np.isfinite(value).all():
        return float("inf")
    difference, size = np.linalg.norm(value - reference), np.linalg.norm(reference)
    return float(difference / size) if size else float(difference > 0)


def check_graph(
    name: str,
    path: Path,
    spec: GraphSpec,
    reference: nn.Module,
    exported: nn.Module,
    sizes: Mapping[str, dict[str, int]],
    vocabulary: int,
    quantization: Format | None = None,
    native: Path | None = None,
) -> Iterator[CheckRow]:
    """Run a written graph at every one of ``sizes`` and compare it with its module.

    ``reference`` is the module in float32; ``exported`` the one that was exported, in the bundle's precision (the same
    object for a float32 graph), fake-quantized where ``quantization`` says in which format the graph is quantized.
    Gates: :data:`FLOOR` of the output's type or of the graph's, whichever is coarser, plus the error of ``exported`` in
    torch times :data:`HALF_FACTOR` or :data:`QUANTIZED_FACTOR` where it differs from ``reference``. A float32 graph
    that misses its gate is judged like one in half precision, by float64: a deep encoder may be that ill-conditioned.
    Where the graph is a second form of the one in ``native``, both are also compared with each other, by the same
    gates: independent roundings lie 1.4 times their size apart, and the codes of 8 bits are common to both.
    """
    if not executable(spec):
        yield from (CheckRow(graph=name, size=size, rel_l2=None, gate=0.0, passed=True) for size in sizes)
        return
    dtype = _dtype(exported)
    session = open_session(path, quantization, _NAMES[dtype])
    first = None if native is None else open_session(native, quantization, _NAMES[dtype])
    judge = _Judge(name, spec, reference, exported, quantization)
    for size, dims in sizes.items():
        inputs = draw_inputs(spec, dims, vocabulary)
        feed = {key: tensor.numpy() for key, tensor in inputs.items()}
        found = session.run(None, feed)
        row, gates = judge(size, inputs, found)
        yield row
        if first is not None:
            other = [torch.from_numpy(value) for value in first.run(None, feed)]
            yield _row(name, size, found, other, gates, "its native form")


class _Judge:
    """Measures what a graph computed by its module; see :func:`check_graph` for the rules."""

    def __init__(
        self, name: str, spec: GraphSpec, reference: nn.Module, exported: nn.Module, quantization: Format | None
    ) -> None:
        dtype = _dtype(exported)
        self.name, self.reference, self.exported = name, reference, exported
        self.factor = HALF_FACTOR if quantization is None else QUANTIZED_FACTOR
        self.floors = [max(FLOOR[dtype], FLOOR.get(getattr(torch, tensor.dtype), 0.0)) for tensor in spec.outputs]
        self._exact: nn.Module | None = None

    def __call__(
        self, size: str, inputs: Mapping[str, Tensor], found: Sequence[np.ndarray]
    ) -> tuple[CheckRow, list[float]]:
        """The row of one size, and the gates of all outputs."""
        wanted = _run(self.reference, _cast(inputs, torch.float32))
        if self.exported is not self.reference:
            gates = _gates(_run(self.exported, inputs), wanted, self.factor, self.floors)
            return _row(self.name, size, found, wanted, gates), gates
        row = _row(self.name, size, found, wanted, self.floors)
        if row.passed:
            return row, self.floors
        self._exact = self._exact or copy.deepcopy(self.reference).double()
        truth = _run(self._exact, _cast(inputs, torch.float64))
        gates = _gates(wanted, truth, self.factor, self.floors)
        return _row(self.name, size, found, truth, gates), gates


def _cast(inputs: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``inputs``, the floating ones in ``dtype``."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in inputs.items()}


def _gates(own: Sequence[Tensor], wanted: Sequence[Tensor], factor: float, floors: Sequence[float]) -> list[float]:
    """The gate of each output where plain torch gives ``own`` and a wider type ``wanted``."""
    return [
        factor * relative_error(value.double(), oracle) + floor
        for value, oracle, floor in zip(own, wanted, floors, strict=True)
    ]


def _row(
    name: str,
    size: str,
    found: Sequence[np.ndarray],
    wanted: Sequence[Tensor],
    gates: Sequence[float],
    against: str = CheckRow.against,
) -> CheckRow:
    """The worst output of a graph, measured by its gate."""
    errors = [relative_error(value, oracle) for value, oracle in zip(found, wanted, strict=True)]
    worst = max(range(len(errors)), key=lambda index: errors[index] / gates[index])
    return CheckRow(
        graph=name,
        size=size,
        rel_l2=errors[worst],
        gate=gates[worst],
        passed=errors[worst] <= gates[worst] and [v.shape for v in found] == [tuple(w.shape) for w in wanted],
        against=against,
    )


def _dtype(module: nn.Module) -> torch.dtype:
    """Type of a module's parameters; float32 for one without."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


@torch.no_grad()
def _run(module: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    outputs = module(*inputs.values())
    return outputs if isinstance(outputs, tuple) else (outputs,)
