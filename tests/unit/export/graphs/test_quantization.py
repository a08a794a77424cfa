"""Scales, plans and stored 8-bit values: what is refused, and what is written."""

import copy
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.plan import default_plan, everything, save_plan
from stiv_deploy.calibration.scales import save_scales
from stiv_deploy.export import bundle_from_checkpoint
from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs import writer as graph_writer
from stiv_deploy.export.graphs.modules import graph_modules
from stiv_deploy.export.graphs.quantization import (
    Quantization,
    StoredTensors,
    graph_scheme,
    load_quantization,
    quantized_weight,
)
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.files import sha256
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.errors import CheckpointError

Quantize = Callable[..., Quantization]
Saved = Callable[[Quantization], dict[str, Any]]
BLOCK = ["spatial.qkv", "spatial.out", "temporal.qkv", "temporal.out", "cross.q", "cross.out", "ffn.up", "ffn.down"]


def with_ranges(quantization: Quantization, changes: Mapping[str, Tensor | None]) -> Quantization:
    """The same with some ranges changed, or removed where None."""
    amax = {name: value for name, value in {**quantization.scales.amax, **changes}.items() if value is not None}
    return replace(quantization, scales=replace(quantization.scales, amax=amax))


def request_for(checkpoint: Path, folder: Path, files: dict[str, Any]) -> ExportRequest:
    return ExportRequest(checkpoint=checkpoint, out=folder / "bundle", precision="float16", **files)


@given(
    values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=16),
    scale=st.floats(2**-10, 0.125, width=32),
    quantization=st.sampled_from(["fp8", "int8"]),
)
def test_quantized_weights_are_the_nearest_codes(values: list[float], scale: float, quantization: Format) -> None:
    weight = torch.tensor([values])
    stored = quantized_weight(weight, torch.tensor(scale), quantization, None)
    back = stored.double() * scale
    largest = {"fp8": 448, "int8": 127}[quantization]
    clipped = weight.double().clamp(-largest * scale, largest * scale)
    if quantization == "int8":
        bound = torch.full_like(clipped, scale / 2)
    else:  # three bits of mantissa: half a step is 2 ** -4 of the value; below 2 ** -6 steps are 2 ** -9
        bound = torch.maximum(clipped.abs() * 2**-4, torch.tensor(scale * 2.0**-10))
    assert bool(((back - clipped).abs() <= bound * (1 + 1e-6)).all())


def test_channels_have_their_own_scale() -> None:
    weight = torch.tensor([[1.0, 0.5], [100.0, 50.0]])
    stored = quantized_weight(weight, torch.tensor([1 / 127, 100 / 127]), "int8", None)
    assert stored.tolist() == [[127, 64], [127, 64]]


def test_smoothing_leaves_the_product_as_it_was() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    inverse = torch.rand(8, generator=generator).half() + 0.5
    scale = (weight / inverse.float()).abs().max() / 127
    back = quantized_weight(weight, scale, "int8", inverse).double() * scale.double()
    smoothed = x.double() * inverse.double()
    error = smoothed @ back.T - x.double() @ weight.double().T
    largest = float(scale) / 2 * float(smoothed.abs().sum(1).max())  # every weight is off by half a step at most
    assert float(error.abs().max()) <= largest * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_scales_are_rounded_before_the_weights_are_quantized(
    micro: Checkpoint, quantize: Quantize, quantization: Format, dtype: torch.dtype
) -> None:
    chosen = quantize(quantization)
    scheme = graph_scheme(chosen, micro.config.model, "block_00")
    stored = StoredTensors(graph_modules(micro)["block_00"], "block_00", dtype, scheme, chosen.scales.amax)
    scale = stored["ffn.up.weight_scale"]
    assert scale.dtype == stored["ffn.up.input_scale"].dtype == stored["ffn.up.bias"].dtype == dtype
    assert scale.shape == ((128,) if quantization == "int8" else ())
    weight = micro.model.blocks[0].ffn.up.weight
    torch.testing.assert_close(
        stored["ffn.up.weight"].float(), quantized_weight(weight, scale, quantization, None).float(), rtol=0, atol=0
    )
    assert stored["ffn.up.weight"].dtype == {"fp8": torch.float8_e4m3fn, "int8": torch.int8}[quantization]
    assert len(stored) == len(set(stored)) == len(graph_modules(micro)["block_00"].state_dict()) + 2 * len(BLOCK)


def test_weights_too_large_for_the_precision_are_never_stored(micro: Checkpoint) -> None:
    module = copy.deepcopy(graph_modules(micro)["block_00"])
    weight = next(each for name, each in module.named_parameters() if name.endswith("ffn.up.bias"))
    weight.data[0] = 70_000.0
    for dtype in (torch.float32, torch.bfloat16):
        assert StoredTensors(module, "block_00", dtype)["ffn.up.bias"].isfinite().all()
    with pytest.raises(ExportError, match=r"^block_00\.ffn\.up\.bias: NaN, or too large for float16; export with"):
        _ = StoredTensors(module, "block_00", torch.float16)["ffn.up.bias"]


def test_queries_are_quantized_after_the_softmax_scale(micro: Checkpoint, quantize: Quantize) -> None:
    chosen = quantize("fp8", plan=everything(micro.config.model, "fp8"))
    scheme = graph_scheme(chosen, micro.config.model, "block_01")
    stored = StoredTensors(graph_modules(micro)["block_01"], "block_01", torch.float32, scheme, chosen.scales.amax)
    amax = chosen.scales.amax["block_01.spatial.attention.q"].item()
    assert stored["spatial.attention.q_scale"].item() == pytest.approx(amax / 4 / 448)  # heads of 16: 16 ** -0.5
    assert stored["spatial.attention.k_scale"].item() == pytest.approx(amax / 448)


def test_schemes_follow_the_plan(micro: Checkpoint, quantize: Quantize) -> None:
    config = micro.config.model
    chosen = quantize("int8")
    assert [layer.module for layer in graph_scheme(chosen, config, "block_01")] == BLOCK
    assert all(layer.per_channel and not layer.smooth for layer in graph_scheme(chosen, config, "block_01"))
    assert graph_scheme(chosen, config, "embed") == graph_scheme(chosen, config, "step") == ()
    layers = {**chosen.plan.layers, "block_01.ffn.down": "high"}
    mixed = replace(chosen, plan=chosen.plan.model_copy(update={"layers": layers}))
    assert [layer.module for layer in graph_scheme(mixed, config, "block_01")] == BLOCK[:-1]
    assert graph_scheme(mixed, config, "block_00") == graph_scheme(chosen, config, "block_00")


def test_equal_ranges_share_a_quantize(micro: Checkpoint, quantize: Quantize) -> None:
    chosen = quantize("fp8", plan=everything(micro.config.model, "fp8"))
    scheme = {layer.module: layer for layer in graph_scheme(chosen, micro.config.model, "text_kv")}
    assert scheme["blocks.1.cross.kv"].input_like == scheme["text_in"].module
    other = with_ranges(chosen, {"text_kv.blocks.1.cross.kv.input": torch.tensor(7.0)})
    scheme = {layer.module: layer for layer in graph_scheme(other, micro.config.model, "text_kv")}
    assert scheme["blocks.1.cross.kv"].input_like == "blocks.1.cross.kv"


def test_the_record_is_the_whole_plan(micro: Checkpoint, quantize: Quantize) -> None:
    record = quantize("int8").record()
    assert (record.format, record.layers["embed.patch"], record.layers["block_00.ffn.up"]) == ("int8", "high", "int8")
    assert record.layers.keys() == default_plan(micro.config.model, "int8").layers.keys()


class TestBadInput:
    @pytest.fixture(autouse=True)
    def untraceable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Bad input must be refused before the first expensive step."""

        def refuse(*args: object, **kwargs: object) -> None:
            raise AssertionError("the export began before its input was checked")

        monkeypatch.setattr(graph_writer, "trace", refuse)
        monkeypatch.setattr(bundle_from_checkpoint, "require_modelopt", lambda: None)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            (
                {"block_00.ffn.up.weight": torch.ones(3)},
                ExportError,
                r"weight has shape \[3\], the model wants \[\] or",
            ),
            ({"block_00.ffn.up.input": torch.ones(2)}, ExportError, r"input has shape \[2\], the model wants \[\];"),
            ({"block_01.spatial.attention.k": torch.ones(2)}, ExportError, r"attention.k has shape \[2\]"),
            ({"block_00.ffn.up.smooth": torch.ones(3)}, ExportError, r"smooth has shape \[3\], the model wants \[32\]"),
            ({"block_00.ffn.up.weight": None}, CalibrationError, "layer block_00.ffn.up has no range"),
            ({"embed.patch.input": torch.tensor(float("nan"))}, CalibrationError, "embed.patch.input is not finite"),
            (
                {"embed.patch.input": torch.tensor(0.0)},
                CalibrationError,
                "embed.patch.input is not finite and positive",
            ),
        ],
    )
    def test_ranges_that_do_not_fit(
        self,
        micro_path: Path,
        quantize: Quantize,
        saved: Saved,
        tmp_path: Path,
        changes: dict[str, Tensor | None],
        error: type[Exception],
        message: str,
    ) -> None:
        with pytest.raises(error, match=message):
            export_bundle(request_for(micro_path, tmp_path, saved(with_ranges(quantize("fp8"), changes))))
        assert list(tmp_path.iterdir()) == []

    def test_scales_of_another_checkpoint(
        self, micro_path: Path, quantize: Quantize, saved: Saved, tmp_path: Path
    ) -> None:
        others = saved(quantize("fp8", checkpoint="0" * 64))
        with pytest.raises(CalibrationError, match="scales of another checkpoint .* run 'stiv calibrate' on this one"):
            export_bundle(request_for(micro_path, tmp_path, others))
        assert list(tmp_path.iterdir()) == []

    def test_scales_of_another_format(self, micro_path: Path, quantize: Quantize, tmp_path: Path) -> None:
        save_scales(tmp_path / "scales", quantize("fp8").scales)
        with pytest.raises(CalibrationError, match="scales for fp8, asked was int8; run 'stiv calibrate --precision"):
            load_quantization(open_checkpoint(micro_path), "int8", tmp_path / "scales", None)

    def test_no_scale_file(self, micro_path: Path, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="absent: cannot be read as scales"):
            load_quantization(open_checkpoint(micro_path), "fp8", tmp_path / "absent", None)

    def test_no_checkpoint(self, quantize: Quantize, saved: Saved, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="absent: no checkpoint here"):
            export_bundle(request_for(tmp_path / "absent", tmp_path, saved(quantize("fp8"))))

    def test_half_a_checkpoint(self, micro_path: Path, quantize: Quantize, tmp_path: Path) -> None:
        shutil.copytree(micro_path, tmp_path / "half")
        (tmp_path / "half" / "vae.safetensors").unlink()
        save_scales(tmp_path / "scales", quantize("fp8").scales)
        with pytest.raises(CheckpointError, match=r"vae.safetensors: cannot be read .*; give a whole checkpoint"):
            load_quantization(open_checkpoint(tmp_path / "half"), "fp8", tmp_path / "scales", None)

    def test_plan_of_another_model(self, micro_path: Path, quantize: Quantize, saved: Saved, tmp_path: Path) -> None:
        chosen = quantize("fp8")
        plan = chosen.plan.model_copy(update={"model": "other"})
        with pytest.raises(CalibrationError, match="this plan is for model other"):
            export_bundle(request_for(micro_path, tmp_path, saved(replace(chosen, plan=plan))))

    def test_the_comparison_needs_modelopt(
        self, micro_path: Path, quantize: Quantize, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> None:
            raise CalibrationError("ModelOpt cannot be imported")

        monkeypatch.setattr(bundle_from_checkpoint, "require_modelopt", missing)
        with pytest.raises(CalibrationError, match="ModelOpt cannot be imported"):
            export_bundle(request_for(micro_path, tmp_path, saved(quantize("fp8"))))
        assert list(tmp_path.iterdir()) == []


def test_plan_and_scales_are_read(micro: Checkpoint, micro_path: Path, quantize: Quantize, tmp_path: Path) -> None:
    save_scales(tmp_path / "scales", quantize("int8").scales)
    save_plan(tmp_path / "plan.json", everything(micro.config.model, "int8"))
    checkpoint = open_checkpoint(micro_path)
    loaded = load_quantization(checkpoint, "int8", tmp_path / "scales", tmp_path / "plan.json")
    assert loaded.plan == everything(micro.config.model, "int8")
    assert loaded.sha256 == sha256(tmp_path / "scales")
    assert load_quantization(checkpoint, "int8", tmp_path / "scales", None).plan == quantize("int8").plan
    np.testing.assert_array_equal(
        loaded.scales.amax["block_00.ffn.up.weight"], quantize("int8").scales.amax["block_00.ffn.up.weight"]
    )
