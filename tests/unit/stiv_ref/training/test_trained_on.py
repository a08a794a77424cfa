"""What a checkpoint tells that it was trained on."""

from typing import Any

import pytest

from stiv_deploy.stiv_ref.checkpoint import TrainedOn, read_checkpoint_config
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.trained_on import sampling_of, trained_on

STAGE = {"steps": 1, "batch": 1, "learning_rate": 1e-3}
STAGES: list[dict[str, Any]] = [
    {**STAGE, "task": "t2i", "data": "still"},
    {**STAGE, "task": "t2v", "data": "slow", "frames": 8, "buckets": [[16, 16], [16, 32]]},
    {**STAGE, "task": "ti2v", "data": "fast", "frames": 8, "resolution": [32, 32]},
    {**STAGE, "givings": {"first": 0.5, "ends": 0.5}, "data": "fast", "frames": 16, "resolution": [32, 32]},
]
CLIPS = {"kind": "videos", "path": "clips"}


@pytest.fixture
def staged(recipe: Recipe) -> Recipe:
    data = {"still": CLIPS, "slow": {**CLIPS, "strides": [1]}, "fast": {**CLIPS, "strides": [20, 3]}}
    return Recipe.model_validate({**recipe.model_dump(), "data": data, "stages": STAGES})


def test_the_stages_of_its_kind_so_far_each_thing_once(staged: Recipe) -> None:
    assert trained_on(staged, 1) == TrainedOn(
        tasks=("t2i",), givings=("none",), strides=(1,), sizes=((32, 32),), frames=(1,)
    )
    assert trained_on(staged, 4) == TrainedOn(
        tasks=("t2v", "ti2v", "mix"),
        givings=("none", "first", "ends"),
        strides=(1, 20, 3),
        sizes=((16, 16), (16, 32), (32, 32)),
        frames=(8, 16),
    )


def test_the_stride_to_sample_at_is_the_last_stages_smallest_or_the_recipes(staged: Recipe) -> None:
    assert [sampling_of(staged, number).stride for number in range(1, 5)] == [1, 1, 3, 3]
    asked = staged.model_copy(update={"sampling": staged.sampling.model_copy(update={"stride": 20})})
    assert [sampling_of(asked, number).stride for number in range(1, 5)] == [1, 20, 20, 20]


def test_a_run_writes_it(whole: Any) -> None:
    image = read_checkpoint_config(whole / "stages" / "1-t2i")
    final = read_checkpoint_config(whole / "checkpoint")
    assert image.trained is not None
    assert final.trained is not None
    assert (image.trained.tasks, final.trained.tasks, final.trained.givings) == (("t2i",), ("ti2v",), ("first",))
    assert (final.sampling.stride, final.trained.frames) == (1, (3,))
