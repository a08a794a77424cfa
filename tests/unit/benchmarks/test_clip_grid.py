"""The README's picture: what its file is, and that it shows all of the world."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime.pipeline.grid import GAP, grid
from stiv_deploy.stiv_ref.data.world.captions import COLOURS, verbs, words
from stiv_deploy.stiv_ref.world_settings import EASY, SHAPES

BenchmarkModule = Callable[[str], ModuleType]
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture
def script(benchmark_module: BenchmarkModule) -> ModuleType:
    return benchmark_module("clip_grid")


def clip(*colors: tuple[int, int, int]) -> np.ndarray:
    """A clip of 8x8 pixels, one frame of each color."""
    return np.broadcast_to(np.array(colors, np.uint8)[:, None, None], (len(colors), 8, 8, 3))


def test_the_file_is_an_endless_animation_that_waits_at_its_end(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "clips.webp"
    script.write_webp(path, grid([clip(RED, BLUE, RED)], ["red"], 5), fps=8)
    with Image.open(path) as image:
        durations, colors = [], []
        for index in range(image.n_frames):
            image.seek(index)
            image.load()  # its duration is known from then on
            durations.append(image.info["duration"])
            colors.append(image.convert("RGB").getpixel((GAP + 20, GAP + 20)))
        assert image.info["loop"] == 0
    assert durations == [125, 125, script.HOLD_MS]
    assert np.abs(np.subtract(colors, [RED, BLUE, RED])).max() < 20


def test_every_shape_colour_and_motion_that_the_model_knows_is_asked_for_in_known_words(script: ModuleType) -> None:
    used = {word for prompt in script.PROMPTS for word in prompt.split()}
    assert used <= set(words())
    assert {*SHAPES, *COLOURS} <= used
    wordings = {motion: [wording for pair in verbs(motion) for wording in pair] for motion in EASY.motions}
    assert all(any(wording in prompt for wording in known for prompt in script.PROMPTS) for known in wordings.values())
