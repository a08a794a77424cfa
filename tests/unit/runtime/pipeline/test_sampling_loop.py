"""Clips that take each step one after the other, over several batches: the same as together, and changed on the way."""

import itertools

import numpy as np
import pytest

from stiv_deploy.runtime import GenerationRequest, StivPipeline
from stiv_deploy.runtime.sampling.noise import draw_noise

PROMPT = "digit three moving left"
RED = np.zeros((8, 8, 3), dtype=np.uint8)
RED[..., 0] = 255
GREY = np.full((8, 8, 3), 51, dtype=np.uint8)


@pytest.mark.parametrize("solver", ["euler", "ab2"])
def test_clips_that_take_each_step_one_after_the_other_are_the_same(pipe: StivPipeline, solver: str) -> None:
    """Five clips in two batches, guided in all ways, some to an end, with given frames and zeroed ones."""
    options = {"solver": solver, "num_inference_steps": 4}
    requests = [
        GenerationRequest(prompt=PROMPT, seed=3, count=2, frames={0: RED}, **options),
        GenerationRequest(prompt="left", seed=3, guidance_mode="sit", guidance_until=0.4, frames={-1: GREY}, **options),
        GenerationRequest(prompt="left", seed=5, frames={0: RED}, unseen="zero", **options),
        GenerationRequest(prompt="", seed=3, guidance_mode="none", **options),
    ]
    plan = pipe.plan(requests)
    assert len(plan.batches) == 2
    seen: list[tuple[int, np.ndarray, np.ndarray]] = []

    def follow(step: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        seen.append((step, before, after))
        return after

    latents = pipe.sample_in_step(plan, follow)
    # Clips with fewer rows beside them are in calls of other sizes, whose sums round otherwise.
    np.testing.assert_allclose(latents, pipe.sample(plan), rtol=0, atol=1e-5)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    for (_, _, after), (_, before, _) in itertools.pairwise(seen):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(seen[0][1][0, 0], latents[0, 0], "a given frame, from the start")
    np.testing.assert_array_equal(seen[0][1][4], draw_noise([3], latents.shape[1:])[0])


def test_clips_in_step_go_on_from_where_they_are_told(pipe: StivPipeline) -> None:
    """By Euler's rule from there: AB2's weights after the fact are AB2."""
    times = (0.0, 0.25, 0.5, 0.75, 1.0)
    velocities: list[np.ndarray] = []

    def follow(step: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        velocities.append((after - before) / np.float32(times[step] - times[step - 1]))
        last = velocities[-2] if step > 1 else velocities[-1]
        return before + np.float32(0.25) * (np.float32(1.5) * velocities[-1] - np.float32(0.5) * last)

    euler, ab2 = (
        pipe.plan(
            GenerationRequest(prompt=PROMPT, seed=3, count=4, frames={1: RED}, num_inference_steps=4, solver=each)
        )
        for each in ("euler", "ab2")
    )
    np.testing.assert_allclose(pipe.sample_in_step(euler, follow), pipe.sample(ab2), rtol=0, atol=1e-4)
