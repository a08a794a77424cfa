"""What calibration asks for by itself: prompts and first frames of the drawn data whose words a checkpoint has."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.data.digit_requests import DigitRequests, balanced_requests, real_clips
from stiv_deploy.stiv_ref.data.moving_digits import DIGIT_WORDS, DIRECTIONS, WORDS
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.digit_canvas import SIZE
from stiv_deploy.stiv_ref.text import END, PAD, UNKNOWN
from stiv_deploy.stiv_ref.world_settings import EASY, LEAST_SIDE, SIDE

SCENES = 40
"""Scenes of the world that are asked for; of the digits it is one of each caption."""


class KnownData(NamedTuple):
    """Drawn data: its words, and prompts and first frames fp32 [N, 3, H, W] in [-1, 1] of it, by a seed."""

    words: frozenset[str]
    prompts: Callable[[Checkpoint, int], list[str]]
    images: Callable[[Checkpoint, int], Tensor]
    drawn_at: Callable[[int], bool]
    """Whether it is drawn at that height and width in pixels."""


def default_prompts(checkpoint: Checkpoint, seed: int) -> list[str]:
    """Captions of the data that the checkpoint was trained on; :class:`CalibrationError` if it knows other words."""
    data = _known(checkpoint)
    if data is None:
        raise CalibrationError(
            "this checkpoint was trained neither on the world nor on the moving digits, so there are no default "
            "prompts; give --prompts FILE"
        )
    return data.prompts(checkpoint, seed)


def default_images(checkpoint: Checkpoint, seed: int) -> Tensor:
    """First frames fp32 [40, 3, H, W] in [-1, 1] of training clips with the captions of :func:`default_prompts`.

    Raises :class:`CalibrationError` if the checkpoint was not trained on data that is known, or at another size.
    """
    data, sampling = _known(checkpoint), checkpoint.config.sampling
    square = sampling.height == sampling.width
    if data is None or not square or not data.drawn_at(sampling.height):
        raise CalibrationError(
            "this checkpoint was trained neither on the world nor on the moving digits at their size, so there are no "
            "default first frames; give --images FOLDER"
        )
    return data.images(checkpoint, seed)


def _known(checkpoint: Checkpoint) -> KnownData | None:
    own = set(checkpoint.tokenizer.get_vocab()) - {PAD, UNKNOWN, END}
    return next((data for data in KNOWN if own == data.words), None)


def _digits(checkpoint: Checkpoint) -> DigitRequests:
    moving = checkpoint.config.model.temporal
    return balanced_requests(len(DIGIT_WORDS) * (len(DIRECTIONS) if moving else 1), moving=moving)


def _digit_images(checkpoint: Checkpoint, seed: int) -> Tensor:
    frames = checkpoint.config.sampling.frames
    return real_clips(_digits(checkpoint), frames, split="train", seed=seed)[:, 0]


def _scenes(checkpoint: Checkpoint, seed: int, side: int = SIDE) -> list[WorldClip]:
    world = World(EASY, frames=checkpoint.config.sampling.frames, side=side, seed=seed)
    return [world.clip(index) for index in range(SCENES)]


def _scene_images(checkpoint: Checkpoint, seed: int) -> Tensor:
    scenes = _scenes(checkpoint, seed, checkpoint.config.sampling.height)
    first = torch.from_numpy(np.stack([clip.frames[0] for clip in scenes]))
    return first.permute(0, 3, 1, 2).float() / 127.5 - 1


KNOWN = (
    KnownData(
        words=frozenset(WORDS),
        prompts=lambda checkpoint, _: _digits(checkpoint).prompts,
        images=_digit_images,
        drawn_at=lambda side: side == SIZE,
    ),
    KnownData(
        words=frozenset(words()),
        prompts=lambda checkpoint, seed: [clip.caption.text for clip in _scenes(checkpoint, seed)],
        images=_scene_images,
        drawn_at=lambda side: side >= LEAST_SIDE and side % 16 == 0,
    ),
)
