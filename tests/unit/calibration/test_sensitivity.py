from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import model_layers
from stiv_deploy.calibration.observers import BANDS, band_of
from stiv_deploy.calibration.quantize import quantized_copy
from stiv_deploy.calibration.sensitivity import (
    FINAL,
    Reference,
    band_steps,
    check_steps,
    groups_of,
    latents_error,
    load_state,
    reference_runs,
    relative_error,
    sweep,
    velocity_errors,
)
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingSettings, guided_velocity

if TYPE_CHECKING:
    from conftest import Calibrated


@pytest.fixture(scope="module")
def references(calibrated: "Calibrated") -> list[Reference]:
    return reference_runs(calibrated.checkpoint, calibrated.material, steps=12)


@pytest.fixture(scope="module")
def quantized(calibrated: "Calibrated") -> Stiv:
    model = calibrated.checkpoint.model
    return quantized_copy(model, calibrated.scales("fp8"), model_layers(model.config))


@given(st.integers(1, 60), st.floats(0.2, 5))
def test_a_bands_step_lies_in_it(steps: int, shift: float) -> None:
    settings = SamplingSettings(steps=steps, time_shift=shift)
    times = settings.times()
    for band, step in band_steps(settings).items():
        assert step < steps
        assert band_of(times[step]) == band


def test_too_few_steps_are_refused() -> None:
    check_steps(SamplingSettings(steps=15))
    with pytest.raises(CalibrationError, match="--steps 4: too few for a sweep"):
        check_steps(SamplingSettings(steps=4))


def test_references_are_points_of_the_sampler(calibrated: "Calibrated", references: list[Reference]) -> None:
    text, image = references
    assert not text.inputs.frame_mask.any()
    assert image.inputs.frame_mask[:, 0].all()
    assert not torch.equal(text.inputs.noise, image.inputs.noise)
    for run in references:
        assert [band_of(time) for time, _ in run.times] == list(range(BANDS))
        velocity = guided_velocity(calibrated.checkpoint.model, run.inputs, run.settings)
        for times, latents, wanted in zip(run.times, run.latents, run.velocity, strict=True):
            torch.testing.assert_close(velocity(latents, *times), wanted, rtol=1e-4, atol=1e-5)


def test_the_reference_has_no_error(calibrated: "Calibrated", references: list[Reference]) -> None:
    model = calibrated.checkpoint.model
    assert max(velocity_errors(model, references)) < 1e-5
    assert latents_error(model, references) < 1e-5


def test_relative_error_leaves_given_frames_out() -> None:
    reference = torch.ones(1, 2, 1, 1, 1)
    value = torch.tensor([5.0, 1.5]).reshape(1, 2, 1, 1, 1)
    assert relative_error([(value, reference, torch.tensor([[True, False]]))]) == pytest.approx(0.5)
    assert relative_error([(value, reference, torch.tensor([[False, False]]))]) == pytest.approx((16.25 / 2) ** 0.5)


def test_groups_hold_every_layer_once(calibrated: "Calibrated") -> None:
    config = calibrated.checkpoint.model.config
    groups = groups_of(model_layers(config))
    assert [layer for layers in groups.values() for layer in layers] == list(model_layers(config))
    assert {name for name, layers in groups.items() if len(layers) > 1} == {"embed", "text_kv"}


@pytest.mark.slow
def test_a_sweep_measures_groups_alone_and_goes_on_where_it_was(
    calibrated: "Calibrated", references: list[Reference], quantized: Stiv, tmp_path: Path
) -> None:
    model, state = calibrated.checkpoint.model, tmp_path / "state"

    def stop(_what: str, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(quantized, references, state, "one", stop)
    assert len(load_state(state, "one")[0]) == 3
    steps: list[int] = []
    found = sweep(quantized, references, state, "one", lambda _what, done, _total: steps.append(done))
    groups = groups_of(model_layers(model.config))
    assert list(found.velocity) == list(groups)
    assert steps == list(range(3, len(groups) + FINAL + 1))
    alone = quantized_copy(model, calibrated.scales("fp8"), groups["block_01.ffn.down"])
    torch.testing.assert_close(
        torch.tensor(found.velocity["block_01.ffn.down"]),
        torch.tensor(velocity_errors(alone, references)),
        rtol=1e-3,
        atol=0,
    )
    worst = sorted(groups, key=lambda name: -max(found.velocity[name]))[:FINAL]
    assert set(found.latents) == set(worst)
    assert all(min(errors) > 0 for errors in found.velocity.values())


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"fingerprint": "one", "velocity": 1}'])
def test_a_damaged_sweep_state_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "state").write_text(content)
    with pytest.raises(CalibrationError, match="not a readable sweep state"):
        load_state(tmp_path / "state", "one")


def test_a_sweep_state_of_other_scales_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text('{"fingerprint": "one", "velocity": {}, "latents": {}}')
    assert load_state(tmp_path / "state", "one") == ({}, {})
    with pytest.raises(CalibrationError, match="a sweep with other settings was stopped here"):
        load_state(tmp_path / "state", "other")
