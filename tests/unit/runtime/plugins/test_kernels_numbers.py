"""The host's conversions of 16-bit and 8-bit numbers, against numpy and ml_dtypes."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from stiv_deploy.runtime.plugins.library import KernelDtype, KernelLibrary

TYPES = {
    KernelDtype.FLOAT16: np.dtype(np.float16),
    KernelDtype.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    KernelDtype.FLOAT8_E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
}


def rounded(library: KernelLibrary, dtype: KernelDtype, values: np.ndarray) -> np.ndarray:
    bits = np.empty(values.shape, np.uint16)
    addresses = (ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(bits.ctypes.data))
    library._dll.stiv_emulation_round(int(dtype), *addresses, ctypes.c_int64(values.size))
    kind = TYPES[dtype]
    return bits.astype(np.uint8).view(kind) if kind.itemsize == 1 else bits.view(kind)


def interesting(dtype: KernelDtype) -> np.ndarray:
    """Random bit patterns, all numbers of the type, the midpoints between neighbours and what is next to those."""
    kind = TYPES[dtype]
    integers = np.arange(2 ** (8 * kind.itemsize)).astype(f"u{kind.itemsize}")
    numbers = integers.view(kind).astype(np.float32)
    numbers = np.sort(numbers[np.isfinite(numbers)])
    middles = ((numbers[1:].astype(np.float64) + numbers[:-1]) / 2).astype(np.float32)
    around = np.concatenate((middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(0))))
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate((numbers, around, random, np.array([np.inf, -np.inf, np.nan, 0, -0.0], np.float32)))


@pytest.mark.parametrize("dtype", list(TYPES))
def test_numbers_are_rounded_to_nearest_even(emulated: KernelLibrary, dtype: KernelDtype) -> None:
    values = interesting(dtype)
    with np.errstate(all="ignore"):
        wanted = values.clip(-448, 448) if dtype == KernelDtype.FLOAT8_E4M3 else values
        expected = wanted.astype(TYPES[dtype]).astype(np.float32)
    got = rounded(emulated, dtype, values).astype(np.float32)
    assert np.array_equal(got, expected, equal_nan=True)
    assert np.array_equal(np.signbit(got[got == 0]), np.signbit(expected[expected == 0]))


@pytest.mark.parametrize("dtype", [KernelDtype.FLOAT16, KernelDtype.BFLOAT16])
def test_every_number_is_widened_exactly(emulated: KernelLibrary, dtype: KernelDtype) -> None:
    bits = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
    values = np.empty(bits.shape, np.float32)
    addresses = (ctypes.c_void_p(bits.ctypes.data), ctypes.c_void_p(values.ctypes.data))
    emulated._dll.stiv_emulation_widen(int(dtype), *addresses, ctypes.c_int64(bits.size))
    assert np.array_equal(values, bits.view(TYPES[dtype]).astype(np.float32), equal_nan=True)
