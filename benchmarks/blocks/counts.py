"""What one block has to do: exact counts of arithmetic, least traffic, and the time that both take at best.

A part is one kernel of an implementation that fuses all that kernels of this kind can take in: it reads each operand
once and writes its result once. A GEMM takes in bias and GELU, attention QK-norm and RoPE, and what lies between the
end of one branch and the begin of the next (norm, gate, residual sum, norm, modulation) is one pass. With FP8, what a
GEMM reads is written in 8 bits by the kernel before; all else has 16. Biases, tables and modulation are too small to
count.
"""

from dataclasses import dataclass
from typing import Literal

from blocks.sizes import Case

Kind = Literal["gemm", "attention", "rest"]
Precision = Literal["bf16", "fp8"]
WIDE = 2
"""Bytes of an element that is not FP8."""


@dataclass(frozen=True)
class Part:
    """One kernel: what kind it is, floating-point operations (a multiply-add is two), and least bytes moved."""

    name: str
    kind: Kind
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Peaks:
    """Measured on the same GPU in the same run: flop/s of large matrix products, bytes/s of a copy (read + written)."""

    bf16: float
    fp8: float | None
    copy: float

    def of(self, precision: Precision) -> float:
        """Flop/s of GEMMs in ``precision``; ``ValueError`` where the device has no FP8."""
        rate = self.bf16 if precision == "bf16" else self.fp8
        if rate is None:
            raise ValueError("no FP8 peak was measured: this device has no FP8 matrix product")
        return rate


@dataclass(frozen=True)
class Bound:
    """Least microseconds of a block: the sum over its parts, the same by kind, and GEMM arithmetic alone."""

    total_us: float
    gemm_us: float
    attention_us: float
    rest_us: float
    gemm_arithmetic_us: float


def gemms(case: Case) -> list[tuple[str, int, int]]:
    """Linears that every token passes: name, inputs, outputs. Text keys and values are made once a request."""
    width, hidden = case.config.width, case.config.width * case.config.mlp_ratio
    return [
        ("spatial.qkv", width, 3 * width),
        ("spatial.out", width, width),
        ("temporal.qkv", width, 3 * width),
        ("temporal.out", width, width),
        ("cross.q", width, width),
        ("cross.out", width, width),
        ("ffn.up", width, hidden),
        ("ffn.down", hidden, width),
    ]


def block_parts(case: Case, precision: Precision) -> list[Part]:
    """All parts of the block of ``case`` whose GEMMs are in ``precision``; attention is always in bf16."""
    operand = WIDE if precision == "bf16" else 1
    return [*_gemm_parts(case, operand), *_attention_parts(case, operand), *_passes(case, operand)]


def _gemm_parts(case: Case, operand: int) -> list[Part]:
    parts = []
    for name, inputs, outputs in gemms(case):
        result = operand if name == "ffn.up" else WIDE  # the next GEMM reads it
        nbytes = operand * inputs * (case.tokens + outputs) + result * case.tokens * outputs
        parts.append(Part(name, "gemm", 2 * case.tokens * inputs * outputs, nbytes))
    return parts


def _attention_parts(case: Case, operand: int) -> list[Part]:
    plane = case.tokens * case.config.width
    text = case.batch * case.text * case.config.width
    return [
        Part("spatial attention", "attention", 4 * plane * case.positions, plane * (3 * WIDE + operand)),
        Part("temporal attention", "attention", 4 * plane * case.token_frames, plane * (3 * WIDE + operand)),
        Part("cross-attention", "attention", 4 * plane * case.text, plane * (WIDE + operand) + 2 * text * WIDE),
    ]


def _passes(case: Case, operand: int) -> list[Part]:
    plane = case.tokens * case.config.width
    between = Part("gate, sum, norm", "rest", 0, plane * (3 * WIDE + operand))  # reads x, y; writes x, next input
    first, last = Part("norm", "rest", 0, plane * (WIDE + operand)), Part("gate, sum", "rest", 0, plane * 3 * WIDE)
    return [first, between, between, between, last]


def bound(case: Case, precision: Precision, peaks: Peaks) -> Bound:
    """Sum over the parts of the larger of flops / peak and bytes / copy rate, in microseconds."""
    least: dict[Kind, float] = {"gemm": 0.0, "attention": 0.0, "rest": 0.0}
    arithmetic = 0.0
    for part in block_parts(case, precision):
        compute = part.flops / peaks.of(precision if part.kind == "gemm" else "bf16") * 1e6
        least[part.kind] += max(compute, part.nbytes / peaks.copy * 1e6)
        arithmetic += compute if part.kind == "gemm" else 0.0
    return Bound(sum(least.values()), least["gemm"], least["attention"], least["rest"], arithmetic)
