"""Which files are videos: by their names, through links, once each; what is none is counted and named."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stiv_deploy.stiv_ref.data.video_files import VideoFiles, find_videos, list_videos
from stiv_deploy.stiv_ref.errors import VideoError


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_list_videos(tmp_path: Path) -> None:
    touch(tmp_path, "b.mp4", "a/c.MKV", "a/notes.txt", ".hidden/d.mp4", "a/._c.mkv")
    assert list_videos(tmp_path) == ["a/c.MKV", "b.mp4"]
    with pytest.raises(VideoError, match="no such folder"):
        list_videos(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(VideoError, match="no videos in this folder; wanted are .3g2, .3gp, .asf, .avi"):
        list_videos(tmp_path / "none")


@pytest.mark.parametrize("suffix", [".wmv", ".flv", ".mts", ".M2TS", ".3gp", ".3g2", ".asf", ".vob", ".mxf"])
def test_containers_of_cameras_and_old_ones_are_taken(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a{suffix}")
    assert list_videos(tmp_path) == [f"a{suffix}"]


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.mp4", "a.txt", "captions.jsonl", "b.rmvb", "in/c.rmvb", "d.WAV", "README", "4321.rmvb")
    found = find_videos(tmp_path)
    assert found.others == ["4321.rmvb", "README", "b.rmvb", "d.WAV", "in/c.rmvb"]
    assert found.left_out() == {
        "*": "1 left out, as no video is called so (README)",
        "*.rmvb": "3 left out, as no video is called so (4321.rmvb, b.rmvb, in/c.rmvb)",
        "*.wav": "1 left out, as no video is called so (d.WAV)",
    }
    assert VideoFiles((), ()).left_out() == {}
    touch(tmp_path, "only/x.rmvb")
    with pytest.raises(VideoError, match=r"no videos in this folder; .*; \*\.rmvb: 1 left out"):
        find_videos(tmp_path / "only")


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.mp4", "locked/b.mp4")
    original = Path.iterdir

    def iterdir(folder: Path) -> Iterator[Path]:
        if folder.name == "locked":
            raise PermissionError(13, "Permission denied")
        return original(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = find_videos(tmp_path)
    assert (found.videos, found.others) == (["a.mp4"], ["locked"])


def test_linked_folders_are_walked_once(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere", "far.mp4", "deep/er.mp4")
    touch(tmp_path / "videos", "a.mp4", "z/own.mp4")
    (tmp_path / "videos" / "a_link").symlink_to("z")  # inside: counts under its own name
    (tmp_path / "videos" / "loop").symlink_to(".")
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "videos")
    (tmp_path / "videos" / "file.mp4").symlink_to(tmp_path / "elsewhere" / "far.mp4")
    (tmp_path / "videos" / "gone.mp4").symlink_to("nowhere")
    wanted = ["a.mp4", "file.mp4", "gone.mp4", "linked/deep/er.mp4", "linked/far.mp4", "z/own.mp4"]
    assert list_videos(tmp_path / "videos") == wanted
