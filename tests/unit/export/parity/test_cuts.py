"""Where a graph is cut, and the pieces between: on graphs written by hand."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import parser

from stiv_deploy.export.graphs.passes import NAME_SCOPES
from stiv_deploy.export.parity.cuts import CutGraph, Ends, Piece

BODY = """
    <ir_version: 11, opset_import: ["": 23]>
    small (float[rows, 4] x, float[rows, 4] mask) => (float[n, 2] y)
    <float[4, 4] w = {1,2,0,0, 0,1,0,0, 0,0,1,0, 3,0,0,1}, float[4] b = {1,2,3,4}, int64[1] last = {-1},
     int64[1] two = {2}>
    {
        shape = Shape<start = 0, end = 1>(x)
        count = Mul(shape, two)
        halves = Concat<axis = 0>(count, two)
        before = Add(x, mask)
        product = MatMul(before, w)
        inner = Add(product, b)
        after = Relu(inner)
        sum = Add(after, x)
        y = Reshape(sum, halves)
    }
"""
SCOPES = {"product": ["part", "part.linear"], "inner": ["part", "part.linear"], "after": ["part"]}


def small(folder: Path, scopes: dict[str, list[str]] = SCOPES) -> CutGraph:
    model = parser.parse_model(BODY)
    for node in model.graph.node:
        if node.output[0] in scopes:
            node.metadata_props.add(key=NAME_SCOPES, value=str(scopes[node.output[0]]))
    onnx.save(model, folder / "small.onnx")
    return CutGraph(folder / "small.onnx", {"x": (3, 4), "mask": (3, 4)})


def test_a_module_is_cut_where_one_float_enters_and_one_leaves(tmp_path: Path) -> None:
    cut = small(tmp_path)
    assert cut.ends(["part.linear", "absent"]) == {"part.linear": Ends("before", "inner")}
    assert cut.values["inner"] == ("float32", (3, 4))
    assert "w" not in cut.values


def test_a_module_with_two_floats_on_a_side_is_left_in_what_is_around_it(tmp_path: Path) -> None:
    two_in = small(tmp_path, {"before": ["part"]})
    assert two_in.ends(["part"]) == {}
    two_out = small(tmp_path, {"before": ["part"], "product": ["part"], "sum": ["part"]})
    assert two_out.ends(["part"]) == {}


def test_pieces_lie_between_the_cuts_and_have_the_names_of_their_modules(tmp_path: Path) -> None:
    cut = small(tmp_path)
    assert cut.pieces(cut.ends(["part.linear"])) == [
        Piece("before", "", "part.linear", ("Add",), ("mask", "x")),
        Piece("inner", "part.linear", "", ("MatMul", "Add"), ("before",)),
        Piece("y", "part", "y", ("Relu", "Add", "Reshape"), ("inner", "x")),
    ]


def test_sizes_are_numbers_in_every_piece_and_pieces_compute_what_the_whole_does(tmp_path: Path) -> None:
    cut = small(tmp_path)
    assert "Shape" not in {node.op_type for node in cut.nodes}
    values = {name: np.arange(12, dtype=np.float32).reshape(3, 4) - shift for shift, name in enumerate(("x", "mask"))}
    (whole,) = run(cut.whole(), values)
    for piece in cut.pieces(cut.ends(["part.linear"])):
        model = cut.model_of(piece)
        onnx.checker.check_model(model, full_check=True)
        (values[piece.value],) = run(model, {name: values[name] for name in piece.inputs})
    assert np.array_equal(values["y"], whole)
    assert whole.shape == (6, 2)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


QUANTIZED = """
    <ir_version: 11, opset_import: ["": 23]>
    shared (float[2, 4] x) => (float[2, 4] y)
    <float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float scale = {0.5}, int8 zero = {0}>
    {
        codes = QuantizeLinear(x, scale, zero)
        values = DequantizeLinear(codes, scale, zero)
        one = MatMul(values, w)
        two = MatMul(values, w)
        y = Add(one, two)
    }
"""


def test_modules_that_share_8_bits_are_not_parted(tmp_path: Path) -> None:
    model = parser.parse_model(QUANTIZED)
    scopes = {"codes": "one", "values": "one", "one": "one", "two": "two"}
    for node in model.graph.node:
        if node.output[0] in scopes:
            node.metadata_props.add(key=NAME_SCOPES, value=str([scopes[node.output[0]]]))
    onnx.save(model, tmp_path / "shared.onnx")
    cut = CutGraph(tmp_path / "shared.onnx", {"x": (2, 4)})
    assert cut.ends(["one", "two"]) == {}
    (piece,) = cut.pieces({})
    assert piece.quantized
