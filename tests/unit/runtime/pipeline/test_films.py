"""Clips in: every format that is written is read back, in windows, fitted; what is no clip is one line."""

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.films import open_film
from stiv_deploy.runtime.pipeline.images import Fit
from stiv_deploy.runtime.pipeline.media import write_video

FRAMES = np.stack([np.full((8, 12, 3), (40 * index, 255 - 40 * index, 90), np.uint8) for index in range(5)])


@pytest.mark.parametrize(("name", "off"), [("a.webp", 0), ("a.gif", 2), ("a.mp4", 6), ("folder", 0)])
def test_what_was_written_is_read(tmp_path: Path, name: str, off: int) -> None:
    path = write_video(tmp_path / name, FRAMES, 8)
    film = open_film(path)
    windows = list(film.windows(2, 8, 12))
    assert film.frames == 5
    assert [len(window) for window in windows] == [2, 2, 1]
    read = np.concatenate(windows)
    assert read.dtype == np.uint8
    assert np.abs(read.astype(int) - FRAMES.astype(int)).max() <= off  # a palette; an H.264 of quality 10
    assert open_film(path).sha256 == film.sha256


def test_frames_are_fitted_and_a_cut_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    film = open_film(write_video(tmp_path / "a.webp", FRAMES, 8))
    with caplog.at_level(logging.WARNING):
        (cut,) = film.windows(9, 4, 4, Fit.CROP)
    assert cut.shape == (5, 4, 4, 3)
    assert len(caplog.records) == 1
    (padded,) = film.windows(9, 12, 12, Fit.PAD, "white")
    assert (padded[:, 0] == 255).all()
    with pytest.raises(RequestError, match=r"frame 0 is 12x8 \(width x height\), the video is 8x8; .* choose a fit"):
        list(film.windows(9, 8, 8))


@pytest.mark.parametrize("name", ["a.webp", "a.mp4", "folder"])
def test_a_clip_of_ours_is_read_as_it_was_made(tmp_path: Path, name: str) -> None:
    """Enlarged to be seen, and of odd sides, it says what it was."""
    small = FRAMES[:, :7, :9]
    record = json.dumps({"bundle": "0", "request": {"prompt": "", "height": 7, "width": 9}})
    film = open_film(write_video(tmp_path / name, small, 8, 5, record))
    (read,) = film.windows(9, 7, 9)
    assert np.abs(read.astype(int) - small.astype(int)).max() <= (6 if name == "a.mp4" else 0)
    with pytest.raises(RequestError, match="frame 0 is 9x7"):
        list(film.windows(9, 35, 45))


@pytest.mark.parametrize("record", ["{}", "[]", "x", '{"request": {"height": "7", "width": 9}}', '{"request": 3}'])
def test_a_foreign_comment_says_nothing(tmp_path: Path, record: str) -> None:
    (read,) = open_film(write_video(tmp_path / "a.webp", FRAMES, 8, 1, record)).windows(9, 8, 12)
    assert np.array_equal(read, FRAMES)


def test_a_folder_of_pictures_goes_by_name(tmp_path: Path) -> None:
    for index in (2, 0, 1):
        Image.fromarray(FRAMES[index]).save(tmp_path / f"b{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (window,) = open_film(tmp_path).windows(9, 8, 12)
    assert np.array_equal(window, FRAMES[:3])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mp4", None, "no such clip; give a video file, a GIF, a WebP or a folder of pictures"),
        ("a.mp4", b"not a video", "cannot be read as a video"),
        ("a.mp4", b"", "cannot be read as a video"),
        ("a.gif", b"GIF89a", "cannot be read as a clip"),
        ("a.png", b"x", "is a picture and a clip is wanted"),
        ("a.mp4", b"#EXTM3U\n/etc/passwd\n", "cannot be read as a video"),
        ("folder", [], "has no frames; give a clip"),
        ("folder", [b"x"], "a.png"),
    ],
)
def test_what_is_no_clip(tmp_path: Path, name: str, content: bytes | list[bytes] | None, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, list):
        path.mkdir()
        for each in content:
            (path / "a.png").write_bytes(each)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as caught:
        open_film(path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(RequestError, match="no such clip"):
        open_film(tmp_path / "a.mp4")
