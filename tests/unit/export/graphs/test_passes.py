import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.export.graphs import passes
from stiv_deploy.runtime.bundle.contract import GraphSpec, TensorSpec


def initializer(name: str, values: np.ndarray) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    return ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)


def model_of(nodes: list[ir.Node], inputs: list[ir.Value], initializers: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(
        inputs, [nodes[-1].outputs[0]], nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="test"
    )
    return ir.Model(graph, ir_version=10)


def float_input(name: str, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


@given(st.from_regex(r"[a-z]+(\.[a-z0-9]+)*", fullmatch=True))
def test_prefix_is_dropped_and_nothing_else(name: str) -> None:
    assert passes.strip_prefix(f"source.{name}") == name
    if name.split(".")[0] != "source":
        assert passes.strip_prefix(name) == name


def test_prefix_alone_is_the_root() -> None:
    assert passes.strip_prefix("source") == ""
    assert passes.strip_prefix("sources.weight") == "sources.weight"


def test_transposes_and_gemms_of_weights_go() -> None:
    x, a, b = float_input("x", "n", 3), initializer("a", np.ones((4, 3))), initializer("b", np.ones((5, 4)))
    turned = ir.node("Transpose", [a], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    gemm = ir.node("Gemm", [product.outputs[0], b], {"transB": 1})
    model = model_of([turned, product, gemm], [x], [a, b])
    assert passes.pretranspose(model.graph, {"a", "b"}) == {"a", "b"}
    assert [node.op_type for node in model.graph] == ["MatMul", "Gemm"]
    assert (list(a.shape), list(b.shape)) == ([3, 4], [4, 5])
    assert gemm.attributes["transB"].as_int() == 0


def test_a_weight_used_both_ways_keeps_its_transpose() -> None:
    x, a = float_input("x", "n", 3), initializer("a", np.ones((3, 3)))
    turned = ir.node("Transpose", [a], {"perm": [1, 0]})
    first = ir.node("MatMul", [x, turned.outputs[0]])
    second = ir.node("MatMul", [first.outputs[0], a])
    model = model_of([turned, first, second], [x], [a])
    assert passes.pretranspose(model.graph, {"a"}) == frozenset()
    assert len(list(model.graph)) == 3


def test_equal_constants_merge_but_equal_parameters_do_not() -> None:
    """Two untrained norms have equal weights; merged, the second would lose its name."""
    x = float_input("x", 2)
    values = [initializer(name, np.ones(2, np.float32)) for name in ("q.weight", "k.weight", "val_1", "val_2")]
    nodes = []
    last = x
    for value in values:
        nodes.append(ir.node("Add", [last, value]))
        last = nodes[-1].outputs[0]
    model = model_of(nodes, [x], values)
    passes.merge_constants(model.graph, {"q.weight", "k.weight"})
    assert sorted(model.graph.initializers) == ["constant_0", "k.weight", "q.weight"]
    assert [node.inputs[1].name for node in model.graph] == ["q.weight", "k.weight", "constant_0", "constant_0"]


def test_simplify_folds_no_parameter() -> None:
    x, scale = float_input("x", 2), initializer("scale", np.full(2, 3, np.float32))
    one, two = initializer("one", np.ones(2, np.float32)), initializer("two", np.full(2, 2, np.float32))
    constant = ir.node("Add", [one, two])
    kept = ir.node("Mul", [scale, constant.outputs[0]])
    result = ir.node("Mul", [x, kept.outputs[0]])
    model = model_of([constant, kept, result], [x], [scale, one, two])
    passes.simplify(model, {"scale"})
    assert [node.op_type for node in model.graph] == ["Mul", "Mul"]
    assert "scale" in model.graph.initializers


def test_masks_are_expanded_along_the_queries() -> None:
    q, k, v = (float_input(name, "b", 2, length, 4) for name, length in (("q", "n"), ("k", "l"), ("v", "l")))
    mask = float_input("mask", "b", 1, 1, "l")
    attention = ir.node("Attention", [q, k, v, mask])
    bare = ir.node("Attention", [attention.outputs[0], k, v])
    model = model_of([attention, bare], [q, k, v, mask], [])
    passes.expand_masks(model.graph)
    assert [node.op_type for node in model.graph] == ["Shape", "Concat", "Expand", "Attention", "Attention"]
    assert attention.inputs[3].producer().inputs[0] is mask


def test_outputs_get_the_contracts_type_by_a_cast() -> None:
    """The exporter promotes half-precision sums to float32 and leaves them so."""
    x = float_input("x", "n")
    node = ir.node("Identity", [x])
    node.outputs[0].dtype = ir.DataType.FLOAT
    model = model_of([node], [x], [])
    tensor = TensorSpec(name="y", dtype="bfloat16", shape=("rows",))
    passes.apply_contract(
        model.graph, GraphSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=("rows",)),), outputs=(tensor,))
    )
    assert [node.op_type for node in model.graph] == ["Identity", "Cast"]
    output = model.graph.outputs[0]
    assert (output.name, output.dtype, str(output.shape)) == ("y", ir.DataType.BFLOAT16, "[rows]")


def test_names_come_from_scopes_and_metadata_goes() -> None:
    x = float_input("x", 2)
    nodes = [ir.node("Relu", [x])]
    nodes.append(ir.node("Relu", [nodes[0].outputs[0]]))
    nodes.append(ir.node("Relu", [nodes[1].outputs[0]]))
    for node in nodes[:2]:
        node.metadata_props[passes.NAME_SCOPES] = "['', 'source', 'source.ffn', 'source.ffn.up', 'relu_7']"
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File /somewhere/block.py"
    model = model_of(nodes, [x], [])
    model.graph.outputs[0].name = "y"
    passes.name_by_scope(model.graph)
    assert [node.name for node in model.graph] == ["ffn.up.Relu", "ffn.up.Relu_2", "Relu"]
    assert [node.outputs[0].name for node in model.graph] == ["ffn.up.Relu", "ffn.up.Relu_2", "y"]
    assert dict(nodes[0].metadata_props) == {passes.NAME_SCOPES: "['ffn', 'ffn.up']"}
    assert not nodes[2].metadata_props


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("float32", "FLOAT"), ("float16", "FLOAT16"), ("bfloat16", "BFLOAT16"), ("int64", "INT64"), ("bool", "BOOL")],
)
def test_types(dtype: str, name: str) -> None:
    assert passes.onnx_type(dtype).name == name  # type: ignore[arg-type]


def test_shapes_are_inferred_across_group_norms() -> None:
    """ONNX infers nothing for this function: without a type of its output a convolution behind it has no shape."""
    x = float_input("x", "s0", 4, "s1", "s2")
    scale, bias = (initializer(name, np.ones(4, np.float32)) for name in ("scale", "bias"))
    kernel = initializer("kernel", np.ones((6, 4, 1, 1), np.float32))
    norm = ir.node("GroupNormalization", [x, scale, bias], {"num_groups": 2, "epsilon": 1e-5})
    convolution = ir.node("Conv", [norm.outputs[0], kernel])
    norm.outputs[0].type, norm.outputs[0].shape = x.type, ir.Shape(["s0", 4, "s1", "s2"])
    model = model_of([norm, convolution], [x], [scale, bias, kernel])
    spec = GraphSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4, "height", "width")),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 6, "height", "width")),),
    )
    passes.apply_contract(model.graph, spec)
    assert norm.outputs[0].shape == ir.Shape([None, 4, None, None])
    proto = ir.to_proto(model)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True)
    assert [dim.dim_value for dim in inferred.graph.output[0].type.tensor_type.shape.dim] == [0, 6, 0, 0]
