"""The ladder on quantized bundles of the shipped checkpoint, and that its gates bite."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from stiv_deploy.calibration.collect import CalibrationSettings
from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.plan import PrecisionPlan, default_plan, everything
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.scales import Scales, load_scales
from stiv_deploy.calibration.stage import calibrate
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs.draws import quantized_gate, rel_l2
from stiv_deploy.export.parity.draws import Draws
from stiv_deploy.export.parity.files import Sources, open_subject
from stiv_deploy.export.parity.ladder import climb
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.export.parity.requests import Request, parity_requests
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.manifest import Manifest, QuantizationRecord
from stiv_deploy.runtime.pipeline.verification import VerifyRequest, verify
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint
from stiv_deploy.stiv_ref.sampler import sample

FORMATS: tuple[Format, ...] = ("fp8", "int8")
STEPS = 6
WORSE = 1.2
"""Least ratio of everything's error to the default plan's. Measured on the shipped model 1.40 (fp8) and 1.46 (int8),
with a spread of under 1 % between right implementations; this is half of the excess."""


def calibrated(checkpoint: Path, out: Path, quantization: Format) -> Path:
    """Scales from a short run: twelve steps have one in every timestep band."""
    settings = CalibrationSettings(samples=8, steps=12, batch=4)
    request = CalibrationRequest(checkpoint=checkpoint, quantization=quantization, out=out, settings=settings)
    calibrate(request)
    return out


@pytest.fixture(scope="module")
def scale_files(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    folder = tmp_path_factory.mktemp("scales")
    return {name: calibrated(checkpoint, folder / f"{name}.safetensors", name) for name in FORMATS}


@pytest.mark.slow
def test_fp8_bundle_passes_and_one_with_a_lost_bit_fails(
    checkpoint: Path, scale_files: dict[Format, Path], tmp_path: Path
) -> None:
    files: dict[str, Any] = {"format": "fp8", "scales": scale_files["fp8"]}
    files |= {"precision": "float16", "skips": True, "check": False}
    export_bundle(ExportRequest(checkpoint=checkpoint, out=tmp_path / "good", **files))
    opened = Bundle.open(tmp_path / "good")
    subject = open_subject(opened, Sources(checkpoint=checkpoint, scales=scale_files["fp8"]))
    told: list[tuple[int, int]] = []
    report = climb(subject, ["onnxruntime"], 3, lambda _, done, of: told.append((done, of)))
    assert {done for done, of in told if of == told[-1][1]} == set(range(told[-1][1])), "all that was to be done"
    assert report.passed, [row for row in report.rows if not row.passed]
    levels = {row.level for row in report.rows}
    assert {row.level for row in report.rows if row.name == "ti2v jit ab2, skips"} == {"free_run", "direct_free_run"}
    assert {"residual.residual", "extrapolate.x_out"} <= {row.name for row in report.rows}
    assert {"op", "block", "step", "teacher_forced", "free_run"} <= levels
    assert {"direct_block", "direct_step", "direct_teacher_forced", "direct_free_run"} <= levels
    assert {row.precision for row in report.rows} == {"fp8/float16"}
    assert wrong(opened.folder) == ()

    record = opened.manifest.graphs["block_03"]
    assert record.data is not None
    coarse = bytearray((opened.folder / record.data.path).read_bytes())
    spoil_low_bits(coarse)
    bad = opened.folder / record.data.path
    bad.write_bytes(coarse)
    spoiled = climb(replace(subject, bundle=trusting(opened)), ["onnxruntime"], 2)
    failed = {(row.level, row.name) for row in spoiled.rows if not row.passed}
    assert {name for level, name in failed if level == "block"} == {"block_03"}
    assert ("direct_block", "block_03") in failed
    assert wrong(opened.folder)[0] == "block_03"


def wrong(folder: Path) -> tuple[str, ...]:
    """What 'stiv verify' finds."""
    report = verify(VerifyRequest(bundle=folder, backends=("onnxruntime",), record=False))
    assert not report.unanswered
    (proof,) = report.proofs
    assert sum(row.subject.startswith("sampling") for row in proof.rows) == 14
    return proof.result.failed


def spoil_low_bits(data: bytearray) -> None:
    """Drop the last bit of every byte: of E4M3 weights, nearly all of a block's data, that is one bit of three."""
    for index in range(len(data)):
        data[index] &= 0xFE


def trusting(bundle: Bundle) -> Bundle:
    """``bundle`` with a manifest that believes its files as they are now."""
    from stiv_deploy.runtime.bundle.bundle import file_record, write_manifest

    graphs = {
        name: record.model_copy(update={"data": file_record(bundle.folder, record.data.path)})
        if record.data
        else record
        for name, record in bundle.manifest.graphs.items()
    }
    write_manifest(bundle.folder, bundle.manifest.model_copy(update={"graphs": graphs}))
    return Bundle.open(bundle.folder)


class Walk(NamedTuple):
    """Latents of every step of the float64 reference, and its velocities there."""

    request: Request
    points: list[Tensor]
    true: Tensor


def walk(loaded: Checkpoint, manifest: Manifest) -> Walk:
    request, truth = parity_requests(manifest, loaded, STEPS)[0], Oracle(loaded, torch.float64)
    points: list[Tensor] = []
    velocities: list[Tensor] = []

    def keep(_step: int, before: Tensor, velocity: Tensor) -> None:
        points.append(before)
        velocities.append(velocity)

    sample(truth.boundary, truth.sampling_inputs(request), request.settings, keep)
    return Walk(request, points, torch.cat(velocities))


def errors(loaded: Checkpoint, manifest: Manifest, scales: Scales, plan: PrecisionPlan, along: Walk) -> list[float]:
    record = QuantizationRecord(format=plan.quantization, scales="", layers=dict(plan.layers))
    half = manifest.model_copy(update={"precision": "float16", "quantization": record})
    found = Draws(loaded, half, scales).velocities(along.request, along.points)
    return [rel_l2(each, along.true) for each in found]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", FORMATS)
def test_quantizing_everything_is_worse_and_fails_the_gate_of_the_default_plan(
    bundle: Path, checkpoint: Path, scale_files: dict[Format, Path], quantization: Format
) -> None:
    loaded, manifest = load_checkpoint(checkpoint), Bundle.open(bundle).manifest
    scales, config = load_scales(scale_files[quantization]), loaded.config.model
    along = walk(loaded, manifest)
    default = errors(loaded, manifest, scales, default_plan(config, quantization), along)
    all_layers = errors(loaded, manifest, scales, everything(config, quantization), along)
    assert max(default) <= quantized_gate("float16", default)
    assert min(all_layers) > quantized_gate("float16", default)
    assert min(all_layers) > WORSE * max(default)
