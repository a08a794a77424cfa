from typing import TYPE_CHECKING

import pytest
import torch

from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.ranges import activation_range, ranges_of, smoothing, weight_range
from stiv_deploy.calibration.scales import Provenance, Scales, check_ranges
from stiv_deploy.stiv_ref.block import stateless_norm

if TYPE_CHECKING:
    from conftest import Calibrated

    from stiv_deploy.calibration.collect import CalibrationSettings

WEIGHT = torch.tensor([[1.0, -4.0], [0.5, 0.25], [0.0, 0.0]])


def test_weight_range_is_per_tensor_or_per_output_channel() -> None:
    assert weight_range(WEIGHT, per_channel=False).item() == 4
    assert weight_range(WEIGHT, per_channel=True).tolist() == [4, 0.5, 4], "zeros take the tensor's range"


def test_smoothing_is_the_papers_formula() -> None:
    weight = torch.tensor([[2.0, -8.0], [1.0, 4.0]])
    factors = smoothing(torch.tensor([16.0, 2.0]), weight, 0.75)
    torch.testing.assert_close(factors, torch.tensor([16**0.75 / 2**0.25, 2**0.75 / 8**0.25]))
    dead = smoothing(torch.tensor([0.0, 2.0]), torch.tensor([[1.0, 0.0]]), 0.5)
    assert dead.tolist() == [1, 1], "a channel without values or without weights is left alone"


@pytest.mark.parametrize(
    ("quantization", "per_channel", "smooth"),
    [("fp8", False, None), ("fp8", True, None), ("int8", True, None), ("int8", True, 0.5)],
)
def test_every_layer_gets_its_ranges(
    calibrated: "Calibrated", quantization: Format, per_channel: bool, smooth: float | None
) -> None:
    scales = calibrated.scales(quantization, per_channel=per_channel, smooth=smooth)
    check_ranges(scales, "test")
    weight = calibrated.checkpoint.model.blocks[1].ffn.up.weight
    name = "block_01.ffn.up"
    seen = calibrated.statistics[f"{name}.input"]
    if smooth is None:
        assert scales.amax[f"{name}.input"] == seen.amax.max()
        wanted = weight.abs().amax(1) if per_channel else weight.abs().max()
    else:
        factors = scales.amax[f"{name}.smooth"]
        assert factors.shape == (32,)
        torch.testing.assert_close(scales.amax[f"{name}.input"], (seen.largest / factors).max())
        wanted = (weight * factors).abs().amax(1)
    torch.testing.assert_close(scales.amax[f"{name}.weight"], wanted)
    assert scales.amax["block_00.spatial.attention.v"].shape == ()


def test_percentile_ranges_clip_a_little(calibrated: "Calibrated", settings: "CalibrationSettings") -> None:
    statistic = calibrated.statistics["block_00.ffn.down.input"]
    clipped = settings.model_copy(update={"percentile": 99.0})
    whole = settings.model_copy(update={"calibrator": "max"})
    assert 0 < activation_range(statistic, clipped) < activation_range(statistic, whole) == statistic.amax.max()
    model = calibrated.checkpoint.model
    provenance = Provenance(quantization="int8", checkpoint="", model=model.config, recipe={}, prompts="", tools={})
    ranges = ranges_of(model, calibrated.statistics, clipped, per_channel=True)
    check_ranges(Scales(provenance=provenance, amax=ranges), "test")


def _int8(values: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    scale = amax / 127
    return (values / scale).round().clamp(-127, 127) * scale


def _error(x: torch.Tensor, weight: torch.Tensor, calibration: torch.Tensor, alpha: float | None) -> float:
    """Relative error of W8A8 on ``x`` with ranges from ``calibration``."""
    largest = calibration.abs().amax(0)
    factors = torch.ones_like(largest) if alpha is None else smoothing(largest, weight, alpha)
    scaled = weight * factors
    product = _int8(x / factors, (largest / factors).max()) @ _int8(scaled, scaled.abs().amax(1, True)).T
    return float((product - x @ weight.T).norm() / (x @ weight.T).norm())


def test_smoothquant_needs_many_values_a_channel() -> None:
    """Why a first trial found SmoothQuant 12 times worse than plain INT8: docs/quantization.md.

    Its AdaLN linear was calibrated on one vector, so that each channel's range was one number: the next vector's
    channels lie far beyond theirs and clip. Plain INT8 takes the largest of all channels, which holds. On the many
    tokens of a sampling run, with channels of different size, SmoothQuant is the better one.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 256, generator=generator) / 16
    silu = torch.nn.functional.silu(torch.randn(65, 256, generator=generator))
    seen_once, unseen = silu[:1], silu[1:]
    assert _error(seen_once, weight, seen_once, 1.0) < 1.5 * _error(seen_once, weight, seen_once, None)
    assert _error(unseen, weight, seen_once, 1.0) > 5 * _error(unseen, weight, seen_once, None)

    channels = torch.randn(256, generator=generator).exp()
    tokens = stateless_norm(torch.randn(8192, 256, generator=generator)) * channels
    assert _error(tokens[:64], weight, tokens[64:], 1.0) < 0.7 * _error(tokens[:64], weight, tokens[64:], None)
