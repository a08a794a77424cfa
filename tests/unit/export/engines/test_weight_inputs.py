"""Graphs whose weights became inputs: the same results by ONNX Runtime, equal files for blocks of other weights."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from stiv_deploy.export.engines.weight_inputs import weight_inputs
from stiv_deploy.runtime.errors import EngineError

TEXT = """<ir_version: 10, opset_import: ["": 23]> g (float[2,3,T,4] x) => (float[M,N] out, float[2,3,T,4] normal)
{
    product = MatMul (x, matrix)
    moved = Add (product, vector)
    normal = RMSNormalization <axis=-1> (moved, scale)
    shape = Constant <value_ints=[-1, 4]> ()
    flat = Reshape (normal, shape)
    out = Gemm (flat, matrix, bias)
}"""
SHAPES = {"matrix": (4, 4), "vector": (4,), "scale": (4,), "bias": (4,)}


def written(path: Path, seed: int = 0, *, data_type: int = TensorProto.FLOAT, text: str = TEXT) -> Path:
    """A graph whose weights lie in a file beside it, with one small constant in the graph itself."""
    model, generator = parser.parse_model(text), np.random.default_rng(seed)
    weights = {name: generator.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.save_model(
        model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0, convert_attribute=False
    )
    saved = onnx.load(path, load_external_data=False)
    saved.graph.initializer[0].data_type = data_type
    saved.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "one"))
    onnx.save_model(saved, path)
    return path


def values(path: Path) -> dict[str, np.ndarray]:
    return {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer if each.name in SHAPES}


def test_it_computes_the_same_with_the_weights_bound(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx")
    inputs, x = weight_inputs(path), np.random.default_rng(1).standard_normal((2, 3, 5, 4)).astype(np.float32)
    bound = {name: value.reshape(inputs.shapes[name]) for name, value in values(path).items()}
    ours = ort.InferenceSession(inputs.model, providers=["CPUExecutionProvider"]).run(None, {"x": x, **bound})
    theirs = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert all(np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_inputs_have_names_types_and_shapes_of_the_weights(tmp_path: Path) -> None:
    """A vector that the builder would reshape in every run has its rank before."""
    inputs = weight_inputs(written(tmp_path / "a.onnx"))
    assert inputs.shapes == {"matrix": (4, 4), "vector": (4,), "scale": (1, 1, 1, 4), "bias": (1, 4)}
    assert inputs.profile["bias"] == ((1, 4), (1, 4), (1, 4))
    graph = onnx.load_from_string(inputs.model).graph
    assert [each.name for each in graph.initializer] == ["one"], "what lies in the graph itself stays"
    wanted = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.shapes.items()]
    assert list(graph.input)[1:] == wanted


def test_a_vector_that_is_used_twice_keeps_its_shape(tmp_path: Path) -> None:
    shapes = weight_inputs(written(tmp_path / "a.onnx", text=TEXT.replace("vector", "scale"))).shapes
    assert shapes["scale"] == (4,)


def test_graphs_that_differ_in_weights_only_become_equal(tmp_path: Path) -> None:
    digests = [weight_inputs(written(tmp_path / f"{seed}.onnx", seed)).digest for seed in range(2)]
    other = weight_inputs(written(tmp_path / "other.onnx", text=TEXT.replace("axis=-1", "axis=-1, epsilon=0.5"))).digest
    assert digests[0] == digests[1] != other


def test_weights_in_8_bits(tmp_path: Path) -> None:
    path = written(tmp_path / "a.onnx", data_type=TensorProto.INT8)
    with pytest.raises(EngineError, match=r"^a.onnx: matrix is in 8 or 4 bits, .*; build it without --shared-plan$"):
        weight_inputs(path)


def test_what_is_no_graph(tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_text("graph")
    with pytest.raises(EngineError, match=r"^a.onnx: not a readable ONNX file .*; export the bundle again$"):
        weight_inputs(tmp_path / "a.onnx")
