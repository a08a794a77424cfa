from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.prompts import prompts_hash, read_images, read_prompts


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat"]


def test_prompts_are_lines_that_are_not_empty(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  ein Häuschen \r\n", encoding="utf-8")
    assert read_prompts(file) == ["a cat", "ein Häuschen"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\n \n", "no prompts in it"), (b"\xff\xfe\xfa", "cannot be read"), (None, "cannot be read")],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_prompts(file)


def test_the_hash_is_that_of_the_prompts_in_their_order() -> None:
    hashes = {prompts_hash(prompts) for prompts in (["a", "b"], ["b", "a"], ["a"], ["a", "b", ""])}
    assert len(hashes) == 4
    assert all(len(each) == 64 for each in hashes)


def test_images_are_read_by_name_and_fitted(tmp_path: Path) -> None:
    for name, value, size in (("b.PNG", 255, (64, 64)), ("a.jpg", 0, (20, 40))):
        Image.fromarray(np.full((*size, 3), value, np.uint8)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    images = read_images(tmp_path, 32, 48)
    assert images.shape == (2, 3, 32, 48)
    assert images[0].max() < -0.95
    assert images[1].min() == 1


def test_images_are_read_as_those_of_a_generation(tmp_path: Path) -> None:
    clear = np.full((32, 32, 4), (255, 255, 255, 0), np.uint8)
    Image.fromarray(clear).save(tmp_path / "a.png")
    Image.fromarray(np.full((32, 32), 128 * 257, np.uint16)).save(tmp_path / "b.tif")
    assert read_images(tmp_path, 32, 32)[:, 0, 0, 0].tolist() == pytest.approx([-1, 128 / 127.5 - 1], abs=2**-23)


def test_folders_without_readable_images(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no pictures in it \\(.png, .jpg,"):
        read_images(tmp_path, 32, 32)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(CalibrationError, match=r"torn\.png: not an image that can be read"):
        read_images(tmp_path, 32, 32)
