"""Latents as pictures, by a linear map."""

import io

import numpy as np
from PIL import Image

from stiv_deploy.runtime.bundle.manifest import Preview
from stiv_deploy.runtime.pipeline.previews import MOST, preview_frames, preview_picture

PREVIEW = Preview(weights=((1.0, 0.0, 0.0), (0.0, 2.0, 0.0)), bias=(0.0, 0.0, -1.0), error=0.0)


def test_colours_by_hand() -> None:
    latents = np.zeros((1, 2, 1, 4), np.float32)
    latents[0, :, 0] = [[0.0, 1.0, -9.0, np.nan], [0.0, 0.25, 0.0, 0.0]]
    frames = preview_frames(latents, PREVIEW)
    assert frames.tolist() == [[[[128, 128, 0], [255, 191, 0], [0, 128, 0], [0, 0, 0]]]]


def test_of_many_frames_some_are_shown() -> None:
    latents = np.zeros((40, 2, 1, 1), np.float32)
    latents[:, 0] = np.linspace(-1, 1, 40, dtype=np.float32)[:, None, None]
    frames = preview_frames(latents, PREVIEW)[:, 0, 0, 0]
    assert (len(frames), frames[0]) == (MOST, 0)
    assert (np.diff(frames.astype(int)) > 0).all()


def test_a_picture_moves() -> None:
    latents = np.random.default_rng(0).standard_normal((5, 2, 4, 6), dtype=np.float32)
    with Image.open(io.BytesIO(preview_picture(latents, PREVIEW, 2.0))) as image:
        assert (image.format, image.size, image.n_frames) == ("WEBP", (6, 4), 5)
