"""Pieces in bfloat16, which a CPU has no kernels for and numpy no type."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.parity.pieces import Pieces, widened, with_float_ends

WEIGHTS = np.array([[1, 2], [3, 1.0078125]], dtype=np.float32)
"""All have the 8 bits of a bfloat16."""


def half_model() -> onnx.ModelProto:
    """``y = cast(x) @ w``, where ``x`` is float32, and ``y`` plus ``z`` in bfloat16."""
    half = TensorProto.BFLOAT16
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=half),
        helper.make_node("MatMul", ["cast", "w"], ["product"]),
        helper.make_node("Add", ["product", "z"], ["y"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, kind, [2, 2])
        for name, kind in (("x", TensorProto.FLOAT), ("z", half), ("y", half))
    ]
    weights = numpy_helper.from_array(WEIGHTS.astype(ml_dtypes.bfloat16), "w")
    graph = helper.make_graph(nodes, "half", ends[:2], ends[2:], [weights])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


GIVEN = {"x": np.array([[1, 0], [0, 2]], np.float32), "z": np.array([[0.5, 0], [0, 0]], np.float32)}
RIGHT = GIVEN["x"] @ WEIGHTS + GIVEN["z"]


def test_a_cpu_computes_in_float32_with_the_weights_as_they_are() -> None:
    given = half_model()
    with pytest.raises(Exception, match=r"NOT_IMPLEMENTED|NotImplemented|bfloat16"):
        onnxruntime.InferenceSession(given.SerializeToString(), providers=["CPUExecutionProvider"])
    pieces = Pieces("onnxruntime", None, "bfloat16")
    (found,) = pieces(given, GIVEN)
    assert np.array_equal(found, RIGHT)
    assert pieces.where == "onnxruntime, in float32"
    onnx.checker.check_model(widened(given), full_check=True)
    assert given == half_model(), "the graph itself stays"


def test_ends_in_float32_leave_the_inside_as_it_is() -> None:
    made = with_float_ends(half_model())
    onnx.checker.check_model(made, full_check=True)
    kinds = [value.type.tensor_type.elem_type for value in (*made.graph.input, *made.graph.output)]
    assert kinds == [TensorProto.FLOAT] * 3
    assert [node.op_type for node in made.graph.node] == ["Cast", "Cast", "MatMul", "Add", "Cast"]
    assert made.graph.initializer[0].data_type == TensorProto.BFLOAT16
    (found,) = ReferenceEvaluator(made).run(None, GIVEN)
    assert np.array_equal(found, RIGHT)


def test_a_piece_that_does_not_run_is_told_in_a_line() -> None:
    with pytest.raises(ExportError, match="what computes y does not run alone in ONNX Runtime"):
        Pieces("onnxruntime", None, "float32")(half_model(), GIVEN)


def test_engines_are_stood_in_for_by_onnxruntime() -> None:
    assert Pieces("tensorrt-rtx", None, "float16").where == "onnxruntime"
    assert Pieces("onnxruntime-cuda", None, "float16").where == "onnxruntime-cuda"
