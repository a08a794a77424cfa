from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import LARGEST, Format
from stiv_deploy.calibration.scales import Scales, check_fits, load_scales, save_scales, scale_of
from stiv_deploy.stiv_ref.files import sha256

if TYPE_CHECKING:
    from conftest import Calibrated

Change = Callable[[dict[str, Tensor]], object]


def test_scales_come_back_with_their_provenance(calibrated: "Calibrated", tmp_path: Path) -> None:
    scales = calibrated.scales("int8", per_channel=True, smooth=0.5)
    save_scales(tmp_path / "scales.safetensors", scales)
    found = load_scales(tmp_path / "scales.safetensors")
    assert found.provenance == scales.provenance
    assert found.amax.keys() == scales.amax.keys()
    assert all(torch.equal(found.amax[name], value) for name, value in scales.amax.items())
    assert [path.name for path in tmp_path.iterdir()] == ["scales.safetensors"]
    first = sha256(tmp_path / "scales.safetensors")
    save_scales(tmp_path / "scales.safetensors", scales)
    assert sha256(tmp_path / "scales.safetensors") == first, "the same scales are the same bytes"


@given(
    st.floats(2**-20, 2**20, width=32),
    st.sampled_from(["fp8", "int8"]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_a_scale_is_amax_over_the_largest_number_in_the_activations_type(
    amax: float, quantization: Format, dtype: torch.dtype
) -> None:
    scale = scale_of(torch.tensor(amax), quantization, dtype)
    exact = max(amax / LARGEST[quantization], torch.finfo(dtype).tiny)
    assert scale.dtype == dtype
    assert scale.item() == pytest.approx(exact, rel=torch.finfo(dtype).eps)


def _set(name: str, value: object) -> Change:
    return lambda amax: amax.__setitem__(name, torch.tensor(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda amax: amax.pop("block_01.ffn.up.weight"), "layer block_01.ffn.up has no range block_01.ffn.up.weight"),
        (lambda amax: amax.pop("block_00.spatial.attention.k"), "layer block_00.spatial.attention has no range"),
        (_set("head.head.out.input", float("nan")), "range head.head.out.input is not finite and positive"),
        (_set("head.head.out.input", float("inf")), "range head.head.out.input is not finite and positive"),
        (_set("head.head.out.input", 0.0), "range head.head.out.input is not finite and positive"),
        (_set("head.head.out.weight", [1.0, -1.0]), "range head.head.out.weight is not finite and positive"),
    ],
)
def test_incomplete_and_impossible_ranges_are_refused(
    calibrated: "Calibrated", tmp_path: Path, change: Change, message: str
) -> None:
    scales = calibrated.scales("fp8")
    amax = dict(scales.amax)
    change(amax)
    save_scales(tmp_path / "scales.safetensors", Scales(provenance=scales.provenance, amax=amax))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_scales(tmp_path / "scales.safetensors")
    assert "\n" not in str(caught.value)


def test_scales_of_other_checkpoints_and_formats_are_refused(calibrated: "Calibrated") -> None:
    scales = calibrated.scales("fp8")
    check_fits(scales, "0" * 64, "fp8", "scales.safetensors")
    with pytest.raises(
        CalibrationError, match="scales of another checkpoint \\(000000000000, this one is 111111111111"
    ):
        check_fits(scales, "1" * 64, "fp8", "scales.safetensors")
    with pytest.raises(CalibrationError, match="scales for fp8, asked was int8; run 'stiv calibrate --precision int8'"):
        check_fits(scales, "0" * 64, "int8", "scales.safetensors")


@pytest.mark.parametrize("content", [None, b"", b"12345678 not safetensors"])
def test_files_that_are_no_scales(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "scales.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read as scales") as caught:
        load_scales(path)
    assert "\n" not in str(caught.value)


def test_other_safetensors_files_are_no_scales(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CalibrationError, match="not a scale file; give one that 'stiv calibrate' wrote"):
        load_scales(tmp_path / "plain.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "bad.safetensors", {"stiv-scales": "{}"})
    with pytest.raises(CalibrationError, match="cannot be read as scales"):
        load_scales(tmp_path / "bad.safetensors")
