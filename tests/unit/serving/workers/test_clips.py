"""What a paused clip goes on from, as arrays in a file."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime import Bundle, GenerationRequest
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.sampling.engine import Pause
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.serving.store.jobs import Job
from stiv_deploy.serving.workers.clips import Clip, pause_arrays, pause_of

SHAPE = (4, 4, 4, 4)
ROWS = 2
RANDOM = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape, dtype=np.float32)


@pytest.fixture
def clip(skipping_path: Path) -> Clip:
    request = GenerationRequest(prompt="digit", seed=1, num_inference_steps=6, skip_blocks=True)
    plan = plan_generation(Bundle.open(skipping_path), request)
    values: dict[str, Any] = dict.fromkeys(each.name for each in dataclasses.fields(Sample))
    sample = Sample(**values | {"noise": normal(*SHAPE), "settings": plan.videos[0].settings})
    job = Job(id="a", owner="me", created=1.0, frames=4, height=8, width=8, rows=ROWS, evaluations=4, steps=6, twin="t")
    return Clip(job, plan, sample)


def pause(**changes: Any) -> Pause:
    residuals = RANDOM.integers(0, 256, (ROWS, 2, 96), np.uint8)
    plain = {"position": 3, "latents": normal(*SHAPE), "inputs": normal(ROWS, *SHAPE), "velocity": normal(*SHAPE)}
    return Pause(**plain | {"residuals": residuals} | changes)


@pytest.mark.parametrize("without", [(), ("velocity",), ("residuals",), ("velocity", "residuals")])
def test_a_pause_comes_back_as_it_was(clip: Clip, tmp_path: Path, without: tuple[str, ...]) -> None:
    """Through a file, bit by bit."""
    before = pause(**dict.fromkeys(without))
    np.savez(tmp_path / "pause.npz", **pause_arrays(before, clip))
    with np.load(tmp_path / "pause.npz") as file:
        after = pause_of(dict(file), clip)
    assert after is not None
    assert after.position == 3
    for name in ("latents", "inputs", "velocity", "residuals"):
        found, wanted = getattr(after, name), getattr(before, name)
        assert (found is None) == (wanted is None) == (name in without)
        if wanted is not None:
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"latents": normal(4, 4, 4, 2)},
        {"inputs": normal(3, *SHAPE)},
        {"velocity": normal(3, 4, 4, 4)},
        {"residuals": np.zeros((3, 2, 96), np.uint8)},
        {"residuals": np.zeros((ROWS, 1, 96), np.uint8)},
        {"residuals": np.zeros((ROWS, 2, 96, 1), np.uint8)},
        {"residuals": np.zeros((ROWS, 2), np.uint8)},
        {"residuals": np.zeros(2, np.uint8)},
    ],
)
def test_arrays_of_another_shape_are_no_pause_of_it(clip: Clip, changes: dict[str, np.ndarray]) -> None:
    assert pause_of(pause_arrays(pause(), clip), clip) is not None
    assert pause_of(pause_arrays(pause(**changes), clip), clip) is None


def test_nor_are_those_of_another_bundle_or_of_another_kind(clip: Clip) -> None:
    arrays = pause_arrays(pause(), clip)
    assert pause_of(arrays | {"bundle": np.array("0" * 64)}, clip) is None
    assert pause_of(arrays | {"more": np.zeros(1)}, clip) is None
    assert pause_of({name: each for name, each in arrays.items() if name != "latents"}, clip) is None
