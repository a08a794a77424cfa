import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from stiv_deploy.calibration.layers import model_layers
from stiv_deploy.calibration.report import RangeReport, make_report, report_paths, save_report
from stiv_deploy.calibration.scales import Scales

if TYPE_CHECKING:
    from conftest import Calibrated


def test_figures_are_those_of_statistics_and_weights(calibrated: "Calibrated") -> None:
    scales = calibrated.scales("int8", per_channel=True)
    report = make_report(calibrated.checkpoint.model, calibrated.statistics, scales)
    (row,) = [each for each in report.activations if each.layer == "block_01.ffn.up"]
    seen = calibrated.statistics["block_01.ffn.up.input"]
    assert list(row.amax.values()) == [*seen.amax[:5].amax(1).tolist(), None]
    assert row.range == seen.amax.max()
    assert row.clipped == 0
    assert row.outlier == pytest.approx(float(seen.largest.max() / seen.largest.median()))
    (weight,) = [each for each in report.weights if each.layer == "block_01.ffn.up"]
    rows = calibrated.checkpoint.model.blocks[1].ffn.up.weight.abs().amax(1)
    assert (weight.smallest, weight.median, weight.largest) == (rows.min(), rows.median(), rows.max())
    assert weight.ranges == 128


def test_clipping_is_reported(calibrated: "Calibrated") -> None:
    scales = calibrated.scales("int8")
    name = "block_00.spatial.attention.k"
    half = Scales(provenance=scales.provenance, amax={**scales.amax, name: scales.amax[name] / 2})
    report = make_report(calibrated.checkpoint.model, calibrated.statistics, half)
    clipped = {f"{row.layer}.{row.operand}": row.clipped for row in report.activations}
    assert 0 < clipped.pop(name) < 0.5
    assert not any(clipped.values())


def test_smoothquant_is_in_the_figures(calibrated: "Calibrated") -> None:
    plain, smooth = (
        make_report(
            calibrated.checkpoint.model,
            calibrated.statistics,
            calibrated.scales("int8", per_channel=True, smooth=alpha),
        )
        for alpha in (None, 1.0)
    )
    for before, after in zip(plain.activations, smooth.activations, strict=True):
        if after.operand == "input":
            assert after.outlier == pytest.approx(1.0, rel=1e-5)
            assert before.outlier >= 1
            values = [value for value in after.amax.values() if value is not None]
            assert max(values) == pytest.approx(after.range, rel=1e-5)
        else:
            assert after == before


def test_files_lie_beside_the_scales_and_name_every_layer(calibrated: "Calibrated", tmp_path: Path) -> None:
    report = make_report(calibrated.checkpoint.model, calibrated.statistics, calibrated.scales("fp8"))
    save_report(tmp_path / "scales.safetensors", report)
    as_json, as_table = report_paths(tmp_path / "scales.safetensors")
    assert (as_json.name, as_table.name) == ("scales.report.json", "scales.report.md")
    assert RangeReport.model_validate(json.loads(as_json.read_text())) == report
    table = as_table.read_text()
    for layer in model_layers(calibrated.checkpoint.model.config):
        assert f"| {layer.name} |" in table
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((as_json.name, as_table.name))
    assert torch.isfinite(torch.tensor([row.range for row in report.activations])).all()
