from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.backends.base import ALIGNMENT, ITEM_BYTES, Backend, Buffer
from stiv_deploy.runtime.sampling.host_tables import HostTables

DTYPES = st.sampled_from(("float32", "int64", "bool"))
SHAPES = st.lists(st.integers(1, 70), min_size=1, max_size=2).map(tuple)


class Device:
    """A backend of one allocation, whose memory the host sees or not."""

    def __init__(self, *, shared: bool) -> None:
        self.memory = np.empty(0, np.uint8)
        self.backend = MagicMock(spec=Backend, empty=self.empty, write=self.write)
        self.backend.host_view.side_effect = self.read if shared else lambda _: None
        self.writes = 0

    def empty(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        assert self.memory.size == 0, "one allocation"
        self.memory = np.full(int(np.prod(shape)) * ITEM_BYTES[dtype], 0xAA, np.uint8)  # type: ignore[index]
        return Buffer(0, shape, dtype, self)  # type: ignore[arg-type]

    def write(self, buffer: Buffer, array: np.ndarray) -> None:
        assert (array.shape, str(array.dtype)) == (buffer.shape, buffer.dtype)
        self.read(buffer)[...] = array
        self.writes += 1

    def read(self, buffer: Buffer) -> np.ndarray:
        return self.memory[buffer.address : buffer.address + buffer.nbytes].view(buffer.dtype).reshape(buffer.shape)


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6), st.booleans())
def test_every_table_has_its_own_aligned_place(layout: list[tuple[tuple[int, ...], str]], shared: bool) -> None:
    device = Device(shared=shared)
    tables = HostTables(device.backend, {str(index): each for index, each in enumerate(layout)})  # type: ignore[misc]
    for index, values in enumerate(tables.values.values(), 1):
        values[...] = index % 2 if values.dtype == bool else index
    tables.flush()
    for index, (shape, dtype) in enumerate(layout):
        buffer = tables.buffers[str(index)]
        assert buffer.address % ALIGNMENT == 0
        assert (buffer.shape, buffer.dtype) == (shape, dtype)
        np.testing.assert_array_equal(device.read(buffer), tables.values[str(index)])


@pytest.mark.parametrize(("shared", "writes"), [(False, 1), (True, 0)])
def test_a_flush_is_one_copy_or_none(shared: bool, writes: int) -> None:
    device = Device(shared=shared)
    tables = HostTables(device.backend, {"a": ((2,), "float32"), "b": ((3,), "bool")})
    tables.values["b"][1] = True
    tables.flush()
    assert device.writes == writes
    assert device.read(tables.buffers["a"]).tolist() == [0, 0], "the memory was not zero"
    assert device.read(tables.buffers["b"]).tolist() == [False, True, False]
