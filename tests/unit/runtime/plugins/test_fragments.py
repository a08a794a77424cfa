"""Emulated tensor-core instructions against the layouts that CuTe publishes for them, an independent account.

A CuTe layout maps (lane, value) to a column-major index by strides. Those below are MMA_Traits of SM80_16x8x16 and
SM80_16x8x8 (cute/atom/mma_traits_sm80.hpp) and Copy_Traits of ldmatrix (cute/atom/copy_traits_sm75.hpp) in CUTLASS 4,
where they index an [M, K] or [N, K] tile, and bits of consecutive 8x8 matrices.
"""

import ctypes
from itertools import product

import numpy as np
import pytest

from stiv_deploy.runtime.plugins.library import KernelDtype, KernelLibrary

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""Sizes and strides, first mode fastest."""
LANES: dict[str, Layout] = {
    "a16": ((4, 8), (32, 1)),
    "b16": ((4, 8), (16, 1)),
    "a8": ((4, 8), (32, 1)),
    "b8": ((4, 8), (16, 1)),
    "c": ((4, 8), (32, 1)),
}
VALUES: dict[str, Layout] = {
    "a16": ((2, 2, 2), (16, 8, 128)),
    "b16": ((2, 2), (8, 64)),
    "a8": ((2, 2), (16, 8)),
    "b8": ((2,), (8,)),
    "c": ((2, 2), (16, 8)),
}


def offsets(layout: Layout) -> np.ndarray:
    """Index of each coordinate of ``layout``, first mode fastest."""
    sizes, strides = layout
    coordinates = product(*(range(size) for size in reversed(sizes)))
    return np.array([sum(c * s for c, s in zip(reversed(at), strides, strict=True)) for at in coordinates])


def indices(operand: str) -> np.ndarray:
    """[32, values]: where lane and value stand in the operand's column-major tile."""
    return offsets(LANES[operand])[:, None] + offsets(VALUES[operand])[None, :]


def address(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def words(dtype: KernelDtype, tile: np.ndarray, operand: str) -> np.ndarray:
    """Registers [32, words] of a tile [rows, K] of small integers, two values of 16 bits in a word, low one first."""
    values = tile.flatten(order="F")[indices(operand)].astype(np.float32)
    if dtype is KernelDtype.FLOAT16:
        bits = values.astype(np.float16).view(np.uint16)
    else:
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)  # small integers: the low half is zero
    return np.ascontiguousarray(bits).view(np.uint32)


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("dtype", [KernelDtype.FLOAT16, KernelDtype.BFLOAT16])
def test_mma(emulated: KernelLibrary, dtype: KernelDtype, depth: int) -> None:
    random = np.random.default_rng(depth)
    a, b, c = (random.integers(-9, 10, shape) for shape in ((16, depth), (8, depth), (16, 8)))
    left, right = words(dtype, a, f"a{depth}"), words(dtype, b, f"b{depth}")
    sums = np.ascontiguousarray(c.flatten(order="F")[indices("c")], np.float32)
    code = emulated._dll.stiv_emulation_multiply(int(dtype), depth, *map(address, (left, right, sums)))
    result = np.empty(16 * 8, np.float32)
    result[indices("c")] = sums
    assert code == 0
    np.testing.assert_array_equal(result.reshape(16, 8, order="F"), a @ b.T + c)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [2, 4])
def test_ldmatrix(emulated: KernelLibrary, matrices: int, transposed: bool) -> None:
    rows = np.arange(matrices * 64, dtype=np.uint16)
    out = np.empty((32, matrices), np.uint32)
    code = emulated._dll.stiv_emulation_load_matrix(matrices, int(transposed), address(rows), address(out))
    plain: tuple[Layout, Layout] = ((32,), (32,)), ((2, matrices), (16, 1024))
    turned: tuple[Layout, Layout] = ((4, 8), (256, 16)), ((2, matrices), (128, 1024))
    lanes, values = turned if transposed else plain
    bits = offsets(lanes)[:, None] + offsets(values)[None, :]
    assert code == 0
    np.testing.assert_array_equal(out.view(np.uint16), rows[bits // 16])
