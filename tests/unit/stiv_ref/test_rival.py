"""The reference as a baseline of measurements."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stiv_deploy.runtime.sampling.settings import SamplingSettings as RuntimeSettings
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, checkpoint_hash, load_checkpoint, save_checkpoint
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.generation import generate
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.rival import rival, settings_of
from stiv_deploy.stiv_ref.sampler import SamplingSettings
from stiv_deploy.stiv_ref.training.stages import untrained_checkpoint


@pytest.fixture
def folder(recipe: Recipe, tmp_path: Path) -> Path:
    """A checkpoint among others, random, with a velocity that is not zero."""
    made: Checkpoint = untrained_checkpoint(recipe)
    for parameter in made.model.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_checkpoint(tmp_path / "checkpoints" / "one", made)
    return tmp_path / "checkpoints" / "one"


def order_of(folder: Path, **changes: Any) -> dict[str, Any]:
    made = {
        "checkpoint": None,
        "checkpoints": str(folder.parent),
        "sha256": checkpoint_hash(folder),
        "device": "cpu",
        "precision": "float32",
        "threads": torch.get_num_threads(),
        "compile": False,
        "settings": asdict(RuntimeSettings(steps=2)),
        "frames": 3,
    }
    return made | changes


def test_its_clips_are_those_of_the_reference(folder: Path) -> None:
    clips = rival(order_of(folder))(["digit one moving up", "digit two"], [5, 9])
    settings = SamplingSettings(steps=2)
    video = generate(load_checkpoint(folder), ["digit one moving up", "digit two"], [5, 9], settings, frames=3)
    wanted = ((video + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 1, 3, 4, 2)
    assert clips.dtype == np.uint8
    np.testing.assert_array_equal(clips, wanted.numpy())
    assert clips.std() > 1


def test_compiled_it_makes_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda part: compiled.append(part) or part)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda part: compiled.append(part))
    ones, others = (rival(order_of(folder, compile=each))(["digit two"], [1]) for each in (True, False))
    np.testing.assert_array_equal(ones, others)
    assert len(compiled) == 2


def test_all_settings_of_the_runtime_are_known() -> None:
    changed = RuntimeSettings(
        steps=3,
        guidance_mode="sit",  # type: ignore[arg-type]
        guidance_scale=2.0,
        renorm=False,
        solver="ab2",  # type: ignore[arg-type]
        time_shift=2.0,
        unseen="zero",  # type: ignore[arg-type]
        guidance_until=0.5,
    )
    assert asdict(settings_of(asdict(changed))) == asdict(changed)


def test_another_checkpoint_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="is not what the bundle was exported from; give its --checkpoint"):
        rival(order_of(folder, checkpoint=str(folder), sha256="0" * 64))
    with pytest.raises(CheckpointError, match="no folder in .* is the checkpoint that the bundle was exported from"):
        rival(order_of(folder, sha256="0" * 64))
