"""The audit with the real TensorRT-RTX builder, on the CPU, of real bundles in each precision."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stiv_deploy.calibration.layers import Format, model_layers
from stiv_deploy.calibration.plan import default_plan, save_plan
from stiv_deploy.calibration.scales import Provenance, Scales, save_scales, tensor_names
from stiv_deploy.export.audit.audit import AuditReport, AuditRequest, audit_bundle
from stiv_deploy.export.audit.fusion_audit import failures
from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.engine_from_onnx import build_engine
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle, write_manifest
from stiv_deploy.runtime.bundle.contract import SKIP_GRAPHS
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.runtime.tensorrt_library import missing_library
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx"))),
]


def sized(pixels: Range) -> tuple[Bucket, ...]:
    one = Range(min=1, typical=1, max=2)
    return (Bucket(name="default", batch=one, frames=Range(min=1, typical=8, max=8), height=pixels, width=pixels),)


LARGE = sized(Range(min=48, typical=64, max=64))
"""36 to 64 tokens a frame: TensorRT has an FP8 attention kernel from 32 on."""
SMALL = sized(Range(min=16, typical=32, max=32))
"""4 to 16 tokens a frame."""


def quantization(checkpoint: Path, chosen: Format, folder: Path) -> dict[str, Any]:
    """Files of the default plan with spatial attention; all ranges are 4, as fusion asks for types only."""
    opened = open_checkpoint(checkpoint)
    config = opened.config.model
    plan = default_plan(config, chosen)
    attention = [name for name in plan.layers if name.endswith("attention")]
    plan = plan.model_copy(update={"layers": {**plan.layers, **dict.fromkeys(attention, chosen)}})
    provenance = Provenance(
        quantization=chosen, checkpoint=opened.sha256, model=config, recipe={}, prompts="", tools={}
    )
    names = [name for layer in model_layers(config) for name in tensor_names(layer)]
    scales = Scales(provenance=provenance, amax={name: torch.tensor(4.0) for name in names})
    save_scales(folder / "scales.safetensors", scales)
    save_plan(folder / "plan.json", plan)
    return {"format": chosen, "scales": folder / "scales.safetensors", "plan": folder / "plan.json"}


def audited(folder: Path, *sms: str) -> AuditReport:
    manifest = Bundle.open(folder).manifest
    halves = ("spatial_00", "mixed_00") if manifest.halves else ()
    skips = SKIP_GRAPHS if manifest.skips else ()
    return audit_bundle(AuditRequest(bundle=folder, sms=sms, graphs=("block_00", *halves, *skips, "step"), jobs=1))


@pytest.fixture(scope="module", params=["fp8", "int8"])
def bundle_8_bit(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint at sizes where 8-bit attention fuses, with 8-bit attention."""
    folder = tmp_path_factory.mktemp(request.param)
    files = quantization(checkpoint, request.param, folder)
    asked = ExportRequest(
        checkpoint=checkpoint,
        out=folder / "bundle",
        precision="float16",
        buckets=LARGE,
        check=False,
        halves=True,
        **files,
    )
    return export_bundle(asked).bundle


def test_8_bit_bundles_fuse(bundle_8_bit: Path) -> None:
    report = audited(bundle_8_bit, "89", "120")
    assert failures(report.rows) == []
    names = {row.name for row in report.rows}
    assert {"spatial attention", "ffn.down GEMM", "kernels", "float32 GEMMs"} <= names
    assert {engine.target for engine in report.engines} == {"sm89", "sm120"}


def test_fp8_attention_at_few_tokens_is_caught(bundle_8_bit: Path) -> None:
    """The same graph at 4 to 16 tokens a frame: what was one kernel becomes two products and more."""
    bundle = Bundle.open(bundle_8_bit)
    record = bundle.manifest.quantization
    assert record is not None
    write_manifest(bundle_8_bit, bundle.manifest.model_copy(update={"buckets": SMALL}))
    failed = {row.name for row in audited(bundle_8_bit, "89").rows if not row.passed}
    write_manifest(bundle_8_bit, bundle.manifest)
    assert failed == ({"spatial attention", "kernels"} if record.format == "fp8" else set())


def test_bfloat16_fuses_each_attention_and_what_skips_the_blocks_into_one_kernel(
    checkpoint: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"precision": "bfloat16", "buckets": SMALL, "check": False, "skips": True}
    folder = export_bundle(ExportRequest(checkpoint=checkpoint, out=tmp_path / "bundle", **options)).bundle
    report = audited(folder, "89")
    assert failures(report.rows) == []
    found = {row.name: row.found for row in report.rows if row.graph == "block_00"}
    attention = [found[f"{name} attention"] for name in ("spatial", "temporal", "cross")]
    assert attention == ["1 fused kernel, BFloat16"] * 3
    assert [row.found for row in report.rows if row.graph in SKIP_GRAPHS and row.name == "kernels"] == ["1", "1"]
    assert_only_biases_are_lost(folder)


def assert_only_biases_are_lost(folder: Path) -> None:
    """A block with weights as inputs passes, no product's type is another, and no kernel only prepares weights."""
    report = audit_bundle(AuditRequest(bundle=folder, sms=("89",), graphs=("block_00",), jobs=1, shared_plan=True))
    assert failures(report.rows) == []
    counts, *lost = [note.text for note in report.notes]
    assert "kernels, " in counts
    assert lost
    assert all(re.match(r"(\S+)\.Add is not fused into \1\.MatMul, but ", text) for text in lost)


def test_float32_is_audited_without_fused_attention(bundle: Path) -> None:
    report = audited(bundle, "89")
    assert failures(report.rows) == []
    found = {row.name: row.found for row in report.rows if row.graph == "block_00"}
    assert found["spatial attention"] == "not fused"
    assert found["ffn.up GEMM"] == "Float x Float -> Float"


def test_the_step_is_four_kernels(bundle: Path, tmp_path: Path) -> None:
    """Sums over positions, two small ones that end norms, the rest: no guidance plugin (runtime/plugins/README.md)."""
    manifest = Bundle.open(bundle).manifest
    record, report = manifest.graphs["step"], tmp_path / "report.txt"
    job = EngineJob(
        graph="step",
        onnx=str(bundle / record.file.path),
        plan=str(tmp_path / "step.engine"),
        backend="tensorrt-rtx",
        sm="89",
        profiles=tuple(profile(record.spec, manifest.model, bucket) for bucket in manifest.buckets),
        report=str(report),
    )
    build_engine(job)
    assert sum(layer.is_kernel for layer in read_report(report)) == 4
