"""What calibration asks for by itself: captions and first frames of the data that a checkpoint was trained on."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.known_data import SCENES, default_images, default_prompts
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, SamplingDefaults
from stiv_deploy.stiv_ref.data.moving_digits import DIGIT_WORDS, DIRECTIONS, caption
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.text import word_tokenizer
from stiv_deploy.stiv_ref.world_settings import EASY


def knowing(checkpoint: Checkpoint, *known: str, side: int = 64) -> Checkpoint:
    """The checkpoint with a tokenizer of other words, sampled at another size."""
    sampling = SamplingDefaults(frames=3, height=side, width=side, frames_per_second=8)
    object.__setattr__(checkpoint, "tokenizer", word_tokenizer(known, 8))
    object.__setattr__(checkpoint, "config", checkpoint.config.model_copy(update={"sampling": sampling}))
    return checkpoint


def test_default_prompts_are_all_training_captions(micro: Checkpoint, image_checkpoint: Checkpoint) -> None:
    moving = {caption(digit, direction) for digit in range(len(DIGIT_WORDS)) for direction in DIRECTIONS}
    assert set(default_prompts(micro, 0)) == moving
    assert len(default_prompts(micro, 0)) == 40
    assert set(default_prompts(image_checkpoint, 0)) == {caption(digit, None) for digit in range(10)}


def test_default_images_are_training_frames_of_the_captions_digits(micro: Checkpoint) -> None:
    images = default_images(micro, 0)
    assert images.shape == (40, 3, 32, 32)
    assert images.min() == -1
    assert images.max() <= 1
    assert torch.equal(images, default_images(micro, 0))
    assert not torch.equal(images, default_images(micro, 1))


def test_of_the_world_they_are_of_the_same_training_clips(make_checkpoint: Callable[[], Checkpoint]) -> None:
    checkpoint = knowing(make_checkpoint(), *words(), side=48)
    clips = [World(EASY, frames=3, side=48, seed=5).clip(index) for index in range(SCENES)]
    assert default_prompts(checkpoint, 5) == [clip.caption.text for clip in clips]
    pixels = ((default_images(checkpoint, 5) + 1) * 127.5).round().permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels.numpy(), np.stack([clip.frames[0] for clip in clips]))
    assert default_prompts(checkpoint, 6) != default_prompts(checkpoint, 5)


def test_other_checkpoints_need_prompts_and_images(make_checkpoint: Callable[[], Checkpoint]) -> None:
    checkpoint = knowing(make_checkpoint(), "cat", "dog")
    with pytest.raises(CalibrationError, match="no default prompts; give --prompts FILE"):
        default_prompts(checkpoint, 0)
    with pytest.raises(CalibrationError, match="no default first frames; give --images FOLDER"):
        default_images(checkpoint, 0)


def test_sizes_that_the_world_is_not_drawn_at_need_images(make_checkpoint: Callable[[], Checkpoint]) -> None:
    checkpoint = knowing(make_checkpoint(), *words(), side=72)
    assert len(default_prompts(checkpoint, 0)) == SCENES
    with pytest.raises(CalibrationError, match="no default first frames; give --images FOLDER"):
        default_images(checkpoint, 0)
