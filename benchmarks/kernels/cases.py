"""What is timed: temporal attention and spatial pre-processing at the sizes of the large models."""

from dataclasses import dataclass
from typing import Literal

WIDE, NARROW = 2, 1
"""Bytes of an element of 16 bits, and of FP8."""
MEGABYTE = 1e6
GOALS = ((256 * MEGABYTE, 0.85), (64 * MEGABYTE, 0.70))
"""Wanted share of the copy rate from so many bytes on."""
WANTED_SPEEDUP = 3.0
"""Over torch.compile of the unfused chain."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call in bf16: sizes as in ``kernels.h``, and whether the output is FP8. ``model`` is only a name."""

    kernel: Literal["temporal", "spatial"]
    model: str
    heads: int
    head_dim: int
    frames: int = 20
    positions: int = 256
    batch: int = 2
    fp8: bool = False

    @property
    def name(self) -> str:
        """Short and unique, for tables and the command line: ``temporal-XL-S256-T20-fp8``."""
        parts = (self.kernel, self.model, f"S{self.positions}", f"T{self.frames}", *(["fp8"] if self.fp8 else []))
        return "-".join(parts)

    @property
    def width(self) -> int:
        """D = H * Dh."""
        return self.heads * self.head_dim

    @property
    def leading(self) -> tuple[int, ...]:
        """Axes of qkv before its 3: (B, T, S), or (N, S) for pre-processing."""
        if self.kernel == "temporal":
            return self.batch, self.frames, self.positions
        return self.batch * self.frames, self.positions

    @property
    def nbytes(self) -> int:
        """Least traffic: packed qkv read once, outputs written once."""
        outputs = 1 if self.kernel == "temporal" else 3
        element = NARROW if self.fp8 else WIDE
        return self.batch * self.frames * self.positions * self.width * (3 * WIDE + outputs * element)

    @property
    def goal(self) -> float | None:
        """Wanted share of the copy rate, or None where there is too little to move."""
        return next((share for least, share in GOALS if self.nbytes >= least), None)


XL, M = ("XL", 18, 64), ("M", 48, 64)
"""Name, heads and head size as in ``stiv_ref/config.py``, which needs pydantic (a test compares them)."""
# The rows of the roofline first, then the rest: what is last may find no time for its slower contenders.
_SIZES = (
    ("temporal", XL, 256, 20),
    ("temporal", XL, 1024, 20),
    ("temporal", M, 1024, 20),
    ("temporal", M, 1024, 40),
    ("spatial", XL, 1024, 20),
    ("spatial", M, 1024, 20),
    ("temporal", M, 256, 20),
    ("temporal", XL, 1024, 40),
    ("temporal", XL, 256, 40),
    ("temporal", M, 256, 40),
    ("spatial", XL, 256, 20),
    ("spatial", M, 256, 20),
)


def all_cases() -> list[Case]:
    """16-bit outputs, then the same with FP8."""
    return [
        Case(
            kernel=kernel,  # type: ignore[arg-type]
            model=model[0],
            heads=model[1],
            head_dim=model[2],
            positions=positions,
            frames=frames,
            fp8=fp8,
        )
        for fp8 in (False, True)
        for kernel, model, positions, frames in _SIZES
    ]


def tiny_cases() -> list[Case]:
    """What a CPU can emulate."""
    tiny = {"model": "tiny", "heads": 2, "head_dim": 32, "positions": 3, "batch": 1}
    return [
        Case(kernel=kernel, frames=frames, fp8=fp8, **tiny)  # type: ignore[arg-type]
        for kernel, frames, fp8 in (("temporal", 18, False), ("temporal", 2, True), ("spatial", 2, False))
    ]
