"""The comparison of formats: one run's statistics give each its own ranges."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from stiv_deploy.calibration.collect import CalibrationSettings, observed_model
from stiv_deploy.calibration.layers import model_layers
from stiv_deploy.calibration.observers import BANDS
from stiv_deploy.stiv_ref.checkpoint import load_checkpoint


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("format_errors")


def test_every_format_has_the_ranges_of_its_own_calibrator(script: ModuleType) -> None:
    """FP8 and NVFP4 have the largest magnitude that was seen, INT8 a percentile and a range for each channel."""
    checkpoint = load_checkpoint(script.CHECKPOINT)
    _, _, statistics = observed_model(checkpoint.model, True)
    linears = [layer for layer in model_layers(checkpoint.config.model) if layer.kind == "linear"]
    for statistic in statistics.values():
        statistic(torch.linspace(-3, 2, 4 * 160).reshape(4, 160))
    found = {name: script.scales_of(checkpoint, statistics, name, CalibrationSettings()) for name in script.FORMATS}
    name = linears[0].name
    assert found["fp8"].amax[f"{name}.input"] == found["nvfp4"].amax[f"{name}.input"] == 3
    assert found["int8"].amax[f"{name}.input"] < 3.1
    dims = {each: scales.amax[f"{name}.weight"].dim() for each, scales in found.items()}
    assert dims == {"fp8": 0, "int8": 1, "nvfp4": 0}


def test_the_table_has_a_column_for_each_band(script: ModuleType) -> None:
    text = script.table({"fp8": {"velocity": (0.1,) * BANDS, "latents": 0.02}})
    assert {line.count("|") for line in text.splitlines()} == {BANDS + 3}
    assert text.endswith("| 0.100 | 0.020 |")
