"""INT8 Q/DQ graphs in ONNX Runtime: integer products, on the unsigned grid, exact to the rounding of their scales."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser

from stiv_deploy.runtime.backends import onnxruntime_int8
from stiv_deploy.runtime.backends.onnxruntime import session_options
from stiv_deploy.runtime.backends.onnxruntime_int8 import EXACT, cpu_flags, keep_products_exact

ROWS, INNER, OUTER = 8, 512, 48
SCALE = 2.0**-7
ROUNDINGS = 3 * 2.0**-24
"""The int32 sum to fp32, the product of the two scales, and the product of both: three roundings of fp32."""
RANDOM = np.random.default_rng(0)


def linear(activation: str, zero: int, weight: np.ndarray, weight_scale: np.ndarray) -> bytes:
    """A graph as the export writes it: Q/DQ on the input, DQ on the weight per output channel."""
    model = parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]>
        g (float[M,{INNER}] x) => (float[M,{OUTER}] y)
        <float scale = {{{SCALE}}}, {activation} zero = {{{zero}}}>
        {{
            q = QuantizeLinear (x, scale, zero)
            d = DequantizeLinear (q, scale, zero)
            w = DequantizeLinear <axis = 1> (weight, weight_scale)
            y = MatMul (d, w)
        }}"""
    )
    arrays = {"weight": weight, "weight_scale": weight_scale}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model.SerializeToString()


def run(model: bytes, x: np.ndarray, options: ort.SessionOptions | None = None) -> np.ndarray:
    options = options or ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def entry(options: ort.SessionOptions, name: str) -> str:
    """Value of a session option; empty if it is not set."""
    try:
        return options.get_session_config_entry(name)
    except RuntimeError:
        return ""


@pytest.fixture
def exact() -> ort.SessionOptions:
    """Options for a CPU without VNNI."""
    options = ort.SessionOptions()
    keep_products_exact(options, frozenset({"avx2"}))
    return options


@pytest.fixture(params=["random", "all at their largest"])
def case(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of x int8 [M, K], weight int8 [K, N], its scales fp32 [N]. The largest codes overflow 16-bit sums."""
    if request.param == "random":
        codes = RANDOM.integers(-128, 128, (ROWS, INNER))
        weight = RANDOM.integers(-127, 128, (INNER, OUTER))
    else:
        codes = np.full((ROWS, INNER), 127)
        weight = np.where(np.arange(OUTER) % 2, 127, -127) * np.ones((INNER, 1), dtype=np.int64)
    scales = RANDOM.uniform(1e-3, 1e-2, OUTER).astype(np.float32)
    return codes.astype(np.int8), weight.astype(np.int8), scales


def test_products_are_those_of_integers(
    case: tuple[np.ndarray, np.ndarray, np.ndarray], exact: ort.SessionOptions
) -> None:
    codes, weight, scales = case
    x = codes * np.float32(SCALE)  # exact: a power of two
    wanted = (codes.astype(np.int64) @ weight.astype(np.int64)) * (SCALE * scales.astype(np.float64))
    here = ort.SessionOptions()
    keep_products_exact(here)
    for options in (here, exact):
        np.testing.assert_allclose(run(linear("int8", 0, weight, scales), x, options), wanted, rtol=ROUNDINGS)


def test_unsigned_activations_have_the_same_grid(case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """What ONNX Runtime does on loading changes no code, tie or clipped value, and so no bit of the result."""
    _, weight, scales = case
    x = RANDOM.standard_normal((ROWS, INNER)).astype(np.float32)
    x[0, :4] = np.array([0.5, 1.5, -0.5, -2.5], dtype=np.float32) * np.float32(SCALE)
    x[1, :2] = 1e3, -1e3
    signed, unsigned = (run(linear(*kind, weight, scales), x) for kind in (("int8", 0), ("uint8", 128)))
    np.testing.assert_array_equal(signed, unsigned)


@pytest.mark.parametrize(("flags", "weight_type"), [({"avx2", "avx512_vnni"}, "INT8"), ({"avx2"}, "UINT8")])
def test_the_optimizer_makes_integer_products(tmp_path: Path, flags: set[str], weight_type: str) -> None:
    if not cpu_flags() & {"avx2"}:
        pytest.skip("these are rewrites for x86 with AVX2")
    weight = RANDOM.integers(-127, 128, (INNER, OUTER)).astype(np.int8)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # a warning that the optimized file is for this machine only
    keep_products_exact(options, frozenset(flags))
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    run(linear("int8", 0, weight, np.full(OUTER, SCALE, dtype=np.float32)), np.zeros((1, INNER), np.float32), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    types = {tensor.name: onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in graph.initializer}
    quantize, product = graph.node
    assert (quantize.op_type, types[quantize.input[2]]) == ("QuantizeLinear", "UINT8")
    assert (product.op_type, types[product.input[1]]) == ("MatMulIntegerToFloat", weight_type)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [({"avx2"}, True), ({"avx2", "avx512f"}, True), ({"avx512_vnni"}, False), ({"avx_vnni"}, False), (set(), True)],
)
def test_exact_unless_known_to_be_fast_and_exact(flags: set[str], wanted: bool) -> None:
    options = ort.SessionOptions()
    keep_products_exact(options, frozenset(flags))
    assert entry(options, EXACT) == ("1" if wanted else "")


@pytest.mark.parametrize(("quantization", "wanted"), [("int8", True), ("fp8", False), (None, False)])
def test_the_backend_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, quantization: Literal["fp8", "int8"] | None, wanted: bool
) -> None:
    monkeypatch.setattr(onnxruntime_int8, "cpu_flags", lambda: frozenset({"avx2"}))
    options = session_options(1, quantization, "float32")
    assert entry(options, EXACT) == ("1" if wanted else "")


def test_cpu_flags(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: none\nflags\t\t: fpu avx2 avx_vnni\n\nprocessor\t: 1\n")
    assert cpu_flags(info) == {"fpu", "avx2", "avx_vnni"}
    assert cpu_flags(tmp_path / "missing") == frozenset()
    (tmp_path / "arm").write_text("Features\t: asimd\n")
    assert cpu_flags(tmp_path / "arm") == frozenset()
