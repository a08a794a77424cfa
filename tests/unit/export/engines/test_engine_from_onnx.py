"""The real TensorRT-RTX builder, ahead of time and without a GPU, on graphs of a few nodes."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import parser

from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.engines import engine_from_onnx
from stiv_deploy.export.engines.engine_from_onnx import configure, last_error, make_logger, parse, write_hashed
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.export.engines.worker import run
from stiv_deploy.runtime.tensorrt_library import import_tensorrt, missing_library, targets

pytestmark = pytest.mark.skipif(
    missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx"))
)
HEADER = '<ir_version: 10, opset_import: ["": 23]>'
PRODUCT = "g ({type}[N, 8] x) => ({type}[N, N] y) {{ t = Transpose <perm=[1, 0]> (x) y = MatMul (x, t) }}"
ATTENTION = """g ({type}[N, 2, 16, 32] q, {type}[N, 2, 16, 32] k, {type}[N, 2, 16, 32] v) => ({type}[N, 2, 16, 32] y)
    {{ y = Attention (q, k, v) }}"""
QUANTIZED = """g (float[N, 64] x) => (float[N, 64] y) {
    s = Constant <value = float {0.1}> ()
    xq = QuantizeLinear <output_dtype=17> (x, s)
    xd = DequantizeLinear (xq, s)
    t = Transpose <perm=[1, 0]> (xd)
    p = MatMul (xd, t)
    y = MatMul (p, xd)
}"""


def save(path: Path, text: str) -> Path:
    model = parser.parse_model(f"{HEADER} {text}")
    onnx.save(model, path)
    return path


def job(path: Path, shape: tuple[int, ...], sm: str | None = "89", names: str = "x") -> EngineJob:
    limits = ((1, *shape), (2, *shape), (4, *shape))
    return EngineJob(
        graph="g",
        onnx=str(path),
        plan=str(path.with_suffix(".plan")),
        backend="tensorrt-rtx",
        sm=sm,
        profiles=(dict.fromkeys(names, limits),),
    )


@pytest.mark.parametrize("sm", ["86", "89", "120", None])
def test_builds_without_a_gpu(tmp_path: Path, sm: str | None) -> None:
    task = job(save(tmp_path / "g.onnx", PRODUCT.format(type="float")), (8,), sm)
    result = run(task.to_json())
    assert result.error is None
    assert Path(task.plan).stat().st_size == result.bytes > 0
    assert result.sha256 == hashlib.sha256(Path(task.plan).read_bytes()).hexdigest()
    assert result.seconds > 0


def test_a_plan_that_cannot_be_written(tmp_path: Path) -> None:
    task = job(save(tmp_path / "g.onnx", PRODUCT.format(type="float")), (8,))
    result = run(replace(task, plan="/dev/full").to_json())
    assert (result.error, result.unwritten) == (None, "No space left on device")


def test_long_plans_are_hashed_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_from_onnx, "CHUNK", 3)
    for data in (b"", b"abc", b"abcd" * 5):
        assert write_hashed(tmp_path / "plan", memoryview(data)) == hashlib.sha256(data).hexdigest()
        assert (tmp_path / "plan").read_bytes() == data


def test_float32_attention_is_decomposed(tmp_path: Path) -> None:
    """Without the permission the builder refuses: no fused attention kernel exists for fp32."""
    path = save(tmp_path / "g.onnx", ATTENTION.format(type="float"))
    assert run(job(path, (2, 16, 32), names="qkv").to_json()).error is None


def test_bfloat16_attention_builds_fused(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", ATTENTION.format(type="bfloat16"))
    assert run(job(path, (2, 16, 32), names="qkv").to_json()).error is None


def test_layer_report_names_types_and_nodes(tmp_path: Path) -> None:
    """Q/DQ around a product make it an FP8 one: the report says so, and only where it was asked for."""
    task = job(save(tmp_path / "g.onnx", QUANTIZED), (64,))
    assert run(task.to_json()).error is None
    assert not list(tmp_path.glob("*.txt"))
    reported = replace(task, report=str(tmp_path / "report.txt"))
    assert run(reported.to_json()).error is None
    products = [layer for layer in read_report(tmp_path / "report.txt") if layer.is_product]
    assert "FP8 x FP8" in {layer.operands for layer in products}


def test_flags_of_every_build(tmp_path: Path) -> None:
    """A builder's defaults would leave fp32 products 10 bits of mantissa, and memory to the running engine."""
    trt, task = import_tensorrt("tensorrt-rtx"), job(save(tmp_path / "g.onnx", PRODUCT.format(type="float")), (8,))
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    config = configure(trt, builder, parse(trt, builder, logger, Path(task.onnx)), task)
    assert not config.get_flag(trt.BuilderFlag.TF32)
    network = parse(trt, builder, logger, Path(task.onnx))
    assert configure(trt, builder, network, replace(task, tf32=True)).get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), "else RTX cannot be captured in a CUDA graph"
    default = builder.create_builder_config()
    assert default.get_flag(trt.BuilderFlag.TF32), "else clearing it means nothing"
    assert not default.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), "else setting it means nothing"


def test_one_engine_for_several_buckets(tmp_path: Path) -> None:
    task = job(save(tmp_path / "g.onnx", PRODUCT.format(type="float")), (8,))
    two = replace(task, profiles=(task.profiles[0], {"x": ((8, 8), (16, 8), (64, 8))}))
    one_result, two_result = run(task.to_json()), run(two.to_json())
    assert two_result.error is None
    assert two_result.bytes > one_result.bytes


@pytest.mark.parametrize(
    ("text", "sm", "error"),
    [
        (PRODUCT.format(type="bfloat16"), "75", "Cannot compile for target(s) sm75"),
        (QUANTIZED, "80", "Cannot compile for target(s) sm80, because the model contains HW-specific datatypes: fp8"),
        (PRODUCT.format(type="float"), "90", "SM 90 is not one of 75, 80, 86"),
        ("g (float[N, 8] x) => (float[N, 8] y) { y = Elsewhere (x) }", "89", "the ONNX parser refused g.onnx: "),
    ],
    ids=["bf16 on Turing", "fp8 on Ampere", "Hopper", "unknown op"],
)
def test_refusal_is_one_line_in_the_builders_words(tmp_path: Path, text: str, sm: str, error: str) -> None:
    task = job(save(tmp_path / "g.onnx", text), (64,) if text is QUANTIZED else (8,), sm)
    result = run(task.to_json())
    assert error in str(result.error)
    assert "\n" not in str(result.error)
    assert not Path(task.plan).exists()


def test_corrupt_file(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"not a graph" * 50)
    result = run(job(tmp_path / "g.onnx", (8,)).to_json())
    assert str(result.error).startswith("the ONNX parser refused g.onnx: ")
    assert not (tmp_path / "g.plan").exists()


def test_inputs_must_be_the_contracts(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", PRODUCT.format(type="float"))
    result = run(job(path, (8,), names="z").to_json())
    assert result.error == "the graph's inputs are ['x'], the contract's ['z']; export the bundle again"


def test_profile_that_does_not_fit_the_graph(tmp_path: Path) -> None:
    path = save(tmp_path / "g.onnx", PRODUCT.format(type="float"))
    assert "profile" in str(run(job(path, (9,)).to_json()).error)


def test_a_job_that_is_no_job() -> None:
    assert "TypeError" in str(run('{"profiles": []}').error)


def test_worker_process_answers_with_json_only(tmp_path: Path) -> None:
    task = job(save(tmp_path / "g.onnx", PRODUCT.format(type="float")), (8,))
    result = BuilderProcesses().run(task)
    assert result.error is None
    assert Path(task.plan).stat().st_size == result.bytes


def test_builder_process_imports_nothing_heavy() -> None:
    """It starts once for every engine."""
    program = "import sys, stiv_deploy.export.engines.worker; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "onnx", "onnxruntime", "pydantic", "numpy", "typer"} & set(found.stdout.split())


def test_known_targets() -> None:
    known = targets(import_tensorrt("tensorrt-rtx"))
    assert {"86", "89", "120"} <= set(known)
    assert "90" not in known


def test_missing_driver_is_not_the_cause_of_a_failure() -> None:
    driver = ("ERROR", "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)")
    cause = ("ERROR", "Error Code 4:\n  real   cause")
    assert last_error([cause, driver]) == "Error Code 4: real cause"
    assert last_error([("WARNING", "beware"), driver]) == driver[1]
    assert last_error([]) == "the builder gave no reason"
    assert json.loads(job(Path("g.onnx"), (8,)).to_json())["graph"] == "g"
