"""Fake quantization against references of a few lines in numpy, and what it leaves alone."""

import copy
import sys
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import LARGEST, Format, model_layers
from stiv_deploy.calibration.plan import PrecisionPlan, default_plan, everything
from stiv_deploy.calibration.quantize import (
    fake_quantized,
    observed,
    quantized_copy,
    require_modelopt,
    switch_on,
)
from stiv_deploy.calibration.scales import Scales, scale_of
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.rope import rotate

if TYPE_CHECKING:
    from conftest import Calibrated

Array = NDArray[np.float64]
FORMATS: tuple[Format, ...] = ("fp8", "int8")


def rounded(values: Array, amax: Array | float, quantization: Format) -> Array:
    """The independent reference: to the grid of ``amax`` and back, ties to even, saturating as ONNX does."""
    scale = np.asarray(amax, np.float64) / LARGEST[quantization]
    if quantization == "int8":
        return np.clip(np.round(values / scale), -128, 127) * scale
    return np.clip(values / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale


def near_tie(values: Array, amax: Array | float, quantization: Format) -> NDArray[np.bool_]:
    """Where fp32 arithmetic may round to the other neighbour: a relative step of 1e-5 changes the result."""
    low, high = (rounded(values * (1 + sign * 1e-5), amax, quantization) for sign in (-1, 1))
    return low != high


def inputs_of(model: Stiv, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "latents": normal(2, 4, 4, 8, 8),
        "timestep": torch.tensor([0.3, 0.8]),
        "micro": torch.tensor([[32.0, 32, 0, 0, 1, 4]]).repeat(2, 1),
        "text_states": normal(2, 8, model.config.text_width),
        "token_mask": torch.ones(2, 8, dtype=torch.int64),
        "pooled": normal(2, model.config.text_width),
    }


def distance(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def only(config_plan: PrecisionPlan, *layers: str) -> PrecisionPlan:
    """A plan with just ``layers`` in 8 bits."""
    choices = {name: config_plan.quantization if name in layers else "high" for name in config_plan.layers}
    return config_plan.model_copy(update={"layers": choices})


@given(
    values=st.lists(st.floats(-1000, 1000, width=32), min_size=8, max_size=8),
    amax=st.floats(2**-6, 900, width=32),
    quantization=st.sampled_from(FORMATS),
)
@settings(max_examples=60, deadline=None)
def test_input_and_weight_are_rounded_as_numpy_rounds_them(
    calibrated: "Calibrated", values: list[float], amax: float, quantization: Format
) -> None:
    scales, layer = calibrated.scales(quantization), "block_00.ffn.up"
    ranges = {**scales.amax, f"{layer}.input": torch.tensor(amax)}
    scales = Scales(provenance=scales.provenance, amax=ranges)
    plan = only(default_plan(calibrated.checkpoint.model.config, quantization), layer)
    linear = fake_quantized(calibrated.checkpoint.model, scales, plan).get_submodule("blocks.0.ffn.up")
    exact = np.array(values, np.float64)
    found = linear.get_submodule("input_quantizer")(torch.tensor(values)).double().numpy()
    sure = ~near_tie(exact, amax, quantization)
    np.testing.assert_allclose(found[sure], rounded(exact, amax, quantization)[sure], rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_linear_multiplies_rounded_input_by_rounded_weight(
    calibrated: "Calibrated", quantization: Format, per_channel: bool
) -> None:
    model = calibrated.checkpoint.model.double()
    scales = calibrated.scales(quantization, per_channel=per_channel)
    name = "block_01.ffn.down"
    quantized = fake_quantized(model, scales, only(default_plan(model.config, quantization), name))
    x = torch.randn(5, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    linear = model.get_submodule("blocks.1.ffn.down")
    weight_range = scales.amax[f"{name}.weight"].double().numpy()
    assert weight_range.shape == ((32,) if per_channel else ())
    weight = rounded(linear.weight.numpy(), weight_range.reshape(-1, 1), quantization)
    wanted = rounded(x.numpy(), float(scales.amax[f"{name}.input"]), quantization) @ weight.T + linear.bias.numpy()
    found = quantized.get_submodule("blocks.1.ffn.down")(x)
    # fp32 rounding of the quantizers: 2^-23 relative, and one step at the rare tie
    assert distance(found, torch.from_numpy(wanted)) < 1e-3
    assert distance(found, linear(x)) > 2e-3, "it did quantize"
    model.float()


@pytest.mark.parametrize("quantization", FORMATS)
def test_attention_quantizes_all_four_operands(calibrated: "Calibrated", quantization: Format) -> None:
    model, name = calibrated.checkpoint.model, "block_00.spatial.attention"
    scales = calibrated.scales(quantization)
    plan = only(everything(model.config, quantization), name)
    found_module = fake_quantized(model, scales, plan).get_submodule("blocks.0.spatial")
    attention = model.blocks[0].spatial
    x = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    angle = torch.linspace(0, 3, 16 * 8).reshape(16, 8)
    qkv = attention.qkv(x).reshape(3, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
    q, k = (
        rotate(norm(part), angle.cos(), angle.sin())
        for norm, part in ((attention.q_norm, qkv[0]), (attention.k_norm, qkv[1]))
    )
    amax = {part: float(scales.amax[f"{name}.{part}"]) for part in "qkv"}
    query = rounded(q.double().numpy() / 4, amax["q"] / 4, quantization)
    key, value = (rounded(each.double().numpy(), amax[part], quantization) for each, part in ((k, "k"), (qkv[2], "v")))
    scores = query @ key.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = rounded(weights / weights.sum(-1, keepdims=True), 1.0, quantization)
    y = (weights @ value).swapaxes(1, 2).reshape(3, 16, 32)
    wanted = y @ attention.out.weight.double().numpy().T + attention.out.bias.double().numpy()
    found = found_module(x, angle.cos(), angle.sin())
    assert distance(found, torch.from_numpy(wanted)) < 3e-3  # ties; each operand alone shifts it by more than 5e-3
    assert distance(found, attention(x, angle.cos(), angle.sin())) > 5e-3


@pytest.mark.parametrize("quantization", FORMATS)
def test_high_layers_and_the_model_itself_are_untouched(
    micro: Checkpoint, calibrated: "Calibrated", quantization: Format
) -> None:
    before = {name: value.clone() for name, value in micro.model.state_dict().items()}
    none = only(default_plan(micro.model.config, quantization))
    copied = fake_quantized(micro.model, calibrated.scales(quantization), none)
    given = inputs_of(micro.model)
    assert torch.equal(copied(**given), micro.model(**given))
    quantized = fake_quantized(
        micro.model,
        calibrated.scales(quantization, smooth=0.5 if quantization == "int8" else None),
        everything(micro.model.config, quantization),
    )
    quantized.half()
    for name, value in micro.model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    for name, value in copied.named_parameters():
        assert value.data_ptr() != micro.model.get_parameter(name).data_ptr()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_every_floating_type_has_the_same_quantization_error(
    calibrated: "Calibrated", quantization: Format, dtype: torch.dtype
) -> None:
    model, scales = calibrated.checkpoint.model, calibrated.scales(quantization, per_channel=True)
    plan = everything(model.config, quantization)
    exact = copy.deepcopy(model).double()(**inputs_of(model, torch.float64))
    single = distance(fake_quantized(model, scales, plan)(**inputs_of(model)), exact)
    typed = fake_quantized(copy.deepcopy(model).to(dtype), scales, plan)
    found = typed(**inputs_of(model, dtype))
    assert found.dtype == dtype
    assert 0.7 * single < distance(found, exact) < 1.4 * single  # other ties; far from a missing or doubled rounding


def test_scales_of_an_fp16_model_are_fp16_numbers(calibrated: "Calibrated") -> None:
    scales, model = calibrated.scales("int8", per_channel=True), calibrated.checkpoint.model
    half = fake_quantized(copy.deepcopy(model).half(), scales, default_plan(model.config, "int8"))
    for part, amax in (
        ("input", scales.amax["block_00.cross.q.input"]),
        ("weight", scales.amax["block_00.cross.q.weight"]),
    ):
        quantizer = half.get_submodule(f"blocks.0.cross.q.{part}_quantizer")
        found = quantizer.amax.double().flatten() / 127
        wanted = scale_of(amax, "int8", torch.float16).double().flatten()
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=0)
        assert torch.equal(found.half().double().float(), found.float()), "the fp32 scale is an fp16 number"


def test_everything_quantized_is_visibly_worse_than_the_default(calibrated: "Calibrated") -> None:
    model = calibrated.checkpoint.model
    given = inputs_of(model)
    for quantization in FORMATS:
        scales = calibrated.scales(quantization, per_channel=quantization == "int8")
        plans = default_plan(model.config, quantization), everything(model.config, quantization)
        errors = [distance(fake_quantized(model, scales, plan)(**given), model(**given)) for plan in plans]
        assert 0 < 1.2 * errors[0] < errors[1]


def test_switching_every_layer_off_gives_the_model_back(calibrated: "Calibrated") -> None:
    model = calibrated.checkpoint.model
    layers = model_layers(model.config)
    quantized = quantized_copy(model, calibrated.scales("int8", per_channel=True, smooth=0.5), layers)
    given = inputs_of(model)
    switch_on(quantized, [])
    assert distance(quantized(**given), model(**given)) < 1e-5  # SmoothQuant's factors cancel
    alone = [layer for layer in layers if layer.name == "block_01.ffn.up"]
    switch_on(quantized, alone)
    wanted = quantized_copy(model, calibrated.scales("int8", per_channel=True, smooth=0.5), alone)
    assert distance(quantized(**given), wanted(**given)) < 1e-4
    assert distance(quantized(**given), model(**given)) > 1e-4


def test_the_observed_model_computes_the_same_and_shows_every_operand(micro: Checkpoint) -> None:
    seen: dict[str, list[Tensor]] = {}
    model = observed(micro.model, lambda name: seen.setdefault(name, []).append)
    given = inputs_of(micro.model)
    assert distance(model(**given), micro.model(**given)) < 1e-6
    assert all(seen.values())
    names = {f"{layer.name}.input" for layer in model_layers(micro.model.config) if layer.kind == "linear"}
    names |= {f"block_0{index}.spatial.attention.{part}" for index in (0, 1) for part in "qkv"}
    assert set(seen) == names


def test_the_observed_query_is_the_one_before_the_softmax_scale(micro: Checkpoint) -> None:
    seen: dict[str, list[Tensor]] = {}
    model = observed(micro.model, lambda name: seen.setdefault(name, []).append)
    caught: list[Tensor] = []
    norm: nn.Module = micro.model.blocks[0].spatial.q_norm
    with torch.no_grad():
        handle = norm.register_forward_hook(lambda module, given, output: caught.append(output))
        micro.model(**inputs_of(micro.model))
        handle.remove()
        model(**inputs_of(micro.model))
    (query,) = seen["block_00.spatial.attention.q"]
    torch.testing.assert_close(query.norm(dim=-1), caught[0].norm(dim=-1))  # RoPE keeps lengths


def test_scales_and_plans_of_other_models_are_refused(calibrated: "Calibrated", image_checkpoint: Checkpoint) -> None:
    scales, config = calibrated.scales("fp8"), calibrated.checkpoint.model.config
    with pytest.raises(CalibrationError, match="the scales are for model micro, this one is micro"):
        fake_quantized(image_checkpoint.model, scales, default_plan(image_checkpoint.model.config, "fp8"))
    with pytest.raises(CalibrationError, match="this plan is for int8, asked was fp8"):
        fake_quantized(calibrated.checkpoint.model, scales, default_plan(config, "int8"))


def test_a_missing_modelopt_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization.config", None)
    with pytest.raises(CalibrationError, match=r"run: pip install 'stiv-deploy\[calibration\]'") as caught:
        require_modelopt()
    assert "\n" not in str(caught.value)
