"""The plugins' function bodies, each as a graph of one node in ONNX Runtime, against an fp64 oracle."""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import Tensor

from stiv_deploy.export.graphs.check import FLOAT32_GATE, FLOOR, HALF_FACTOR, open_session, relative_error
from stiv_deploy.export.graphs.onnx_from_module import (
    OPSET,
)
from stiv_deploy.export.graphs.plugin_functions import plugin_function
from stiv_deploy.runtime.plugins.spec import (
    DOMAIN,
    HEAD_DIMS,
    PLUGINS,
    SPATIAL_QKV,
    TEMPORAL_ATTENTION,
    VERSION,
    PluginSpec,
)
from stiv_deploy.stiv_ref.fused import operators

ONNX_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(ml_dtypes.bfloat16): TensorProto.BFLOAT16,
}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0


# One node with its body, in ONNX Runtime


def model_of(
    spec: PluginSpec, dtype: np.dtype, scaled: bool = False, dequantized: bool = True, **attributes: float
) -> onnx.ModelProto:
    """A model of one node, with symbolic shapes as the specification writes them; FP8 outputs as float32 codes."""
    tensors = [tensor for tensor in spec.inputs if scaled or not tensor.optional]
    kind = ONNX_TYPES[dtype]
    inputs = [
        helper.make_tensor_value_info(each.name, kind if each.type == "x" else TensorProto.FLOAT, each.shape)
        for each in tensors
    ]
    names = [each.name for each in spec.outputs]
    nodes = [helper.make_node(spec.name, [each.name for each in tensors], names, domain=DOMAIN, **attributes)]
    wanted = TensorProto.FLOAT8E4M3FN if scaled else kind
    if scaled and dequantized:
        wanted = TensorProto.FLOAT
        nodes += [helper.make_node("Cast", [name], [f"{name}_codes"], to=wanted) for name in names]
        names = [f"{name}_codes" for name in names]
    outputs = [
        helper.make_tensor_value_info(name, wanted, each.shape) for name, each in zip(names, spec.outputs, strict=True)
    ]
    return helper.make_model(
        helper.make_graph(nodes, "one", inputs, outputs),
        functions=[ir.to_proto(plugin_function(spec, scaled))],
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    )


@dataclass
class Case:
    """Inputs of a node in fp64 that ``dtype`` holds; ``qkv`` [B, T, S, 3, H, Dh], or [N, S, 3, H, Dh] for spatial."""

    spec: PluginSpec
    dtype: np.dtype
    qkv: np.ndarray
    bias: np.ndarray
    q_gamma: np.ndarray
    k_gamma: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    scales: tuple[float, ...] = ()

    @property
    def heads(self) -> int:
        return self.qkv.shape[-2]

    def feed(self) -> dict[str, np.ndarray]:
        names = ("bias", "q_gamma", "k_gamma", "cos", "sin")
        values = {name: getattr(self, name).astype(self.dtype) for name in names}
        packed = self.qkv.reshape(*self.qkv.shape[:-3], -1).astype(self.dtype)
        optional = [each.name for each in self.spec.inputs if each.optional]
        scales = dict(zip(optional, (np.array(scale, np.float32) for scale in self.scales), strict=False))
        return {"qkv": packed, **values, **scales}

    def run(self, **attributes: float) -> list[np.ndarray]:
        model = model_of(self.spec, self.dtype, bool(self.scales), heads=self.heads, **attributes)
        session = open_session(model.SerializeToString())  # type: ignore[arg-type]
        return [value.astype(np.float64) for value in session.run(None, self.feed())]


def make_case(spec: PluginSpec, leading: tuple[int, ...], heads: int, size: int, seed: int, dtype: Any) -> Case:
    """Random values, rounded to ``dtype``; the tables have a row for each frame (temporal) or token (spatial)."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    angles = random.uniform(-np.pi, np.pi, (leading[1], size // 2))
    values = (
        random.standard_normal((*leading, 3, heads, size)),
        0.5 * random.standard_normal(3 * heads * size),
        random.uniform(0.5, 1.5, size),
        random.uniform(0.5, 1.5, size),
        np.cos(angles),
        np.sin(angles),
    )
    return Case(spec, kind, *(value.astype(kind).astype(np.float64) for value in values))


def normed(x: np.ndarray, gamma: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon) * gamma


def turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotate pairs (i, i + Dh / 2) as complex numbers; tables broadcast to ``x`` [..., Dh]."""
    half = x.shape[-1] // 2
    pairs = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)
    return np.concatenate((pairs.real, pairs.imag), -1)


def oracle(case: Case, epsilon: float = 1e-6, query_scale: float = 1.0) -> list[np.ndarray]:
    """What the specification says, in fp64, position by position and head by head."""
    heads, size = case.qkv.shape[-2:]
    x = case.qkv + case.bias.reshape(3, heads, size)
    if case.spec is SPATIAL_QKV:
        cos, sin = case.cos[:, None], case.sin[:, None]  # over [N, S, H, Dh]
        q = turned(normed(x[:, :, 0], case.q_gamma, epsilon), cos, sin) * query_scale
        k = turned(normed(x[:, :, 1], case.k_gamma, epsilon), cos, sin)
        return [each.swapaxes(1, 2) for each in (q, k, x[:, :, 2])]
    y = np.empty((*x.shape[:3], heads, size))
    for batch, position, head in np.ndindex(x.shape[0], x.shape[2], heads):
        q, k, v = x[batch, :, position, :, head].swapaxes(0, 1)  # 3 x [T, Dh]
        q = turned(normed(q, case.q_gamma, epsilon), case.cos, case.sin)
        k = turned(normed(k, case.k_gamma, epsilon), case.cos, case.sin)
        scores = q @ k.T * size**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y[batch, :, position, head] = weights / weights.sum(-1, keepdims=True) @ v
    return [y.reshape(*x.shape[:3], -1)]


heads_and_sizes = {"heads": st.integers(1, 3), "size": st.sampled_from(HEAD_DIMS), "seed": st.integers(0, 2**31)}


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 3), frames=st.integers(1, 9), tokens=st.integers(1, 5), **heads_and_sizes)
def test_temporal_attention_in_float32(batch: int, frames: int, tokens: int, heads: int, size: int, seed: int) -> None:
    case = make_case(TEMPORAL_ATTENTION, (batch, frames, tokens), heads, size, seed, np.float32)
    (found,), (wanted,) = case.run(), oracle(case)
    assert found.shape == wanted.shape == (batch, frames, tokens, heads * size)
    assert relative_error(found, wanted) < FLOAT32_GATE


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 4), tokens=st.integers(1, 9), scale=st.floats(0.05, 2), **heads_and_sizes)
def test_spatial_qkv_in_float32(rows: int, tokens: int, scale: float, heads: int, size: int, seed: int) -> None:
    case = make_case(SPATIAL_QKV, (rows, tokens), heads, size, seed, np.float32)
    for found, wanted in zip(case.run(query_scale=scale), oracle(case, query_scale=scale), strict=True):
        assert found.shape == wanted.shape == (rows, heads, tokens, size)
        assert relative_error(found, wanted) < FLOAT32_GATE


def half_tensors(case: Case) -> list[Tensor]:
    return [torch.from_numpy(value).half() for value in case.feed().values()]


@pytest.mark.parametrize("size", HEAD_DIMS)
def test_bodies_in_float16_are_as_exact_as_torch(size: int) -> None:
    gate = FLOOR[torch.float16]
    for spec, leading in ((TEMPORAL_ATTENTION, (2, 7, 3)), (SPATIAL_QKV, (4, 9))):
        case = make_case(spec, leading, 2, size, 5, np.float16)
        temporal = spec is TEMPORAL_ATTENTION
        plain: Any = operators.temporal_attention if temporal else operators.spatial_qkv
        torchs = plain(*half_tensors(case), case.heads)
        for found, own, wanted in zip(case.run(), (torchs,) if temporal else torchs, oracle(case), strict=True):
            yardstick = relative_error(own.double(), wanted)
            assert relative_error(found, wanted) <= HALF_FACTOR * yardstick + gate < 1e-2


@pytest.mark.parametrize("spec", PLUGINS, ids=lambda spec: spec.name)
def test_attributes_reach_the_body(spec: PluginSpec) -> None:
    """Heads by the shapes above; epsilon at a size that shows; what has a default may be left out."""
    case = make_case(spec, (2, 3, 2)[: len(spec.inputs[0].shape) - 1], 2, 32, 3, np.float32)
    large = case.run(epsilon=0.5)
    assert all(relative_error(*pair) < FLOAT32_GATE for pair in zip(large, oracle(case, epsilon=0.5), strict=True))
    assert relative_error(large[0], oracle(case)[0]) > 1e-3
    defaults = {each.name: each.default for each in spec.attributes if each.default is not None}
    assert all(np.array_equal(*pair) for pair in zip(case.run(), case.run(**defaults), strict=True))


def nearest_codes(exact: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(exact / scale, -LARGEST, LARGEST).astype(FP8).astype(np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("spec", "leading", "scales"),
    [(TEMPORAL_ATTENTION, (2, 5, 3), (0.0078125,)), (SPATIAL_QKV, (3, 7), (0.001, 0.011, 0.0173))],
    ids=lambda value: getattr(value, "name", None),
)
def test_scales_make_fp8(spec: PluginSpec, leading: tuple[int, ...], scales: tuple[float, ...], dtype: Any) -> None:
    """Each output by its own scale, saturated; nearly all codes are the nearest, as values at a tie may round away."""
    case = replace(make_case(spec, leading, 2, 32, 1, dtype), scales=tuple(float(dtype(scale)) for scale in scales))
    attributes = {"query_scale": 32**-0.5} if spec is SPATIAL_QKV else {}
    for found, exact, scale in zip(case.run(**attributes), oracle(case, **attributes), case.scales, strict=True):
        wanted = nearest_codes(exact, scale)
        assert np.mean(found != wanted) < (0.005 if dtype == np.float32 else 0.05)
        arithmetic = 4 * np.finfo(dtype).eps * np.abs(exact).max() / scale
        steps = np.maximum(np.abs(wanted) * 2.0**-3, 2.0**-9) + arithmetic
        assert np.all(np.abs(found - wanted) <= steps), "a neighbour at most"
    if spec is SPATIAL_QKV:
        assert np.abs(case.run(**attributes)[0]).max() == LARGEST, "the small scale saturates"


@pytest.mark.parametrize("dtype", ONNX_TYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spec", PLUGINS, ids=lambda spec: spec.name)
def test_types_and_ranks_are_inferred_through_the_body(spec: PluginSpec, scaled: bool, dtype: np.dtype) -> None:
    model = model_of(spec, dtype, scaled, dequantized=False, heads=4)
    onnx.checker.check_model(model, full_check=True)
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value, output in zip(inferred.graph.output, spec.outputs, strict=True):
        assert value.type.tensor_type.elem_type == (TensorProto.FLOAT8E4M3FN if scaled else ONNX_TYPES[dtype])
        assert len(value.type.tensor_type.shape.dim) == len(output.shape)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spec", PLUGINS, ids=lambda spec: spec.name)
def test_functions_have_the_signature_of_the_specification(spec: PluginSpec, scaled: bool) -> None:
    function = ir.to_proto(plugin_function(spec, scaled))
    assert (function.name, function.domain) == (spec.name, DOMAIN)
    assert list(function.input) == [each.name for each in spec.inputs if scaled or not each.optional]
    assert list(function.output) == [each.name for each in spec.outputs]
    assert [(each.domain, each.version) for each in function.opset_import] == [("", OPSET)]
    assert list(function.attribute) == [each.name for each in spec.attributes if each.default is None]
    defaults = {each.name: helper.get_attribute_value(each) for each in function.attribute_proto}
    wanted: dict[str, object] = {
        each.name: pytest.approx(each.default) for each in spec.attributes if each.default is not None
    }
    assert defaults == wanted | {"plugin_version": VERSION.encode(), "plugin_namespace": DOMAIN.encode()}
    assert not {node.domain for node in function.node} - {""}, "standard operators only"
    names = [node.name for node in function.node]
    assert len(set(names)) == len(names)
