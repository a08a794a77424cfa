"""The register layouts that the tensor-core kernels take for granted, each instruction alone, against the PTX manual.

First of all checks: if one of these is wrong on a GPU, every attention result is, and this says which.
Source: PTX ISA, "Matrix fragments for mma.m16n8k16 / m16n8k8" and "ldmatrix".
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

Array = np.ndarray
LANES = 32
HALVES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}


def _packed(numbers: Array) -> Array:
    """Pairs of 16-bit numbers [..., 2] as words [...], the first one in the low half."""
    halves = np.ascontiguousarray(numbers).view(np.uint16).astype(np.uint32)
    return halves[..., 0] | halves[..., 1] << 16


def fragment_of_a(a: Array) -> Array:
    """Registers [32, K / 4] of a [16, K], K 16 or 8: pairs along k, rows lane / 4 and 8 more, then k + 8."""
    lanes = np.arange(LANES)
    row, k = lanes // 4, lanes % 4 * 2
    places = [(row + 8 * (i % 2), k + 8 * (i // 2)) for i in range(a.shape[1] // 4)]
    return np.stack([_packed(np.stack((a[r, c], a[r, c + 1]), -1)) for r, c in places], -1)


def fragment_of_b(b: Array) -> Array:
    """Registers [32, K / 8] of b [K, 8]: pairs along k, column lane / 4."""
    lanes = np.arange(LANES)
    column, k = lanes // 4, lanes % 4 * 2
    registers = [_packed(np.stack((b[k + 8 * i, column], b[k + 8 * i + 1, column]), -1)) for i in range(len(b) // 8)]
    return np.stack(registers, -1)


def fragment_of_c(c: Array) -> Array:
    """Numbers [32, 4] of c [16, 8]: rows lane / 4 and 8 more, two neighbouring columns of each."""
    lanes = np.arange(LANES)
    row, column = lanes // 4, lanes % 4 * 2
    return np.stack([c[row + 8 * (i // 2), column + i % 2] for i in range(4)], -1)


def _small_integers(rng: np.random.Generator, shape: tuple[int, ...], kind: np.dtype) -> Array:
    return rng.integers(-8, 9, shape).astype(np.float32).astype(kind)


def _matrices(count: int, transposed: bool) -> tuple[Array, Array]:
    """Words in and registers out of a load of ``count`` matrices whose elements are all different."""
    numbers = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    seen = numbers.transpose(0, 2, 1) if transposed else numbers
    lanes = np.arange(LANES)
    pairs = [np.stack((each[lanes // 4, lanes % 4 * 2], each[lanes // 4, lanes % 4 * 2 + 1]), -1) for each in seen]
    return _packed(numbers.reshape(-1, 2)), np.stack([_packed(pair) for pair in pairs], -1)


def _product(name: str, depth: int) -> tuple[Array, Array]:
    """Words in and out of c += a b over ``depth``, of integers, so that no sum is rounded."""
    rng, kind = np.random.default_rng(depth), HALVES[name]
    a, b = _small_integers(rng, (16, depth), kind), _small_integers(rng, (depth, 8), kind)
    c = rng.integers(-8, 9, (16, 8)).astype(np.float32)
    exact = a.astype(np.float32) @ b.astype(np.float32) + c
    words = (fragment_of_a(a), fragment_of_b(b), fragment_of_c(c).view(np.uint32))
    return np.concatenate([each.ravel() for each in words]), fragment_of_c(exact).view(np.uint32)


def _conversion(name: str) -> tuple[Array, Array]:
    """Words in; the same, with halves exchanged, and the pair as FP8, low half first."""
    numbers = np.random.default_rng(1).uniform(-500, 500, (LANES, 2)).astype(np.float32)
    numbers[:4] = np.array([[np.nan, 1], [-np.inf, np.inf], [500, -500], [2.0**-9, -0.0]], np.float32)
    halves = numbers.astype(HALVES[name])
    with np.errstate(invalid="ignore"):
        small = halves.astype(np.float32).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    fp8 = small.view(np.uint8).astype(np.uint32)
    fp8[np.isnan(small.astype(np.float32))] = 0x7F
    words, exchanged = _packed(halves), _packed(halves[:, ::-1])
    return words, np.stack((words, exchanged, fp8[:, 0] | fp8[:, 1] << 8), -1)


PROBES: dict[str, Callable[[], tuple[Array, Array]]] = {
    "ldmatrix.x4": lambda: _matrices(4, False),
    "ldmatrix.x4.trans": lambda: _matrices(4, True),
    "ldmatrix.x2": lambda: _matrices(2, False),
    "ldmatrix.x2.trans": lambda: _matrices(2, True),
    "mma.m16n8k16 bf16": lambda: _product("bf16", 16),
    "mma.m16n8k16 fp16": lambda: _product("fp16", 16),
    "mma.m16n8k8 bf16": lambda: _product("bf16", 8),
    "mma.m16n8k8 fp16": lambda: _product("fp16", 8),
    "conversions of bf16": lambda: _conversion("bf16"),
    "conversions of fp16": lambda: _conversion("fp16"),
}
"""By the numbers that ``fragments.cu`` has for them."""


def _faults(name: str, got: Array, expected: Array) -> str | None:
    different = got != expected
    if name.startswith("conversions"):  # any NaN is as good as another
        kind = HALVES[name.rpartition(" ")[2]]
        both = [np.isnan(x[:, :2].copy().view(kind).astype(np.float32)) for x in (got, expected)]
        different[:, :2] &= ~(both[0] == both[1]).reshape(LANES, 2, 2).all(-1) | ~both[1].reshape(LANES, 2, 2).any(-1)
    if not different.any():
        return None
    lane, register = (int(x) for x in np.argwhere(different)[0])
    return (
        f"{name}: {int(different.sum())} of {different.size} registers are not laid out as the kernels take them to be "
        f"(lane {lane}, register {register}: {got[lane, register]:#010x}, expected {expected[lane, register]:#010x})"
    )


def check_fragments(library: Path) -> list[str]:
    """Run every probe of the library that ``fragments.cu`` became; returns one line for each wrong layout."""
    dll = ctypes.CDLL(str(library))
    dll.stiv_probe.argtypes = [ctypes.c_int32, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]
    faults = []
    for number, (name, make) in enumerate(PROBES.items()):
        words, expected = make()
        words, got = np.ascontiguousarray(words, np.uint32), np.full(expected.shape, 0xDEADBEEF, np.uint32)
        code = dll.stiv_probe(number, words.ctypes.data, words.size, got.ctypes.data, got.size)
        fault = f"{name}: CUDA error {code}" if code else _faults(name, got, expected)
        if fault:
            faults.append(fault)
    return faults
