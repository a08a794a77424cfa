"""``stiv data world`` and ``stiv data views``."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from stiv_deploy.stiv_ref.commands.data import data
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.errors import StivRefError


def run(*arguments: object) -> None:
    CliRunner().invoke(data, list(map(str, arguments)), catch_exceptions=False, standalone_mode=False)


def captions_of(path: Path) -> list[str]:
    with Image.open(path) as image:
        captions: list[str] = json.loads(image.info["stiv"])["captions"]
    return captions


@pytest.mark.parametrize(("frames", "stride"), [(4, 3), (1, 1)])
def test_a_sheet_shows_the_clips_and_their_captions(tmp_path: Path, frames: int, stride: int) -> None:
    run("world", tmp_path / "world.png", "--count", 3, "--frames", frames, "--stride", stride)
    captions = captions_of(tmp_path / "world.png")
    (text,) = captions[:1]
    assert len(captions) == 3
    assert text.endswith(" (stride 3)") == (stride == 3)
    if frames == 1:
        assert text == World(frames=1, split="test").clip(0).caption.text


@pytest.mark.parametrize("frames", [1, 3])
def test_a_sheet_of_views_says_what_the_solids_are(tmp_path: Path, frames: int) -> None:
    run("views", tmp_path / "views.png", "--count", 2, "--frames", frames, "--size", 32)
    captions = captions_of(tmp_path / "views.png")
    assert len(captions) == 2
    assert all(text.endswith(" mark") for text in captions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("world", "--size", 40), "the world is .* multiples of 16 pixels from 32 on, got 40"),
        (("views", "--size", 40), "views are .* multiples of 16 pixels from 32 on, got 40"),
        (("world", "--stride", 0), "strides.0: Input should be greater than 0"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    command, *options = arguments
    with pytest.raises(StivRefError, match=message):
        run(command, tmp_path / "sheet.png", *options)
    assert list(tmp_path.iterdir()) == []


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(StivRefError, match="cannot be written"):
        run("world", tmp_path / "no" / "world.png", "--count", 1, "--frames", 1)
