import json
from pathlib import Path

import pytest

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import Format, model_layers
from stiv_deploy.calibration.plan import default_plan, everything, load_plan, save_plan
from stiv_deploy.stiv_ref.config import CONFIGS

CONFIG = CONFIGS["tiny"]
FORMATS: tuple[Format, ...] = ("fp8", "int8")


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", ["tiny", "XL", "M"])
def test_the_default_keeps_edges_high_and_attention_without_a_kernel(name: str, quantization: Format) -> None:
    plan = default_plan(CONFIGS[name], quantization)
    for layer in model_layers(CONFIGS[name]):
        fused = quantization == "fp8" and name != "tiny"
        wanted = layer.group == "block" and (layer.kind == "linear" or fused)
        assert plan.quantized(layer.name) == wanted, layer.name
    assert not plan.quantized("no.such.layer")


def test_everything_is_everything() -> None:
    assert set(everything(CONFIG, "int8").layers.values()) == {"int8"}
    assert everything(CONFIG, "int8").layers.keys() == default_plan(CONFIG, "fp8").layers.keys()


def test_a_plan_is_a_readable_file_that_comes_back(tmp_path: Path) -> None:
    plan = default_plan(CONFIG, "fp8")
    save_plan(tmp_path / "plan.json", plan)
    assert '"block_00.ffn.up": "fp8",\n' in (tmp_path / "plan.json").read_text()
    assert load_plan(tmp_path / "plan.json", CONFIG, "fp8") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def changed(**changes: object) -> dict[str, object]:
    """A plan's contents with other values; a layer's choice None leaves it out."""
    contents = default_plan(CONFIG, "fp8").model_dump()
    layers = {**contents["layers"], **changes.pop("layers", {})}  # type: ignore[dict-item]
    contents["layers"] = {name: choice for name, choice in layers.items() if choice is not None}
    return {**contents, **changes}


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (changed(layers={"head.head.out": None}), "layer head.head.out is missing; give it fp8 or high"),
        (changed(layers={"block_09.ffn.up": "fp8"}), "the model has no layer block_09.ffn.up; remove it"),
        (changed(layers={"head.head.out": "int8"}), "layer head.head.out is int8; a fp8 plan has fp8 and high"),
        (
            changed(layers={"head.head.out": "fp4"}),
            "layers.head.head.out: Input should be 'fp8', 'int8', 'nvfp4' or 'high'",
        ),
        (changed(model="XL"), "this plan is for model XL, the checkpoint is tiny"),
        (changed(quantization="int8"), "this plan is for int8, asked was fp8"),
        (changed(format="other"), "format: Input should be 'stiv-precision-plan'"),
        (changed(colour=1), "colour: Extra inputs are not permitted"),
    ],
)
def test_plans_that_do_not_fit_are_one_line(tmp_path: Path, contents: dict[str, object], message: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(contents))
    with pytest.raises(CalibrationError, match=message) as caught:
        load_plan(path, CONFIG, "fp8")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff"])
def test_files_that_are_no_plan(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as caught:
        load_plan(path, CONFIG, "fp8")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
