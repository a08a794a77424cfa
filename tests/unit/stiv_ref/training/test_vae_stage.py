"""What the small VAE sees: whole frames, or the busiest crops and then whole frames."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.recipe import TrainedVae
from stiv_deploy.stiv_ref.training.vae_stage import busiest_crop, seen


def settings_of(crop: int | None) -> TrainedVae:
    return TrainedVae(steps=100, batch=2, learning_rate=1e-3, crop=crop)


def generators(count: int) -> list[torch.Generator]:
    return [sample_generator(0, 0, 0, index) for index in range(count)]


@given(height=st.integers(8, 24), width=st.integers(8, 24), seed=st.integers(0, 1000))
def test_a_crop_is_a_piece_of_its_picture(height: int, width: int, seed: int) -> None:
    image = torch.arange(3.0 * height * width).reshape(3, height, width)  # every value tells its place
    crop = busiest_crop(image, 8, torch.Generator().manual_seed(seed))
    corner = int(crop[0, 0, 0])
    top, left = divmod(corner, width)
    assert torch.equal(crop, image[:, top : top + 8, left : left + 8])


def test_of_several_crops_the_busiest_is_taken() -> None:
    image = torch.zeros(3, 32, 32)
    image[:, 12:20, 12:20] = 1.0
    some = sum(busiest_crop(image, 8, torch.Generator().manual_seed(seed)).any().item() for seed in range(200))
    assert some / 200 > 0.6  # one crop has a part of the square in 36 %, four have in 83 %


def test_crops_come_first_and_whole_frames_last() -> None:
    images = torch.rand(2, 3, 16, 16)
    assert seen(images, settings_of(8), 84, generators(2)).shape == (2, 3, 8, 8)
    assert torch.equal(seen(images, settings_of(8), 85, generators(2)), images)
    assert torch.equal(seen(images, settings_of(None), 0, generators(2)), images)


def test_crops_depend_on_the_sample_alone() -> None:
    images = torch.rand(2, 3, 16, 16)
    both = seen(images, settings_of(8), 0, generators(2))
    alone = seen(images[1:], settings_of(8), 0, generators(2)[1:])
    assert torch.equal(both[1:], alone)


def test_a_crop_fits_the_factor() -> None:
    with pytest.raises(ValueError, match="crop 10 is not a multiple of 4 pixels"):
        settings_of(10)
