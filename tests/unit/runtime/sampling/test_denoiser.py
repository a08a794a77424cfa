from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.text_stage import TextStage, Tokens

EPS = np.finfo(np.float32).eps


def toy_dims(toy_bundle: Bundle, rows: int, frames: int = 3, height: int = 8, width: int = 4) -> dict[str, int]:
    return dimensions(
        toy_bundle.manifest.model,
        batch=1,
        model_batch=rows,
        video_frames=frames,
        height=height,
        width=width,
        text_tokens=5,
    )


def place(toy_bundle: Bundle, dims: dict[str, int]) -> np.ndarray:
    tables = rope.rope_tables(toy_bundle.manifest.model, dims)
    space = tables["spatial_cos"].sum(1) + tables["spatial_sin"].sum(1)
    time = tables["temporal_cos"].sum(1) + tables["temporal_sin"].sum(1)
    return time[:, None] + space[None]


class Drawn:
    """Random conditions and inputs of ``rows`` rows, and what the toy makes of them."""

    def __init__(self, seed: int, shape: tuple[int, ...]) -> None:
        rng, rows = np.random.default_rng(seed), shape[0]
        self.ids, self.mask = rng.integers(0, 8, (rows, 5)), rng.integers(0, 2, (rows, 5))
        self.micro, self.time = rng.random((rows, 6), dtype=np.float32), rng.random(rows, dtype=np.float32)
        self.x = rng.standard_normal(shape, dtype=np.float32)

    def put(self, denoiser: Denoiser, text: TextStage) -> None:
        for row, tokens in enumerate(zip(self.ids, self.mask, strict=True)):
            denoiser.set_row(row, text(Tokens(*tokens)), self.micro[row])
        denoiser.backend.write(denoiser.model_input, self.x)
        denoiser.backend.write(denoiser.timed["timestep"], self.time)

    def wanted(self, toy: Any, place: np.ndarray) -> np.ndarray:
        states, pooled = toy.text(self.ids, self.mask)
        return toy.velocity(self.x, self.time, self.micro, states, self.mask, pooled, place)


TOLERANCE = 8 * 40 * EPS
"""About 20 fp32 operations on values below 8 on either side."""


@pytest.mark.parametrize(("most", "rows", "frames"), [(1, 1, 3), (6, 6, 1), (6, 4, 6)])
def test_velocity_is_that_of_the_model(toy_bundle: Bundle, toy: Any, most: int, rows: int, frames: int) -> None:
    """Over the first rows as over all; the second round must not see anything of the first."""
    dims, backend = toy_dims(toy_bundle, most, frames), OnnxRuntimeBackend(toy_bundle)
    denoiser, text = Denoiser(backend, toy_bundle.manifest, dims), TextStage(backend, toy_bundle.manifest)
    calls = denoiser.calls(rows)
    for seed in range(2):
        drawn = Drawn(seed, denoiser.model_input.shape)
        drawn.put(denoiser, text)
        for call in calls.values():
            call()
        wanted = drawn.wanted(toy, place(toy_bundle, dims))[:rows]
        np.testing.assert_allclose(backend.read(denoiser.velocity)[:rows], wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(backend.read(denoiser.model_input), drawn.x)


def test_a_moved_row_is_the_same_row(toy_bundle: Bundle, toy: Any) -> None:
    dims, backend = toy_dims(toy_bundle, 3), OnnxRuntimeBackend(toy_bundle)
    denoiser, text = Denoiser(backend, toy_bundle.manifest, dims), TextStage(backend, toy_bundle.manifest)
    drawn = Drawn(3, denoiser.model_input.shape)
    drawn.put(denoiser, text)
    denoiser.move_row(0, 2)
    backend.write(denoiser.timed["timestep"], drawn.time[[2, 1, 0]])
    for call in denoiser.calls(2).values():
        call()
    wanted = drawn.wanted(toy, place(toy_bundle, dims))[[2, 1]]
    np.testing.assert_allclose(backend.read(denoiser.velocity)[:2], wanted, rtol=0, atol=TOLERANCE)


def test_calls_are_the_graphs_in_order(toy_bundle: Bundle) -> None:
    denoiser = Denoiser(OnnxRuntimeBackend(toy_bundle), toy_bundle.manifest, toy_dims(toy_bundle, 2))
    assert list(denoiser.calls(2)) == ["embed", "block_00", "block_01", "head"]
