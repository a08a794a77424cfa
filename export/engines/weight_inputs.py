"""ONNX files whose weights become inputs: one plan then serves all graphs that differ in weights only.

Only the standard library and our errors are imported here, so that a builder process starts fast.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stiv_deploy.export.engines.job import Profile, Shape
from stiv_deploy.runtime.errors import BackendError, EngineError, few

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, TensorProto

PLAIN = "build it without --shared-plan"
RANKS = {("RMSNormalization", 1): 4, ("Gemm", 2): 2}
"""Ranks that weights have as inputs, by operator and place: a vector would be reshaped so by a kernel in every run."""


@dataclass(frozen=True, kw_only=True)
class WeightInputs:
    """An ONNX file with its external weights as inputs: the content, and the shapes of these inputs by name.

    ``digest`` (SHA-256, hex) is equal for graphs that differ in weights only.
    """

    model: bytes
    shapes: Mapping[str, Shape]

    @property
    def digest(self) -> str:
        """Hash of the content."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def profile(self) -> Profile:
        """Their entries of an optimization profile: no shape but their own."""
        return {name: (shape, shape, shape) for name, shape in self.shapes.items()}


def weight_inputs(path: Path) -> WeightInputs:
    """The ONNX file ``path`` with all weights of its data file as inputs, called as they are called there.

    Raises :class:`EngineError` for a file that cannot be read, or weights in 8 or 4 bits, :class:`BackendError` without
    the package onnx.
    """
    from stiv_deploy.runtime.bundle.initializers import STORED

    model = _read(path)
    weights = {each.name: each for each in model.graph.initializer if each.external_data}
    small = [name for name, each in weights.items() if each.data_type not in STORED]
    if small:
        raise EngineError(f"{path.name}: {few(small)} is in 8 or 4 bits, which is no engine's input; {PLAIN}")
    return with_inputs(model, weights)


def with_inputs(model: "ModelProto", weights: Mapping[str, "TensorProto"]) -> WeightInputs:
    """``model``, which is changed, with these initializers of it as inputs, whatever their types."""
    shapes = {name: _shape(model.graph, each) for name, each in weights.items()}
    _make_inputs(model.graph, weights, shapes)
    return WeightInputs(model=model.SerializeToString(deterministic=True), shapes=shapes)


def _read(path: Path) -> "ModelProto":
    try:
        import onnx
    except ImportError:
        raise BackendError("weights become inputs by onnx; run: pip install 'stiv-deploy[export]'") from None
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds of DecodeError
        raise EngineError(f"{path.name}: not a readable ONNX file ({error}); export the bundle again") from None


def _shape(graph: "GraphProto", weight: "TensorProto") -> Shape:
    """The weight's own shape, or with ones in front, as all operators that it goes into want it."""
    uses = [
        (node.op_type, index) for node in graph.node for index, name in enumerate(node.input) if name == weight.name
    ]
    shape = tuple(weight.dims)
    ranks = {RANKS.get(use, len(shape)) for use in uses}
    return (1,) * (max(ranks) - len(shape)) + shape if len(ranks) == 1 else shape


def _make_inputs(graph: "GraphProto", weights: Mapping[str, "TensorProto"], shapes: Mapping[str, Shape]) -> None:
    from onnx import helper

    kept = [each for each in graph.initializer if each.name not in weights]
    inputs = [helper.make_tensor_value_info(name, each.data_type, shapes[name]) for name, each in weights.items()]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.input.extend(inputs)
