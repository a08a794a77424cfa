"""Loss curve and contact sheet."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.plots import Row, contact_sheet, plot_loss, read_log, smooth


def write_log(path: Path, entries: list[tuple[int, str, int, float]], tail: str = "") -> Path:
    lines = [json.dumps({"stage": s, "task": t, "step": n, "loss": x}) for s, t, n, x in entries]
    path.write_text("\n".join(lines) + "\n" + tail)
    return path


def test_a_resumed_log_counts_each_step_once_and_a_torn_line_not(tmp_path: Path) -> None:
    entries = [(1, "t2i", 0, 2.0), (1, "t2i", 1, 1.5), (1, "t2i", 1, 1.4), (0, "vae", 0, 9.0)]
    log = write_log(tmp_path / "log.jsonl", entries, '{"stage": 1, "ta')
    got = read_log(log)
    assert list(got) == [(0, "vae"), (1, "t2i")]
    assert got[1, "t2i"].tolist() == [[0, 2.0], [1, 1.4]]


def test_smoothing_is_a_trailing_mean() -> None:
    np.testing.assert_allclose(smooth(np.array([1.0, 3, 5, 7]), 2), [1, 2, 4, 6])
    np.testing.assert_allclose(smooth(np.array([4.0, 2])), [4, 3])


def test_loss_curve_is_a_picture(tmp_path: Path) -> None:
    log = write_log(
        tmp_path / "log.jsonl", [(s, t, n, 1 / (n + 1)) for s, t in ((0, "vae"), (1, "t2i")) for n in range(90)]
    )
    plot_loss(log, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.format == "PNG"
        assert image.width > image.height
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "loss.png"]


def test_no_log_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(StivRefError, match="cannot read the training log"):
        plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(StivRefError, match="the training log is empty"):
        plot_loss(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_contact_sheet_shows_every_frame_and_mark(tmp_path: Path) -> None:
    levels = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3, 1, 1, 1)
    videos = np.broadcast_to(levels, (2, 3, 3, 8, 8)) * np.array([1, 0, 0], np.float32).reshape(3, 1, 1)
    rows = [
        Row(video=videos[0], caption="digit one", mark="right"),
        Row(video=videos[1], caption="digit two", mark="wrong"),
        Row(video=videos[1], caption="digit two"),
    ]
    contact_sheet(rows, tmp_path / "sheet.png", columns=1, heading="a heading")
    with Image.open(tmp_path / "sheet.png") as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 20) or []}
    for index in range(
        6
    ):  # each level is one frame of 8 x 8 pixels at zoom 2, red varying, green and blue at the middle
        red = round((levels.flat[index] + 1) * 127.5)
        assert colours[(red, 128, 128)] == (256 if index < 3 else 512)
    assert colours[(0x10, 0x7C, 0x10)] > 50
    assert colours[(0xC5, 0x0F, 0x1F)] > 50
