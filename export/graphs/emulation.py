"""A graph in 16 bits where nothing computes in such: each operator in float32, and its result rounded.

That is what tensor cores do, which add up products in float32. ONNX Runtime has hardly any bfloat16 operators on CPUs,
but it has the casts.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from stiv_deploy.runtime.bundle.contract import Reduced

KINDS: dict[Reduced, int] = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def emulated(path: Path, precision: Reduced) -> onnx.ModelProto:
    """The graph in ``path``, whose ends are float32, as a model of float32 operators and casts, weights included."""
    kind = KINDS[precision]
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    graph = model.graph
    reduced = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == kind}
    nodes = [made for node in graph.node for made in _rounded(node, reduced, kind)]
    for tensor in graph.initializer:
        if tensor.data_type == kind:
            wide = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _rounded(node: onnx.NodeProto, reduced: set[str], kind: int) -> list[onnx.NodeProto]:
    """``node`` in float32, and after it for each of its results in 16 bits the way to the grid and back."""
    made = [node]
    if node.op_type == "Cast" and node.output[0] in reduced:
        next(each for each in node.attribute if each.name == "to").i = TensorProto.FLOAT
    for index, name in enumerate(node.output):
        if name in reduced:
            node.output[index] = f"{name}.exact"
            made.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.grid"], to=kind))
            made.append(helper.make_node("Cast", [f"{name}.grid"], [name], to=TensorProto.FLOAT))
    return made
