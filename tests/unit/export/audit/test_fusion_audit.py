"""The fusion audit on recorded reports: it passes what fused, and each way not to fuse fails with its name."""

from dataclasses import replace
from pathlib import Path

import pytest

from stiv_deploy.export.audit.fusion_audit import (
    BLOCK_LINEARS,
    AuditRow,
    Choice,
    Expectation,
    audit_graph,
    expectation,
    expected_fusions,
    failures,
)
from stiv_deploy.export.audit.layer_report import EngineLayer, parse_report, read_report
from stiv_deploy.runtime.bundle.bundle import read_manifest
from stiv_deploy.runtime.bundle.contract import Precision
from stiv_deploy.runtime.bundle.manifest import Manifest, QuantizationRecord

REPORTS = Path(__file__).parent / "reports"
SMALL = "{ Name: s, Dimensions: [1], Datatype: Float }"


def expect(choice: Choice = "fp8", spatial: Choice = "fp8", linears: tuple[str, ...] = BLOCK_LINEARS) -> Expectation:
    return Expectation(
        graph="block_00",
        precision="float16",
        quantization=None if choice == "high" else choice,
        choices=dict.fromkeys(linears, choice),
        attention={"spatial": spatial, "temporal": "high", "cross": "high"},
        temporal=True,
    )


def failed(layers: tuple[EngineLayer, ...], expected: Expectation) -> dict[str, str]:
    """What the audit does not let pass: names, and what was found."""
    rows = audit_graph(layers, expected, "sm89", "default")
    return {row.name: row.found for row in rows if not row.passed}


@pytest.fixture
def fused() -> tuple[EngineLayer, ...]:
    """A block of width 1152 with FP8 linears and FP8 spatial attention, as TensorRT-RTX reported it."""
    return read_report(REPORTS / "rtx_fp8.txt")


def edited(layers: tuple[EngineLayer, ...], node: str, **changes: object) -> tuple[EngineLayer, ...]:
    """The report with another product or attention in the place of the one that computes ``node``."""
    chosen = [layer for layer in layers if node in layer.nodes and (layer.is_product or layer.is_attention)]
    assert len(chosen) == 1
    return tuple(replace(layer, **changes) if layer is chosen[0] else layer for layer in layers)


def typed(layer: EngineLayer, field: str, dtype: str) -> tuple[object, ...]:
    return tuple(replace(tensor, dtype=dtype) for tensor in getattr(layer, field))


def product(layers: tuple[EngineLayer, ...], node: str) -> EngineLayer:
    return next(layer for layer in layers if node in layer.nodes and layer.is_product)


def test_what_fused_passes(fused: tuple[EngineLayer, ...]) -> None:
    rows = audit_graph(fused, expect(), "sm89", "default")
    assert failures(rows) == []
    assert {row.name for row in rows} == {
        *(f"{linear} GEMM" for linear in BLOCK_LINEARS),
        *(f"{name} attention" for name in ("spatial", "temporal", "cross")),
        "float32 GEMMs",
        "kernels",
    }
    assert next(row.found for row in rows if row.name == "spatial attention") == "1 fused kernel, FP8"


def test_products_of_4_bits_are_told_from_weights_of_4_bits() -> None:
    """A block of width 128 for SM 120. With its activations not quantized, all products are in 16 bits."""
    expected = expect("nvfp4", "high").model_copy(update={"precision": "bfloat16"})
    assert failed(read_report(REPORTS / "rtx_nvfp4.txt"), expected) == {}
    found = failed(read_report(REPORTS / "rtx_nvfp4_weights_only.txt"), expected)
    assert found == {f"{linear} GEMM": "BFloat16 x BFloat16 -> BFloat16" for linear in BLOCK_LINEARS}


def test_unfused_attention_fails_with_its_name() -> None:
    """Recorded at 1 to 64 tokens a frame: below 32, TensorRT makes two FP8 products and a softmax of it."""
    found = failed(read_report(REPORTS / "rtx_fp8_unfused.txt"), expect())
    assert found == {"spatial attention": "not fused: FP8 x FP8 GEMM + FP8 x FP8 GEMM"}


def test_attention_in_16_bits_where_the_plan_says_8(fused: tuple[EngineLayer, ...]) -> None:
    attention = next(layer for layer in fused if layer.is_attention)
    slow = tuple(
        replace(layer, inputs=typed(layer, "inputs", "Half")) if layer is attention else layer for layer in fused
    )
    assert failed(slow, expect()) == {"spatial attention": "1 fused kernel, Half"}
    assert failed(slow, expect(spatial="high")) == {}
    assert failed(fused, expect(spatial="high")) == {"spatial attention": "1 fused kernel, FP8"}


def test_attention_with_one_operand_in_another_type(fused: tuple[EngineLayer, ...]) -> None:
    attention = next(layer for layer in fused if layer.is_attention)
    first, *others = attention.inputs
    mixed = (replace(first, dtype="Half"), *others)
    layers = tuple(replace(layer, inputs=mixed) if layer is attention else layer for layer in fused)
    assert failed(layers, expect()) == {"spatial attention": "1 fused kernel, Half/FP8"}


@pytest.mark.parametrize("linear", BLOCK_LINEARS)
def test_a_linear_that_is_not_8_bit(fused: tuple[EngineLayer, ...], linear: str) -> None:
    layer = product(fused, f"{linear}.MatMul")
    weights_only = edited(fused, f"{linear}.MatMul", inputs=typed(layer, "inputs", "Half"))
    assert failed(weights_only, expect()) == {f"{linear} GEMM": "Half x FP8 -> Half"}
    input_only = edited(fused, f"{linear}.MatMul", constants=typed(layer, "constants", "Half"))
    assert failed(input_only, expect()) == {f"{linear} GEMM": "FP8 x Half -> Half"}
    int8 = edited(fused, f"{linear}.MatMul", inputs=typed(layer, "inputs", "Int8"))
    assert failed(int8, expect()) == {f"{linear} GEMM": "Int8 x FP8 -> Half"}


def test_a_float32_product_fails_twice(fused: tuple[EngineLayer, ...]) -> None:
    layer = product(fused, "ffn.up.MatMul")
    changes = {field: typed(layer, field, "Float") for field in ("inputs", "constants", "outputs")}
    found = failed(edited(fused, "ffn.up.MatMul", **changes), expect())
    assert found == {"ffn.up GEMM": "Float x Float -> Float", "float32 GEMMs": "ffn.up.MatMul"}


def test_a_float32_product_that_the_plan_does_not_name(fused: tuple[EngineLayer, ...]) -> None:
    stray = parse_report(
        "Name: sgemm, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,8], Datatype: Float }], Constants: "
        "[ { Name: w, Dimensions: [8,8], Datatype: Float }], Outputs: [ { Name: y, Dimensions: [-1,8], Datatype: "
        "Float }], TacticName: , StreamId: 0, Metadata: [ONNX Layer: Cast][ONNX Layer: elsewhere.Gemm]",
        "log",
    )
    assert failed((*fused, *stray), expect()) == {"float32 GEMMs": "elsewhere.Gemm"}


def test_a_product_that_writes_float32(fused: tuple[EngineLayer, ...]) -> None:
    """What float32 scales on 16-bit activations do: a float32 result, and a cast of its own."""
    layer = product(fused, "ffn.down.MatMul")
    slow = edited(fused, "ffn.down.MatMul", outputs=typed(layer, "outputs", "Float"))
    assert failed(slow, expect()) == {"ffn.down GEMM": "FP8 x FP8 -> Float"}


def test_a_linear_without_a_product(fused: tuple[EngineLayer, ...]) -> None:
    without = tuple(layer for layer in fused if "cross.q.MatMul" not in layer.nodes)
    assert failed(without, expect()) == {"cross.q GEMM": "no GEMM"}


def test_a_linear_in_two_products(fused: tuple[EngineLayer, ...]) -> None:
    twice = (*fused, product(fused, "cross.q.MatMul"))
    assert failed(twice, expect()) == {"cross.q GEMM": "FP8 x FP8 -> Half + FP8 x FP8 -> Half"}


def test_missing_attention(fused: tuple[EngineLayer, ...]) -> None:
    without = tuple(layer for layer in fused if not any(node.startswith("temporal.") for node in layer.nodes))
    assert failed(without, expect(linears=("ffn.up",))) == {"temporal attention": "not fused: nothing named temporal"}


def test_too_many_kernels(fused: tuple[EngineLayer, ...]) -> None:
    limit = next(row for row in audit_graph(fused, expect(), "sm89", "b") if row.name == "kernels")
    most = int(limit.expected.removeprefix("at most "))
    extra = replace(next(layer for layer in fused if layer.is_kernel and not layer.nodes[0].startswith("s")), nodes=())
    kernels = sum(layer.is_kernel for layer in fused)
    assert failed((*fused, *[extra] * (most - kernels)), expect()) == {}
    assert failed((*fused, *[extra] * (most - kernels + 1)), expect()) == {"kernels": str(most + 1)}


def test_what_launches_nothing_is_no_kernel(fused: tuple[EngineLayer, ...]) -> None:
    rest = next(layer for layer in fused if not layer.is_kernel)
    assert failed((*fused, *[rest] * 100), expect()) == {}


def test_weights_that_a_report_does_not_show(fused: tuple[EngineLayer, ...]) -> None:
    """TensorRT 10 lists no constants; the input's type still tells."""
    bare = tuple(replace(layer, constants=()) for layer in fused)
    assert failed(bare, expect()) == {}
    assert len(failed(bare, expect("int8", "high"))) == len(BLOCK_LINEARS) + 1


def test_a_plan_with_some_layers_high(fused: tuple[EngineLayer, ...]) -> None:
    expected = expect()
    plan = expected.model_copy(update={"choices": {**expected.choices, "ffn.down": "high"}})
    assert failed(fused, plan) == {"ffn.down GEMM": "FP8 x FP8 -> Half"}


def test_each_profile_is_checked_on_its_own(fused: tuple[EngineLayer, ...]) -> None:
    second = tuple(replace(layer, profile=1) for layer in read_report(REPORTS / "rtx_fp8_unfused.txt"))
    rows = audit_graph((*fused, *second), expect(), "sm89", "default")
    assert {(row.name, row.bucket) for row in rows if not row.passed} == {("spatial attention", "default (profile 1)")}


def test_float32_attention_may_be_decomposed(fused: tuple[EngineLayer, ...]) -> None:
    expected = Expectation(
        graph="block_00",
        precision="float32",
        quantization=None,
        choices={},
        attention={"spatial": "high"},
        temporal=True,
    )
    assert failed(fused, expected) == {}


def test_expectations_of_an_unquantized_bundle(words_bundle: Path) -> None:
    manifest = read_manifest(words_bundle)
    expected = expectation(manifest, "block_01")
    assert expected.choices == dict.fromkeys(BLOCK_LINEARS, "high")
    assert expected.attention == dict.fromkeys(("spatial", "temporal", "cross"), "high")
    assert expected.activations == "float32"
    assert expectation(manifest, "step").choices == {}


def quantized(manifest: Manifest, **layers: Choice) -> Manifest:
    record = QuantizationRecord(
        format="fp8", scales="0" * 64, layers={n.replace("__", "."): c for n, c in layers.items()}
    )
    return manifest.model_copy(update={"quantization": record})


def test_expectations_come_from_the_plan(words_bundle: Path) -> None:
    layers: dict[str, Choice] = {
        "block_01__ffn__up": "fp8",
        "block_01__spatial__attention": "fp8",
        "block_02__ffn__down": "fp8",
        "head__head__out": "high",
    }
    manifest = quantized(read_manifest(words_bundle), **layers)
    expected = expectation(manifest, "block_01")
    assert [name for name, choice in expected.choices.items() if choice == "fp8"] == ["ffn.up"]
    assert expected.attention == {"spatial": "fp8", "temporal": "high", "cross": "high"}
    assert expectation(manifest, "head").choices == {"head.out": "high"}


def test_an_image_model_has_no_temporal_attention(words_bundle: Path) -> None:
    manifest = read_manifest(words_bundle)
    image = manifest.model_copy(update={"model": manifest.model.model_copy(update={"temporal": False})})
    expected = expectation(image, "block_00")
    assert set(expected.attention) == {"spatial", "cross"}
    assert not any(name.startswith("temporal") for name in expected.choices)


@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("activations", ["float32", "16-bit"])
@pytest.mark.parametrize(
    ("quantization", "attention"), [(None, "high"), ("fp8", "high"), ("fp8", "fp8"), ("int8", "high"), ("int8", "int8")]
)
def test_the_table_has_a_limit_for_every_kind_of_block(
    temporal: bool, activations: str, quantization: str | None, attention: str
) -> None:
    rows = [
        row
        for row in expected_fusions().kernels
        if (row.graph, row.activations, row.quantization, row.attention, row.temporal)
        == ("block", activations, quantization, attention, temporal)
    ]
    assert len(rows) == 1


def test_failures_say_what_and_where() -> None:
    row = AuditRow(
        target="sm89", bucket="large", graph="block_00", name="ffn.up GEMM", expected="FP8", found="Half", passed=False
    )
    assert failures([row]) == ["block_00: ffn.up GEMM: expected FP8, found Half (sm89, bucket large)"]
    assert failures([row.model_copy(update={"passed": True})]) == []


@pytest.mark.parametrize(
    ("operands", "precision", "found"),
    [
        (("BFloat16", "BFloat16"), "bfloat16", {}),
        (("Float", "Float"), "float32", {}),
        (("Float", "Float"), "bfloat16", {"convolutions": "1 of Float x Float"}),
        (("BFloat16", "Float"), "bfloat16", {"convolutions": "1 of BFloat16 x Float"}),
        (("BFloat16", ""), "bfloat16", {}),  # TensorRT's report, which does not show weights
    ],
)
def test_convolutions_of_the_vae_are_in_its_type(
    operands: tuple[str, str], precision: Precision, found: dict[str, str]
) -> None:
    entering, weight = operands
    constants = f" {{ Name: w, Dimensions: [8,4,3,3], Datatype: {weight} }}" if weight else ""
    line = (
        f"Name: conv, LayerType: correlation, Inputs: [ {{ Name: x, Dimensions: [1,4,8,8], Datatype: {entering} }}], "
        f"Constants: [{constants}], Outputs: [ {{ Name: y, Dimensions: [1,8,8,8], Datatype: {entering} }}], "
        "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: decoder.0.Conv]"
    )
    expected = replace_expectation(expect("high", linears=()), "decoder", precision)
    assert failed(parse_report(line, "here"), expected) == found
    assert failed(parse_report(line.replace(".Conv", ".Mul"), "here"), expected) == {"convolutions": "none"}


def replace_expectation(expected: Expectation, graph: str, precision: Precision) -> Expectation:
    return expected.model_copy(update={"graph": graph, "precision": precision, "attention": {}})
