"""Layer reports as TensorRT-RTX and TensorRT write them: recorded logs, JSON, and files that are neither."""

import json
from pathlib import Path

import pytest

from stiv_deploy.export.audit.layer_report import parse_report, read_report, type_name
from stiv_deploy.export.errors import ReportError

REPORTS = Path(__file__).parent / "reports"
# Lines in the form of TensorRT 10: no constants, so that weights are not shown; a prefix where a logger sets one.
TENSORRT = """[11/22/2026-09:00:01] [V] [TRT] Layers:
[V] Name: ffn.up.MatMul_myl0_7, LayerType: gemm, Inputs: [ { Name: ffn_in, Dimensions: [1,40,256], Format/Datatype: FP8 }], Outputs: [ { Name: arg, Dimensions: [1,40,1024], Format/Datatype: Row major linear FP16 format }], TacticName: sm89_xmma_gemm_e4m3e4m3, StreamId: 0, Metadata: [ONNX Layer: ffn.up.MatMul]
Name: _gemm_mha_v2_myl3_6, LayerType: kgen, Inputs: [ { Name: q, Location: Device, Dimensions: [8,64,64], Format/Datatype: BFloat16 }], Outputs: [ { Name: y, Dimensions: [8,64,64], Format/Datatype: BFloat16 }], TacticName: _gemm_mha_v2_0x1, StreamId: 0, Metadata: [ONNX Layer: spatial.Attention]
Name: weights, LayerType: Constant, Inputs: [], Outputs: [ { Name: w, Dimensions: [3], Format/Datatype: Int64 }], ParameterType: Constant, StreamId: 0
"""  # noqa: E501


def test_a_recorded_log_of_tensorrt_rtx() -> None:
    layers = read_report(REPORTS / "rtx_fp8.txt")
    by_node = {node: layer for layer in layers for node in layer.nodes if layer.is_product}
    qkv = by_node["spatial.qkv.MatMul"]
    assert qkv.kind == "gemm"
    assert qkv.operands == "FP8 x FP8"
    assert qkv.inputs[0].shape == (-1, 1152)
    assert [tensor.shape for tensor in qkv.constants] == [(1152, 3456), (1,), (1,)]
    assert qkv.outputs[0].dtype == "Half"
    assert {layer.kind for layer in layers if not layer.is_kernel} == {"shape_call", "signal", "wait"}
    fused = [layer for layer in layers if layer.is_attention]
    assert len(fused) == 3
    assert all(not layer.is_product for layer in fused)
    assert {tensor.dtype for tensor in fused[0].inputs} == {"FP8"}


def test_products_of_two_tensors() -> None:
    layers = read_report(REPORTS / "rtx_fp8_unfused.txt")
    scores = [layer for layer in layers if layer.is_product and not layer.constants[0].is_matrix]
    assert [layer.operands for layer in scores] == ["FP8 x FP8"] * 2


def test_a_log_of_tensorrt() -> None:
    product, attention, constant = parse_report(TENSORRT, "log")
    assert product.is_product
    assert product.operands == "FP8 x ?"
    assert product.outputs[0].dtype == "Half"
    assert product.nodes == ("ffn.up.MatMul",)
    assert product.tactic == "sm89_xmma_gemm_e4m3e4m3"
    assert attention.is_attention
    assert attention.inputs[0].shape == (8, 64, 64)
    assert constant.nodes == ()
    assert (product.is_kernel, constant.is_kernel) == (True, False)


def test_layer_information_as_json() -> None:
    tensors = [{"Name": "x", "Dimensions": [-1, 160], "Format/Datatype": "Int8"}]
    layer = {"Name": "__myl_FcAdd_myl0_1", "LayerType": "runtime_fusion", "Inputs": tensors, "Outputs": tensors}
    text = json.dumps({"Layers": [{**layer, "Metadata": "[ONNX Layer: ffn.up.MatMul]"}], "Bindings": []})
    (found,) = parse_report(text, "layers.json")
    assert found.is_product
    assert found.inputs[0].dtype == "Int8"
    assert found.inputs[0].shape == (-1, 160)
    assert found.nodes == ("ffn.up.MatMul",)


def test_profiles_are_told_apart() -> None:
    """Only some names of the second profile's layers say so."""

    def line(name: str, tensor: str) -> str:
        tensors = f"[ {{ Name: {tensor}, Dimensions: [1], Datatype: Half }}]"
        return f"Name: {name}, LayerType: kgen, Inputs: {tensors}, Outputs: {tensors}, TacticName: , StreamId: 0"

    text = "\n".join(
        [
            line("a_myl0_0", "x"),
            line("b_myl0_1", "y"),
            line("a_myl1_0", "x [profile 1]"),
            line("b_myl1_1", "y") + ", Metadata: [ONNX Layer: spatial.Attention [profile 1]]",
        ]
    )
    layers = parse_report(text, "log")
    assert [layer.profile for layer in layers] == [0, 0, 1, 1]
    assert layers[3].nodes == ("spatial.Attention",)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("Half", "Half"),
        ("BFloat16", "BFloat16"),
        ("Float", "Float"),
        ("FP8", "FP8"),
        ("FP8E4M3", "FP8"),
        ("Row major linear FP16 format", "Half"),
        ("Row major Int8 format", "Int8"),
        ("Row major linear FP32", "Float"),
        ("UInt4", "UInt4"),
    ],
)
def test_type_names(said: str, name: str) -> None:
    assert type_name(said) == name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nothing of the kind\n", "no layers in it"),
        ("", "no layers in it"),
        ('{"Layers": []}', "no layers in it"),
        ('{"Layers": ["not detailed"]}', "--profilingVerbosity=detailed"),
        ('{"Layers": [', "--exportLayerInfo"),
        ('{"rows": []}', "--exportLayerInfo"),
    ],
)
def test_what_is_no_report_is_refused_in_one_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "build.log"
    path.write_text(text)
    with pytest.raises(ReportError) as refused:
        read_report(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot be read"):
        read_report(tmp_path / "nothing.log")
