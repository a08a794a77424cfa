"""``stiv data world``."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from stiv_deploy.stiv_ref.commands.data import data
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.errors import StivRefError


def run(*arguments: object) -> None:
    CliRunner().invoke(data, ["world", *map(str, arguments)], catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize(("frames", "stride"), [(4, 3), (1, 1)])
def test_a_sheet_shows_the_clips_and_their_captions(tmp_path: Path, frames: int, stride: int) -> None:
    run(tmp_path / "world.png", "--count", 3, "--frames", frames, "--stride", stride)
    with Image.open(tmp_path / "world.png") as image:
        captions = json.loads(image.info["stiv"])["captions"]
    (text,) = captions[:1]
    assert len(captions) == 3
    assert text.endswith(" (stride 3)") == (stride == 3)
    if frames == 1:
        assert text == World(frames=1, split="test").clip(0).caption.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", 40), "multiples of 16 pixels from 32 on, got 40"),
        (("--stride", 0), "strides.0: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(StivRefError, match=message):
        run(tmp_path / "world.png", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StivRefError, match="cannot be written"):
        run(tmp_path / "no" / "world.png", "--count", 1, "--frames", 1)
