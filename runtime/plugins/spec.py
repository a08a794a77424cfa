"""Names, versions, tensors and attributes of the plugins: the one place that export, loader, C++ and tests agree with.

A plugin node stands in the ONNX graph under :data:`DOMAIN` with a *function* body of standard operators, so that any
runtime can execute the graph. TensorRT finds the plugin by the node's type and its attributes ``plugin_version`` and
``plugin_namespace``; the C++ creator reports the same names (a test compares them).
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "stiv"
"""Domain of the nodes and functions in ONNX, and TensorRT's plugin namespace."""
VERSION = "1"
HEAD_DIMS = (32, 48, 64, 72, 96, 128)
"""Head sizes that the kernels are compiled for."""
MAX_FRAMES = 64
"""Most token frames of the temporal kernel."""


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: shape in symbols, types as ONNX names them, ``x`` being the type of the first input."""

    name: str
    shape: tuple[str, ...]
    type: Literal["x", "float32", "x or float8_e4m3"]
    optional: bool = False


@dataclass(frozen=True)
class AttributeSpec:
    """An attribute of the node; ``default`` is what the function body has where the node does not say."""

    name: str
    kind: Literal["int", "float"]
    default: float | None = None


@dataclass(frozen=True)
class PluginSpec:
    """One plugin."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]


_NORM_AND_ROPE = (
    TensorSpec("q_gamma", ("Dh",), "x"),
    TensorSpec("k_gamma", ("Dh",), "x"),
)
_COMMON = (AttributeSpec("heads", "int"), AttributeSpec("epsilon", "float", 1e-6))

TEMPORAL_ATTENTION = PluginSpec(
    name="StivTemporalAttention",
    inputs=(
        TensorSpec("qkv", ("B", "T", "S", "3*H*Dh"), "x"),
        TensorSpec("bias", ("3*H*Dh",), "x"),
        *_NORM_AND_ROPE,
        TensorSpec("cos", ("T", "Dh/2"), "x"),
        TensorSpec("sin", ("T", "Dh/2"), "x"),
        TensorSpec("output_scale", (), "float32", optional=True),
    ),
    outputs=(TensorSpec("y", ("B", "T", "S", "H*Dh"), "x or float8_e4m3"),),
    attributes=_COMMON,
)
"""Bias, per-head RMS QK-norm, 1D RoPE, softmax(q k^T / sqrt(Dh)) v over the frames of each position, on packed qkv.

With ``output_scale`` the output is FP8 E4M3, x / scale rounded and saturated.
"""

SPATIAL_QKV = PluginSpec(
    name="StivSpatialQkv",
    inputs=(
        TensorSpec("qkv", ("N", "S", "3*H*Dh"), "x"),
        TensorSpec("bias", ("3*H*Dh",), "x"),
        *_NORM_AND_ROPE,
        TensorSpec("cos", ("S", "Dh/2"), "x"),
        TensorSpec("sin", ("S", "Dh/2"), "x"),
        TensorSpec("q_scale", (), "float32", optional=True),
        TensorSpec("k_scale", (), "float32", optional=True),
        TensorSpec("v_scale", (), "float32", optional=True),
    ),
    outputs=tuple(TensorSpec(name, ("N", "H", "S", "Dh"), "x or float8_e4m3") for name in ("q", "k", "v")),
    attributes=(*_COMMON, AttributeSpec("query_scale", "float", 1.0)),
)
"""Bias, per-head RMS QK-norm, 2D RoPE and the layout change before the runtime's own spatial attention (N = B * T).

``query_scale`` multiplies q before it is written. With the three scales the outputs are FP8 E4M3.
"""

PLUGINS = (TEMPORAL_ATTENTION, SPATIAL_QKV)
