"""Weights in a graph's data file, by what its ONNX file says of them; read without the package onnx.

An ONNX file is a protobuf message (``onnx.proto``): ``ModelProto.graph`` is field 7, ``GraphProto.initializer`` field
5; of a ``TensorProto`` ``dims`` is field 1, ``data_type`` 2, ``name`` 8, ``external_data`` 13.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

GRAPH, INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, EXTERNAL = 1, 2, 8, 13
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FLOAT, FLOAT16, BFLOAT16 = 1, 10, 16
"""``TensorProto.DataType`` numbers."""
STORED: dict[int, np.dtype[Any]] = {FLOAT: np.dtype("<f4"), FLOAT16: np.dtype("<f2"), BFLOAT16: np.dtype("<u2")}
"""What weights that can be changed are stored as; bfloat16 as the bits of it."""


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """A tensor of a graph's data file: its type by number, its shape, and its place in bytes."""

    data_type: int
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in bytes of one whose type is in :data:`STORED`."""
        return prod(self.shape) * STORED[self.data_type].itemsize


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of 7 bits a byte, the least first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message; numbers of a fixed width, which nobody asks for, are left out."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
        elif kind == BYTES:
            length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("a field ends behind its message")
            yield number, data[at : at + length]
            at += length
        else:
            at += {FIXED64: 8, FIXED32: 4}[kind]


def _parts(data: bytes, wanted: int) -> Iterator[bytes]:
    return (value for number, value in _fields(data) if number == wanted and isinstance(value, bytes))


def _sizes(value: int | bytes) -> Iterator[int]:
    """Entries of ``dims``: one, or several packed into bytes."""
    if isinstance(value, int):
        yield value
        return
    at = 0
    while at < len(value):
        size, at = _varint(value, at)
        yield size


def _text(value: int | bytes) -> str:
    if isinstance(value, int):
        raise ValueError("a number in the place of text")
    return value.decode()


def _initializer(data: bytes) -> tuple[str, Initializer | None]:
    """Name and place of a tensor; ``None`` for one whose values stand in the ONNX file itself."""
    fields = list(_fields(data))
    entries = [dict(_fields(value)) for number, value in fields if number == EXTERNAL and isinstance(value, bytes)]
    place = {_text(entry[1]): _text(entry[2]) for entry in entries}
    single = dict(fields)
    name, kind = _text(single[NAME]), single[DATA_TYPE]
    if not place or not isinstance(kind, int):
        return name, None
    shape = tuple(size for number, value in fields if number == DIMS for size in _sizes(value))
    return name, Initializer(data_type=kind, shape=shape, offset=int(place.get("offset", "0")))


def read_initializers(path: Path) -> Mapping[str, Initializer]:
    """What lies in the data file of the ONNX file ``path``, by name; ``ValueError`` if it is no such file."""
    try:
        (graph,) = _parts(path.read_bytes(), GRAPH)
        found = dict(_initializer(each) for each in _parts(graph, INITIALIZER))
    except (IndexError, KeyError, ValueError):
        raise ValueError("it is no ONNX file") from None
    return {name: each for name, each in found.items() if each is not None}


def read_stored(data: Path, weight: Initializer) -> np.ndarray:
    """The values of ``weight``, which is of a type in :data:`STORED`, as they lie in the data file ``data``.

    ``ValueError`` if they are not in it.
    """
    dtype = STORED[weight.data_type]
    return np.fromfile(data, dtype, prod(weight.shape), offset=weight.offset).reshape(weight.shape)


def read_weight(data: Path, weight: Initializer) -> np.ndarray:
    """The values of :func:`read_stored` as fp32."""
    values = read_stored(data, weight)
    if weight.data_type == BFLOAT16:  # the upper half of a float32
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def as_stored(values: np.ndarray, data_type: int) -> np.ndarray:
    """Finite fp32 ``values`` as they are stored in ``data_type``, rounded to nearest even; infinity where too large."""
    if data_type != BFLOAT16:
        with np.errstate(over="ignore"):
            return values.astype(STORED[data_type])
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def is_finite(stored: np.ndarray, data_type: int) -> bool:
    """Whether no value of :func:`as_stored` is infinite."""
    if data_type == BFLOAT16:
        return bool(((stored & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(stored).all())
