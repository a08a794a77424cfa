"""NVFP4 against ml_dtypes' casts, a second implementation in numpy, and NVIDIA ModelOpt's."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import BLOCK
from stiv_deploy.calibration.nvfp4 import Nvfp4Quantizer, fake_quantized_nvfp4, to_blocks, to_elements
from stiv_deploy.calibration.plan import default_plan, everything, load_plan
from stiv_deploy.calibration.quantize import fake_quantized, quantized_layers, switch_on
from stiv_deploy.calibration.scales import scale_of
from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig

if TYPE_CHECKING:
    from conftest import Calibrated

E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def oracle(values: np.ndarray, scale: np.float32) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, block scales and values of the definition: round to nearest even by ml_dtypes, float32 in between."""
    grouped = values.astype(np.float32).reshape(*values.shape[:-1], -1, BLOCK)
    exact = np.abs(grouped).max(-1, keepdims=True) / (np.float32(6) * scale)
    scales = np.clip(exact, np.float32(2.0**-9), np.float32(448)).astype(E4M3)
    step = scales.astype(np.float32) * scale
    elements = np.clip(grouped / step, np.float32(-6), np.float32(6)).astype(E2M1)
    restored = elements.astype(np.float32) * step
    return elements.view(np.uint8).reshape(values.shape), scales[..., 0], restored.reshape(values.shape)


def test_elements_are_the_nearest_at_ties_the_even_ones() -> None:
    """Every multiple of 1/64 up to beyond the largest, ties among them, and their neighbours."""
    grid = np.arange(-8 * 64, 8 * 64 + 1, dtype=np.float32) / 64
    values = np.concatenate([np.nextafter(grid, np.float32(sign)) for sign in (-9, 9)] + [grid])
    wanted = np.clip(values, -6, 6).astype(E2M1).astype(np.float32)
    np.testing.assert_array_equal(to_elements(torch.from_numpy(values)).numpy(), wanted)
    assert to_elements(torch.tensor([0.25, 0.75, 2.5, 5.0])).tolist() == [0.0, 1.0, 2.0, 4.0]


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, (3, 2 * BLOCK), elements=st.floats(-100, 100, width=32)),
    amax=st.floats(0.015625, 200, width=32),
)
def test_blocks_are_those_of_the_definition_bit_by_bit(values: np.ndarray, amax: float) -> None:
    """Ranges above and below the values': block scales saturate, and are the least there is."""
    scale = scale_of(torch.tensor(amax), "nvfp4", torch.float16)
    assert scale.dtype == torch.float32
    found = to_blocks(torch.from_numpy(values), scale)
    codes, scales, restored = oracle(values, np.float32(scale.item()))
    np.testing.assert_array_equal(found.scales.squeeze(-1).view(torch.uint8).numpy(), scales.view(np.uint8))
    np.testing.assert_array_equal(found.values(scale).numpy(), restored)
    np.testing.assert_array_equal(found.codes.numpy() & 7, codes & 7)
    signs = found.codes.numpy() >> 3
    np.testing.assert_array_equal(signs, ((codes >> 3) & 1) * (codes & 7 > 0), "no negative zero")


def test_values_are_those_of_modelopt() -> None:
    tensors = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    weight = torch.randn(24, 8 * BLOCK, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 24)[:, None]
    scale = weight.abs().max() / (6 * 448)
    packed, scales, _ = tensors.NVFP4QTensor.quantize(weight.clone(), BLOCK, weights_scaling_factor_2=scale)
    found = to_blocks(weight, scale)
    assert torch.equal(found.scales.squeeze(-1).view(torch.uint8), scales.view(torch.uint8))
    low, high = found.codes.unflatten(-1, (-1, 2)).unbind(-1)
    raw = packed._quantized_data
    assert torch.equal(low & 7, raw & 7)
    assert torch.equal(high & 7, raw >> 4 & 7)
    restored = packed.dequantize(torch.float32, scale=scales, double_scale=scale, block_sizes={-1: BLOCK})
    assert torch.equal(found.values(scale), restored)


def test_a_quantizer_can_be_switched_and_keeps_the_type() -> None:
    values = torch.linspace(-3, 3, BLOCK, dtype=torch.float16)
    quantizer = Nvfp4Quantizer(torch.tensor(3 / 2688))
    assert torch.equal(quantizer(values), fake_quantized_nvfp4(values, quantizer.scale))
    assert quantizer(values).dtype == torch.float16
    assert not torch.equal(quantizer(values), values)
    quantizer.disable()
    assert torch.equal(quantizer(values), values)


def test_the_default_plan_has_whole_blocks_only() -> None:
    """Width 24: the FFN's hidden layer of 96 has whole blocks, nothing else."""
    narrow = StivConfig(name="narrow", blocks=1, width=24, heads=2, text_width=16)
    chosen = default_plan(narrow, "nvfp4")
    assert [name for name in chosen.layers if chosen.quantized(name)] == ["block_00.ffn.down"]
    plan = default_plan(CONFIGS["XL"], "nvfp4")
    assert sum(map(plan.quantized, plan.layers)) == 28 * 8
    assert everything(CONFIGS["XL"], "nvfp4") == plan, "attention and the edges cannot be"


@pytest.mark.parametrize("layer", ["block_00.spatial.attention", "embed.patch"])
def test_what_cannot_be_in_nvfp4_is_refused(tmp_path: Path, layer: str) -> None:
    config = CONFIGS["tiny"]
    contents = default_plan(config, "nvfp4").model_dump()
    contents["layers"][layer] = "nvfp4"
    (tmp_path / "plan.json").write_text(json.dumps(contents))
    with pytest.raises(CalibrationError, match=rf"layer {layer} cannot be nvfp4, which is for linears .* make it high"):
        load_plan(tmp_path / "plan.json", config, "nvfp4")


def test_a_model_multiplies_rounded_inputs_by_rounded_weights(calibrated: "Calibrated") -> None:
    """Against the definition in numpy; off, or kept high by the plan, a linear is as it was. Attention has none."""
    model, scales = calibrated.checkpoint.model, calibrated.scales("nvfp4")
    plan = default_plan(model.config, "nvfp4")
    plan = plan.model_copy(update={"layers": {**plan.layers, "block_01.ffn.up": "high"}})
    quantized, module = fake_quantized(model, scales, plan), "blocks.0.ffn.down"
    linear = model.get_submodule(module)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    ranges = [np.float32(scales.amax[f"block_00.ffn.down.{part}"] / 2688) for part in ("input", "weight")]
    (_, _, values), (_, _, weight) = (
        oracle(*pair) for pair in zip((x.numpy(), linear.weight.numpy()), ranges, strict=True)
    )
    wanted = torch.from_numpy(values) @ torch.from_numpy(weight).T + linear.bias
    torch.testing.assert_close(quantized.get_submodule(module)(x), wanted)
    assert not torch.allclose(linear(x), wanted, rtol=0.01)
    kept = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(quantized.get_submodule("blocks.1.ffn.up")(kept), model.get_submodule("blocks.1.ffn.up")(kept))
    names = [layer.name for layer in quantized_layers(quantized)]
    assert names == [name for name in plan.layers if plan.quantized(name)]
    switch_on(quantized, [])
    assert torch.equal(quantized.get_submodule(module)(x), linear(x))
