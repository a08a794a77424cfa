"""The table of a VAE's precisions: how a row is measured, and TF32 as it is emulated."""

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("vae_precisions")


def test_tf32_has_10_bits_of_mantissa(script: ModuleType) -> None:
    values = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11, 3e38, 0.0])
    wanted = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-10, 1.0, -1 - 2.0**-10, 3e38, 0.0])
    assert torch.allclose(script.as_tf32(values), wanted, rtol=2.0**-11 * 1.01, atol=0)
    assert torch.equal(script.as_tf32(values)[:5], wanted[:5])


def test_a_module_in_tf32_is_left_as_it_was(script: ModuleType) -> None:
    layer, x = torch.nn.Conv2d(2, 2, 1), torch.randn(1, 2, 4, 4)
    weight, before = layer.weight.clone(), layer(x)
    with script.InTf32(layer):
        assert not torch.equal(layer(x), before)
        assert torch.allclose(layer(x), before, atol=1e-2)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), before)


def test_a_row_counts_levels(script: ModuleType) -> None:
    truth = np.zeros((1, 2, 3, 2, 2), np.float32)
    video = truth.copy()
    video[0, 0, 0, 0, 0] = 2 / 127.5
    found = script.row("bfloat16", video, truth)
    assert found["largest_levels"] == 2
    for counted in ("equal_values_percent", "within_one_level_percent"):
        assert found[counted] == pytest.approx(100 * 23 / 24, abs=0.01)
    assert found["frames_within_one_level_percent"] == 50.0
