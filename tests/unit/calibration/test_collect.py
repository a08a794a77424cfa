from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from stiv_deploy.calibration.collect import (
    CalibrationSettings,
    Material,
    collect,
    unit_inputs,
    unit_settings,
    units,
)
from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import model_layers
from stiv_deploy.calibration.observers import BANDS, REQUEST, band_of
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.sampler import sample

if TYPE_CHECKING:
    from conftest import Calibrated


def test_units_take_every_sample_once_over_both_tasks_and_guidance_modes() -> None:
    found = units(CalibrationSettings(samples=22, batch=5), image_to_video=True)
    assert [index for unit in found for index in unit.samples] == list(range(22))
    assert [unit.task for unit in found] == ["t2v", "ti2v", "t2v", "ti2v", "t2v"]
    jit, sit = GuidanceMode.JIT, GuidanceMode.SIT
    assert [unit.guidance for unit in found] == [jit, jit, jit, sit, jit]
    assert len(found[-1].samples) == 2
    assert {unit.task for unit in units(CalibrationSettings(samples=22), image_to_video=False)} == {"t2v"}
    student = units(CalibrationSettings(samples=22, batch=5), image_to_video=True, student=True)
    assert {unit.guidance for unit in student} == {jit}, "it has no other guidance in it"


def test_statistics_are_those_of_what_the_sampler_feeds_the_model(
    calibrated: "Calibrated", settings: CalibrationSettings
) -> None:
    """Against forward hooks on the reference's own modules, over the very same runs."""
    checkpoint, material = calibrated.checkpoint, calibrated.material
    largest, time = torch.zeros(BANDS, 32), [0.0]

    def see_time(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        time[0] = given[1][0].item()

    def see_input(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        row = largest[band_of(time[0])]
        row.copy_(torch.maximum(row, given[0].abs().flatten(0, -2).amax(0)))

    handles = [
        checkpoint.model.register_forward_pre_hook(see_time),
        checkpoint.model.get_submodule("blocks.0.ffn.up").register_forward_pre_hook(see_input),
    ]
    for unit in units(settings, image_to_video=True):
        inputs = unit_inputs(checkpoint, material, unit, settings.seed)
        sample(checkpoint.model, inputs, unit_settings(checkpoint, unit, settings.steps))
    for handle in handles:
        handle.remove()
    found = calibrated.statistics["block_00.ffn.up.input"].amax
    assert (largest > 0).all()
    torch.testing.assert_close(found[:BANDS], largest, rtol=1e-4, atol=1e-5)  # observed attention is written out


def test_every_layer_is_seen_in_every_band_or_once_a_request(calibrated: "Calibrated") -> None:
    for layer in model_layers(calibrated.checkpoint.model.config):
        for part in ("input",) if layer.kind == "linear" else ("q", "k", "v"):
            rows = calibrated.statistics[f"{layer.name}.{part}"].amax.amax(1) > 0
            wanted = [False] * BANDS + [True] if layer.graph == "text_kv" else [True] * BANDS + [False]
            assert rows.tolist() == wanted, layer.name
    assert len(rows) == REQUEST + 1


def test_given_frames_are_clean_and_seeds_are_the_samples_own(calibrated: "Calibrated") -> None:
    checkpoint, material = calibrated.checkpoint, calibrated.material
    text, image = units(CalibrationSettings(samples=4, batch=2), image_to_video=True)
    inputs = unit_inputs(checkpoint, material, image, seed=7)
    assert inputs.frame_mask.tolist() == [[True, False, False, False]] * 2
    assert material.images is not None
    torch.testing.assert_close(inputs.clean[:, :1], checkpoint.vae.encode(material.images[2:4].unsqueeze(1)))
    assert not unit_inputs(checkpoint, material, text, seed=7).frame_mask.any()
    again = unit_inputs(checkpoint, material, text, seed=9)
    assert torch.equal(again.noise, inputs.noise), "sample i of a run has seed + i"


def test_prompts_are_taken_in_turn(calibrated: "Calibrated") -> None:
    checkpoint = calibrated.checkpoint
    two = Material(prompts=["digit one moving left", "digit two moving up"], images=None)
    (unit,) = units(CalibrationSettings(samples=3, batch=3), image_to_video=False)
    states = unit_inputs(checkpoint, two, unit, 0).text.states
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


class Stop(Exception):
    """Stands for Ctrl-C."""


def test_a_stopped_run_goes_on_to_the_same_bits(
    calibrated: "Calibrated", settings: CalibrationSettings, tmp_path: Path
) -> None:
    state, calls = tmp_path / "state", []

    def stop_after_two(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise Stop

    def note(what: str, done: int, total: int) -> None:
        calls.append((what, done, total))

    checkpoint, material = calibrated.checkpoint, calibrated.material
    with pytest.raises(Stop):
        collect(checkpoint, material, settings, state, "same", stop_after_two)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    found = collect(checkpoint, material, settings, state, "same", note)
    assert calls == [("sampling", done, 4) for done in (2, 3, 4)], "two units were not done again"
    for name, statistic in calibrated.statistics.items():
        assert torch.equal(found[name].amax, statistic.amax), name
        assert torch.equal(found[name].counts, statistic.counts), name


def test_a_state_of_another_run_is_refused(
    calibrated: "Calibrated", settings: CalibrationSettings, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    one = settings.model_copy(update={"samples": 1, "steps": 1})
    collect(calibrated.checkpoint, calibrated.material, one, state, "one")
    with pytest.raises(CalibrationError, match="a calibration with other settings was stopped here; delete it"):
        collect(calibrated.checkpoint, calibrated.material, one, state, "other")


@pytest.mark.parametrize("content", [b"", b"not safetensors", None])
def test_a_damaged_state_is_refused(
    calibrated: "Calibrated", settings: CalibrationSettings, tmp_path: Path, content: bytes | None
) -> None:
    state = tmp_path / "state"
    if content is None:
        save_file({"a": torch.zeros(1)}, state)
    else:
        state.write_bytes(content)
    with pytest.raises(CalibrationError, match="not a readable calibration state") as caught:
        collect(calibrated.checkpoint, calibrated.material, settings, state, "one")
    assert "\n" not in str(caught.value)


def test_an_image_model_is_calibrated_on_text_to_image(image_checkpoint: Checkpoint, tmp_path: Path) -> None:
    material = Material(prompts=["digit one"], images=None)
    settings = CalibrationSettings(samples=1, steps=1)
    found = collect(image_checkpoint, material, settings, tmp_path / "state", "image")
    assert "block_00.temporal.qkv.input" not in found
    assert found["block_00.spatial.qkv.input"].amax[0].min() > 0


def test_values_that_are_not_finite_are_refused_with_the_layers_name(
    make_checkpoint: Callable[[], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    with torch.no_grad():
        checkpoint.model.get_submodule("blocks.1.ffn.up").weight[0, 0] = torch.inf
    settings = CalibrationSettings(samples=1, steps=1)
    with pytest.raises(CalibrationError, match=r"block_01\.ffn\.down\.input: the model computes values that are not"):
        collect(checkpoint, Material(prompts=["a"], images=None), settings, tmp_path / "state", "one")
    assert not (tmp_path / "state").exists()
