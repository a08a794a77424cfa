"""Whole files and folders of the runtime: one-line errors and drafts; the rest is tested for both sides at once, in
tests/unit/stiv_ref/test_files.py."""

from pathlib import Path

import pytest

from stiv_deploy.runtime.errors import OutputError, StivError
from stiv_deploy.runtime.files import draft, replaced_file, replaced_folder, write_text


@pytest.mark.parametrize("replaced", [replaced_file, replaced_folder])
def test_what_the_system_refuses_is_one_line_with_the_remedy(tmp_path: Path, replaced: object) -> None:
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "clip.mp4"
    with pytest.raises(OutputError, match="choose another") as caught, replaced(target, "choose another"):
        pytest.fail("there is no place for it")
    assert str(caught.value) == f"{target}: cannot be written (Not a directory); choose another"
    assert (tmp_path / "file").read_text() == ""


def test_errors_of_ours_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(StivError, match="^no encoder$"), replaced_file(tmp_path / "clip.mp4", "choose another"):
        raise StivError("no encoder")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_place_for_a_file_and_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "inside").touch()
    with pytest.raises(OutputError, match="kept: cannot be written"):
        write_text(tmp_path / "kept", "text")
    assert [path.name for path in tmp_path.rglob("*")] == ["kept", "inside"]


def test_drafts_of_one_target_are_two_and_vanish_unless_renamed(tmp_path: Path) -> None:
    target = tmp_path / "a.plan"
    with draft(target) as first, draft(target) as second:
        first.write_text("first")
        second.write_text("second")
        first.replace(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.plan"]
    assert target.read_text() == "first"


def test_a_linked_folder_is_replaced_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "disk" / "bundle").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "bundle")
    with replaced_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "disk" / "bundle").iterdir()] == ["new"]
