"""Running a piece of a graph in ONNX Runtime, and what bfloat16 needs for that."""

from collections.abc import Iterable

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.parity.cuts import QUANTIZERS
from stiv_deploy.export.parity.reproduction import Reproduction, Wrong
from stiv_deploy.runtime.backends.onnxruntime import set_quantization
from stiv_deploy.runtime.backends.onnxruntime_int8 import EXACT
from stiv_deploy.runtime.backends.onnxruntime_memory import execution_providers
from stiv_deploy.runtime.bundle.card import FP8_OPTION
from stiv_deploy.runtime.bundle.contract import Format, Precision
from stiv_deploy.runtime.errors import one_line

UNFIT_FOR_8_BITS = ("MatMulAddFusion",)
"""ONNX Runtime's (1.31) passes that break 8-bit products where shapes are known: a reshape gets between Q and DQ."""
TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "softmax_precision")
"""Attributes of operators that name an element type."""


class Pieces:
    """Runs models on the backend called ``backend``, where that is ONNX Runtime, else on its CPU.

    The CPU has no bfloat16 kernels: there such a model computes in float32, with the very weights that it has.
    """

    def __init__(self, backend: str, quantization: Format | None, precision: Precision) -> None:
        self.on_gpu = backend == "onnxruntime-cuda"
        self._options = onnxruntime.SessionOptions()
        self._options.log_severity_level = 3
        set_quantization(self._options, quantization, precision)
        self._half = precision == "bfloat16"
        self._settings = settings_of(quantization, precision)
        self._disabled: tuple[str, ...] = () if quantization in (None, "nvfp4") else UNFIT_FOR_8_BITS
        self.providers = execution_providers("cuda" if self.on_gpu else "cpu", 0)

    @property
    def where(self) -> str:
        """In words."""
        return "onnxruntime-cuda" if self.on_gpu else "onnxruntime, in float32" if self._half else "onnxruntime"

    def __call__(self, model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs of ``model``; :class:`ExportError` where it does not run."""
        if self._half:
            model = with_float_ends(model) if self.on_gpu else widened(model)
        try:
            return self._run(model, inputs)
        except Exception as error:  # pybind's kinds differ by fault
            reason = one_line(str(error).splitlines()[0], 200)
            outputs = ", ".join(value.name for value in model.graph.output)
            raise ExportError(
                f"what computes {outputs} does not run alone in ONNX Runtime ({reason}); please report this"
            ) from error

    def _run(self, model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), self._options, providers=self.providers, disabled_optimizers=self._disabled
        )
        found: list[np.ndarray] = session.run(None, inputs)
        return found

    def reproduction(self, wrong: Wrong, text: str) -> Reproduction:
        """``wrong`` for others to run, with what it needs."""
        model, inputs, expected, bounds = wrong
        quantized = any(node.op_type in QUANTIZERS for node in model.graph.node)
        return Reproduction(
            model=with_float_ends(model),
            inputs=inputs,
            expected=expected,
            bounds=bounds,
            text=text,
            options=self._settings if quantized else {},
            disabled=self._disabled if quantized else (),
            providers=("CUDAExecutionProvider", "CPUExecutionProvider") if self.on_gpu else ("CPUExecutionProvider",),
        )


def settings_of(quantization: Format | None, precision: Precision) -> dict[str, str]:
    """What :func:`~stiv_deploy.runtime.backends.onnxruntime.set_quantization` sets, for a CPU of any kind."""
    if quantization in (None, "nvfp4"):
        return {}
    return {EXACT if quantization == "int8" and precision == "float32" else FP8_OPTION: "1"}


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` with float32 in the place of bfloat16."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in TYPE_ATTRIBUTES and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    for value in _half_values([*graph.input, *graph.output, *graph.value_info]):
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    return wide


def with_float_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of ``model`` whose bfloat16 inputs and outputs are float32, which numpy has, and are cast inside."""
    ends = onnx.ModelProto()
    ends.CopyFrom(model)
    graph = ends.graph
    names = {value.name for value in _half_values([*graph.input, *graph.output])}
    for node in graph.node:
        node.input[:] = [f"{name}.half" if name in names else name for name in node.input]
        node.output[:] = [f"{name}.half" if name in names else name for name in node.output]
    for value in _half_values(graph.input):
        graph.node.insert(0, helper.make_node("Cast", [value.name], [f"{value.name}.half"], to=TensorProto.BFLOAT16))
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in _half_values(graph.output):
        graph.node.append(helper.make_node("Cast", [f"{value.name}.half"], [value.name], to=TensorProto.FLOAT))
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    for value in list(graph.value_info):
        if value.name in names:
            graph.value_info.remove(value)
    return ends


def _half_values(values: Iterable[onnx.ValueInfoProto]) -> list[onnx.ValueInfoProto]:
    return [value for value in values if value.type.tensor_type.elem_type == TensorProto.BFLOAT16]
