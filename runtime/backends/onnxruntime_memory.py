"""Memory for ONNX Runtime's bindings: numpy's on the host, and ONNX Runtime's own on a device."""

from functools import cache
from typing import Any, Literal

import numpy as np
import onnxruntime as ort

ALIGNMENT = 64
UINT8 = 2
"""``TensorProto.DataType`` number of bytes."""
Where = Literal["cpu", "cuda"]
"""The kind of device, in ONNX Runtime's words; an index tells which of them."""


def execution_providers(where: Where, device: int) -> list[Any]:
    """ONNX Runtime's providers for sessions there."""
    if where == "cpu":
        return ["CPUExecutionProvider"]
    # TF32 would quietly give a float32 bundle 10-bit mantissas.
    options = {"device_id": str(device), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
    return [("CUDAExecutionProvider", options), "CPUExecutionProvider"]


class HostMemory:
    """A numpy allocation; reads, writes and copies go straight to it."""

    def __init__(self, nbytes: int) -> None:
        raw = np.empty(nbytes + ALIGNMENT, dtype=np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        self.raw = raw[start : start + nbytes]
        self.address = self.raw.ctypes.data

    def write(self, offset: int, data: np.ndarray) -> None:
        """Copy bytes into this memory at ``offset``."""
        self.raw[offset : offset + data.nbytes] = data

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """A copy of ``nbytes`` bytes from ``offset`` on."""
        return self.raw[offset : offset + nbytes].copy()

    def copy(self, offset: int, source: "HostMemory", start: int, nbytes: int) -> None:
        """Copy ``nbytes`` bytes of ``source`` from ``start`` on into this memory at ``offset``."""
        self.raw[offset : offset + nbytes] = source.raw[start : start + nbytes]


class DeviceMemory:
    """An ``OrtValue`` of bytes on a device; parts of it are moved by a graph that copies, within the device."""

    raw = None
    """The host does not see it."""

    def __init__(self, nbytes: int, where: Where, device: int = 0) -> None:
        self.value = ort.OrtValue.ortvalue_from_shape_and_type([max(nbytes, 1)], np.uint8, where, device)
        self.address = self.value.data_ptr()
        self._place = where, device

    def write(self, offset: int, data: np.ndarray) -> None:
        """Copy bytes into this memory at ``offset``."""
        staged = ort.OrtValue.ortvalue_from_numpy(data, *self._place)
        copy_bytes(self.address + offset, staged.data_ptr(), data.nbytes, *self._place)

    def read(self, offset: int, nbytes: int) -> np.ndarray:
        """A copy, on the host, of ``nbytes`` bytes from ``offset`` on."""
        staged = DeviceMemory(nbytes, *self._place)
        copy_bytes(staged.address, self.address + offset, nbytes, *self._place)
        return staged.value.numpy()[:nbytes].copy()

    def copy(self, offset: int, source: "DeviceMemory", start: int, nbytes: int) -> None:
        """Copy ``nbytes`` bytes of ``source`` from ``start`` on into this memory at ``offset``."""
        copy_bytes(self.address + offset, source.address + start, nbytes, *self._place)


def copy_bytes(target: int, source: int, nbytes: int, where: Where, device: int) -> None:
    """Copy between addresses on one device and wait until it is done; they must not overlap."""
    if nbytes == 0:
        return
    session = _copier(where, device)
    binding = session.io_binding()
    binding.bind_input("x", where, device, UINT8, (nbytes,), source)
    binding.bind_output("y", where, device, UINT8, (nbytes,), target)
    session.run_with_iobinding(binding)


@cache
def _copier(where: Where, device: int) -> ort.InferenceSession:
    """A session of the one operator Identity: ONNX Runtime has no copy between addresses of its own."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(identity_graph(), options, providers=execution_providers(where, device))


def identity_graph() -> bytes:
    """The ONNX model ``uint8[n] y = Identity(uint8[n] x)``, written without the package onnx (``onnx.proto``)."""
    elements = _field(1, UINT8) + _field(2, _field(1, _field(2, b"n")))
    x, y = (_field(1, name) + _field(2, _field(1, elements)) for name in (b"x", b"y"))
    node = _field(1, b"x") + _field(2, b"y") + _field(4, b"Identity")
    graph = _field(1, node) + _field(2, b"copy") + _field(11, x) + _field(12, y)
    ir_version, opset = 8, 14
    return _field(1, ir_version) + _field(7, graph) + _field(8, _field(2, opset))


def _field(number: int, value: int | bytes) -> bytes:
    """A protobuf field of a small number (a varint), or of bytes."""
    if isinstance(value, int):
        return bytes((number << 3, value))
    assert len(value) < 128
    return bytes((number << 3 | 2, len(value))) + value
