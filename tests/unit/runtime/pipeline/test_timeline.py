"""Chunks on disk: read by position, whole or not there, and those of one video only."""

from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.errors import OutputError, RequestError
from stiv_deploy.runtime.pipeline.timeline import Piece, Timeline, begun_seed, open_folder


def latents(*values: float) -> np.ndarray:
    return np.stack([np.full((4, 2, 3), value, np.float32) for value in values])


@pytest.fixture
def filled(tmp_path: Path) -> Timeline:
    """Positions 0, 2, 4 known as 0, 1, 2; 1 and 3 in a piece."""
    before = Timeline(tmp_path, [Piece("a.npy", (0, 1)), Piece("b.npy", (2,))])
    before.keep(before.pieces[0], latents(0, 2))
    before.keep(before.pieces[1], latents(4))
    timeline = Timeline(tmp_path, [Piece("c.npy", (1, 3))], before, {0: 0, 2: 1, 4: 2})
    timeline.keep(timeline.pieces[0], latents(1, 3))
    return timeline


def test_positions_are_found_wherever_they_are(filled: Timeline) -> None:
    assert len(filled) == 5
    assert [filled.read(position)[0, 0, 0] for position in range(5)] == [0, 1, 2, 3, 4]
    assert np.array_equal(filled.window([3, 0]), latents(3, 0))
    assert [window[:, 0, 0, 0].tolist() for window in filled.windows(2)] == [[0, 1], [2, 3], [4]]
    assert [filled.owner(position) for position in range(3)] == ["known", "c.npy", "known"]


def test_a_piece_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timeline = Timeline(tmp_path, [Piece("a.npy", (0,))])

    def broken(file: object, array: np.ndarray) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", broken)
    with pytest.raises(OutputError, match="No space left on device.*what is finished is kept"):
        timeline.keep(timeline.pieces[0], latents(1))
    assert not timeline.has(timeline.pieces[0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a finished chunk; remove it"),
        (b"\x93NUMPY\x01\x00v\x00{'descr'", "cannot be read as a finished chunk; remove it"),
        (latents(1, 2), "is no finished chunk of this video; remove it"),
        (latents(1).astype(np.float64), "is no finished chunk of this video; remove it"),
        (np.array([{}], dtype=object), "cannot be read as a finished chunk; remove it"),
    ],
)
def test_a_damaged_piece_is_named(tmp_path: Path, content: bytes | np.ndarray, message: str) -> None:
    timeline = Timeline(tmp_path, [Piece("a.npy", (0,))])
    path = tmp_path / "a.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content, allow_pickle=True)
    with pytest.raises(RequestError, match=f"a.npy: {message}"):
        timeline.read(0)


def test_a_folder_is_of_one_video(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "chunks"
    what = {"frames": 9, "template": {"seed": 3}, "passes": [1.5]}
    assert begun_seed(folder, 7) == 7
    open_folder(folder, what)
    open_folder(folder, what)
    assert begun_seed(folder, 7) == 3
    with pytest.raises(RequestError, match="holds finished chunks of another video; remove it, or choose another"):
        open_folder(folder, what | {"frames": 10})
    with pytest.raises(RequestError, match="is not empty, and holds no chunks of a video; choose another folder"):
        open_folder(tmp_path, what)
    (folder / "chunks.json").write_text("[")
    assert begun_seed(folder, 7) == 7
    with pytest.raises(RequestError, match="of another video"):
        open_folder(folder, what)
