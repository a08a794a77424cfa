"""Progressive initialization: who gives which weights, and what a model is worth right after it."""

from collections.abc import Callable

import pytest
import torch

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.initialization import initialize_from, is_temporal
from stiv_deploy.stiv_ref.model import Stiv

ModelFactory = Callable[..., Stiv]


def inputs(batch: int = 1) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 5, 12, generator=generator, dtype=torch.float64)
    mask = torch.ones(batch, 5, dtype=torch.int64)
    return torch.full((batch,), 0.3, dtype=torch.float64), torch.ones(batch, 6), text, mask, text.mean(1)


def video(frames: int, height: int = 8, width: int = 6) -> torch.Tensor:
    return torch.randn(1, frames, 4, height, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def without_time(model: Stiv) -> Stiv:
    """The model as it is right after T2I: temporal attention off, all frames at the same place."""
    for block in model.blocks:
        block.temporal_gate.zero_()
    model.frame_position.weight.zero_()
    return model


def test_spatial_and_temporal_weights_come_from_their_origins(random_model: ModelFactory) -> None:
    image, short = random_model(seed=1, temporal=False), random_model(seed=2)
    target = random_model(seed=3)
    filled = initialize_from(target, image, short)
    assert sorted(filled) == sorted(target.state_dict())
    for name, weight in target.state_dict().items():
        origin = short if is_temporal(name) else image
        assert torch.equal(weight, origin.state_dict()[name]), name
    assert {name.split(".")[0] for name in filled if is_temporal(name)} == {"blocks", "frame_position"}


def test_new_temporal_attention_is_silent(small_config: StivConfig, random_model: ModelFactory) -> None:
    """A fresh video model with an image model's weights gives the image model's answer for every frame."""
    image = random_model(seed=1, temporal=False)
    target = Stiv(small_config).initialize(torch.Generator().manual_seed(0)).double().requires_grad_(False)
    filled = initialize_from(target, image)
    assert not any(is_temporal(name) for name in filled)
    target.frame_position.weight.zero_()  # places of frames are new features, not silent
    clip = video(3)
    wanted = torch.cat([image(clip[:, [frame]], *inputs()) for frame in range(3)], dim=1)
    torch.testing.assert_close(target(clip, *inputs()), wanted)


@pytest.mark.parametrize("old", [1, 2, 4])
@pytest.mark.parametrize("new", [1, 2, 4])
def test_inflated_patches_give_the_same_answer_on_still_clips(random_model: ModelFactory, old: int, new: int) -> None:
    origin, target = without_time(random_model(seed=1, patch=(old, 2))), random_model(seed=2, patch=(new, 2))
    origin.head.out.weight.copy_(origin.head.out.weight.unflatten(0, (old, -1))[:1].repeat(old, 1, 1).flatten(0, 1))
    origin.head.out.bias.copy_(origin.head.out.bias.unflatten(0, (old, -1))[:1].repeat(old, 1).flatten(0, 1))
    initialize_from(target, origin)
    still = video(1).expand(1, 4, 4, 8, 6)
    torch.testing.assert_close(target(still, *inputs()), origin(still, *inputs()))


def test_inflation_keeps_the_first_answer_of_an_image_model(random_model: ModelFactory) -> None:
    image, target = random_model(seed=1, temporal=False), random_model(seed=2, patch=(2, 2))
    initialize_from(target, image)
    without_time(target)
    still = video(1)
    wanted = image(still, *inputs()).expand(1, 4, 4, 8, 6)
    torch.testing.assert_close(target(still.expand(1, 4, 4, 8, 6), *inputs()), wanted)


def test_full_blocks_are_new_where_the_origin_has_none(random_model: ModelFactory) -> None:
    origin, target = random_model(seed=1), random_model(seed=2, blocks=3, full_blocks=1)
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    filled = initialize_from(target, origin)
    fresh = {name for name in target.state_dict() if name not in filled}
    assert {name.rsplit(".", 1)[0].split(".")[0] for name in fresh} == {"blocks", "mask_token"}
    assert all(name == "mask_token" or name.startswith("blocks.2.") for name in fresh)
    assert all(torch.equal(before[name], target.state_dict()[name]) for name in fresh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 32, "heads": 2}, "its width is 32, the stage's model has 16"),
        ({"heads": 4}, "its heads is 4"),
        ({"latent_channels": 3}, "its latent_channels is 3"),
        ({"patch": (1, 1)}, "its spatial patch is 1"),
        ({"blocks": 3}, "it has 3 blocks"),
        ({"rope_theta": 50.0}, "its rope_theta is 50.0"),
        ({"cross_qk_norm": False}, "its cross_qk_norm is False, the stage's model has True"),
    ],
)
def test_origins_of_another_architecture_are_refused(
    random_model: ModelFactory, changes: dict[str, object], message: str
) -> None:
    target = random_model()
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        initialize_from(target, random_model(seed=4), random_model(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], weight) for name, weight in target.state_dict().items())
