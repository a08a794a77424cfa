"""All variants of one case: errors first, then memory and kernels, then times in turns."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from timing import Timing, buffer_sets, interleaved
from torch import Tensor, nn

from blocks.counts import Bound, Peaks, Precision, bound
from blocks.fp8 import input_scales
from blocks.kernel_times import Shares, kernel_times, shares
from blocks.sizes import Case, Inputs, inputs_as, new_block, new_inputs
from blocks.variants import VARIANTS, Call, Variant, obstacle, variant_block, variant_call
from stiv_deploy.runtime.errors import StivError
from stiv_deploy.stiv_ref.block import StivBlock

FP8_LIMIT = 0.1
"""Largest relative error of an FP8 block that rounding explains.

E4M3 rounds with an rms error of 2^-4 / sqrt(3) / sqrt(2), 2.6 %, so that a product of two such operands is 3.6 % off.
In a branch of attention that happens to v, to q and k (logits are of order one: 5.1 % of the result) and to the output
linear, 7.2 % together; a branch of the FFN has two products, 5.1 %. Every branch is normed and added to x, and what it
adds is no larger than the sum; errors of the branches before come in through norms that do not enlarge them.
"""
BF16_LIMIT = 2.0
"""Largest error of a bf16 variant, in errors of plain eager bf16."""


@dataclass(frozen=True)
class Parity:
    """Relative L2 error against a plain block in ``reference`` with the same weights, and that of eager bf16."""

    error: float
    bf16_error: float
    reference: str
    limit: float

    @property
    def good(self) -> bool:
        """Whether rounding explains the error; NaN is never good."""
        return self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One variant of one case; what was not measured is None, and ``note`` says why the variant was not run.

    A note beside a time says why there are no shares. ``weight_bytes`` is what the block's parameters take,
    ``peak_bytes`` what a call takes at most beside them and its inputs (GPUs only).
    """

    case: Case
    variant: str
    precision: Precision
    device: str
    peaks: Peaks
    bound: Bound | None
    note: str | None = None
    timing: Timing | None = None
    shares: Shares | None = None
    parity: Parity | None = None
    weight_bytes: int = 0
    peak_bytes: int | None = None

    @property
    def fraction(self) -> float | None:
        """Of the roofline: the least time over the measured one."""
        return None if self.timing is None or self.bound is None else self.bound.total_us / self.timing.median_us

    @property
    def gemm_fraction(self) -> float | None:
        """The time of the GEMMs' arithmetic alone over the measured one."""
        if self.timing is None or self.bound is None:
            return None
        return self.bound.gemm_arithmetic_us / self.timing.median_us


@dataclass(frozen=True)
class _Runs:
    """A case ready to run: bf16 block, rotating inputs, static scales and the reference result of the first input."""

    case: Case
    device: torch.device
    block: StivBlock
    sets: list[Inputs]
    scales: dict[str, Tensor]
    reference: Tensor


@torch.no_grad()
def measure_case(case: Case, device: torch.device, peaks: Peaks, rounds: int) -> list[BlockRow]:
    """Rows of all variants of ``case``, in the order of ``VARIANTS``; one that fails says so in its note."""
    torch.compiler.reset()  # a size of its own for every case: no recompilation limit, no dynamic shapes
    runs = _prepare(case, device)
    plain = relative_error(runs.block(*runs.sets[0]), runs.reference)
    rows: list[BlockRow] = []
    calls: dict[str, Call] = {}
    for variant in VARIANTS:
        row, call = _checked(variant, runs, peaks, plain)
        rows.append(row)
        if call is not None:
            calls[variant.name] = call
    try:
        times = _times(calls, runs.sets, rounds, device)
    except RuntimeError as error:  # out of memory, above all: errors and shares stay
        return [replace(row, note=row.note or f"not timed: {_first_line(error)}") for row in rows]
    return [replace(row, timing=times.get(row.variant)) for row in rows]


def _prepare(case: Case, device: torch.device) -> _Runs:
    block = new_block(case.config, device)
    first = new_inputs(case, device)
    count = buffer_sets(first[0].nbytes, device)
    sets = [first, *(new_inputs(case, device, seed=seed) for seed in range(1, count))]
    return _Runs(case, device, block, sets, input_scales(block, *first), _reference(block, first))


def reference_dtype(device: torch.device) -> torch.dtype:
    """fp64 on the CPU, where cases are small; fp32, 16 bits finer than bf16, on a GPU."""
    return torch.float32 if device.type == "cuda" else torch.float64


def _reference(block: StivBlock, inputs: Inputs) -> Tensor:
    dtype = reference_dtype(inputs[0].device)
    wide = new_block_as(block, dtype)
    with exact_products():
        result: Tensor = wide(*inputs_as(inputs, dtype))
    return result


def new_block_as(block: StivBlock, dtype: torch.dtype) -> StivBlock:
    """A copy of ``block`` whose parameters are the same numbers in ``dtype``."""
    return copy.deepcopy(block).to(dtype)


@contextmanager
def exact_products() -> Iterator[None]:
    """fp32 matrix products in fp32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Relative L2 distance, in the reference's dtype."""
    return float((result.to(reference.dtype) - reference).norm() / reference.norm())


def _checked(variant: Variant, runs: _Runs, peaks: Peaks, plain: float) -> tuple[BlockRow, Call | None]:
    """All of a variant's row but its time, and what to time; None if it cannot be run."""
    device = runs.device
    note = obstacle(variant, device)
    possible = peaks.fp8 is not None or variant.precision == "bf16"
    row = BlockRow(
        case=runs.case,
        variant=variant.name,
        precision=variant.precision,
        device=device.type,
        peaks=peaks,
        bound=bound(runs.case, variant.precision, peaks) if possible else None,
        note=note,
    )
    if note is not None:
        return row, None
    try:
        own = variant_block(variant, runs.block, runs.scales)
        call = variant_call(variant, own, device)
        error = relative_error(call(*runs.sets[0]), runs.reference)
        limit = BF16_LIMIT * plain if variant.precision == "bf16" else FP8_LIMIT
        found, missing = _shares(lambda: call(*runs.sets[0]), device)
        return replace(
            row,
            note=missing,
            parity=Parity(error, plain, str(runs.reference.dtype).removeprefix("torch."), limit),
            shares=found,
            weight_bytes=weight_bytes(own),
            peak_bytes=peak_bytes(lambda: call(*runs.sets[0]), device),
        ), call
    except (RuntimeError, ValueError, StivError) as failure:  # one variant, as of a compiler, must not end the rest
        return replace(row, note=f"failed: {_first_line(failure)}"), None


def _shares(call: Callable[[], object], device: torch.device) -> tuple[Shares | None, str | None]:
    """Shares of a call's kernels, or why there are none: a profiler may be forbidden where kernels may run."""
    try:
        return shares(kernel_times(call, device)), None
    except (RuntimeError, ValueError) as error:
        return None, f"no shares: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def weight_bytes(block: nn.Module) -> int:
    """Bytes of parameters and buffers, those of the text's keys and values too."""
    return sum(each.nbytes for each in (*block.parameters(), *block.buffers()))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that torch allocates at most during a call beyond what was there; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _times(calls: dict[str, Call], sets: list[Inputs], rounds: int, device: torch.device) -> dict[str, Timing]:
    """Times of all calls, which take turns; each goes through all sets of inputs in a round."""

    def rotating(call: Call) -> Callable[[int], object]:
        return lambda number: call(*sets[number % len(sets)])

    return interleaved({name: rotating(call) for name, call in calls.items()}, rounds, len(sets), device)
