from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.backends.base import Call
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.runtime.sampling.denoiser import Denoiser, GraphClock

EPS = np.finfo(np.float32).eps


def toy_dims(
    toy_bundle: Bundle, batch: int, branches: int, frames: int = 3, height: int = 8, width: int = 4
) -> dict[str, int]:
    return dimensions(
        toy_bundle.manifest.model,
        batch=batch,
        branches=branches,
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


@pytest.mark.parametrize(("batch", "branches", "frames"), [(1, 1, 3), (2, 3, 1), (3, 2, 6)])
def test_velocity_is_that_of_the_model(toy_bundle: Bundle, toy: Any, batch: int, branches: int, frames: int) -> None:
    dims = toy_dims(toy_bundle, batch, branches, frames)
    denoiser = Denoiser(OnnxRuntimeBackend(toy_bundle), toy_bundle.manifest, dims)
    rng, rows = np.random.default_rng(0), dims["model_batch"]
    for _ in range(2):  # the second round must not see anything of the first
        ids, mask = rng.integers(0, 8, (rows, 5)), rng.integers(0, 2, (rows, 5))
        micro, time = rng.random((rows, 6), dtype=np.float32), rng.random(rows, dtype=np.float32)
        x = rng.standard_normal(denoiser.model_input.shape, dtype=np.float32)
        denoiser.set_text(ids, mask)
        denoiser.set_micro(micro)
        denoiser.backend.write(denoiser.model_input, x)
        denoiser.backend.write(denoiser.timestep, time)
        denoiser()
        states, pooled = toy.text(ids, mask)
        wanted = toy.velocity(x, time, micro, states, mask, pooled, place(toy_bundle, dims))
        # About 20 fp32 operations on values below 8 on either side.
        np.testing.assert_allclose(denoiser.backend.read(denoiser.velocity), wanted, rtol=0, atol=8 * 40 * EPS)
        np.testing.assert_array_equal(denoiser.backend.read(denoiser.model_input), x)


def test_hook_sees_every_graph_once_a_call(toy_bundle: Bundle) -> None:
    ran: list[str] = []

    def hook(graph: str, call: Call) -> Call:
        def observed() -> None:
            call()
            ran.append(graph)

        return observed

    dims = toy_dims(toy_bundle, 1, 2)
    denoiser = Denoiser(OnnxRuntimeBackend(toy_bundle), toy_bundle.manifest, dims, hook)
    denoiser.set_text(np.zeros((2, 5), dtype=np.int64), np.ones((2, 5), dtype=np.int64))
    assert ran == ["text_encoder", "text_kv"]
    denoiser()
    assert ran[2:] == ["embed", "block_00", "block_01", "head"]


def test_clock_sums_seconds_by_graph_and_can_wait_for_the_device() -> None:
    waits: list[int] = []
    clock = GraphClock(lambda: waits.append(1))
    call = clock("head", lambda: None)
    call()
    call()
    assert len(waits) == 2
    assert clock.seconds["head"] == clock.total > 0
