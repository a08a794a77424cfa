"""Files and folders written whole or not at all: the reference's and the runtime's, two by the law of imports."""

import hashlib
import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

import pytest

from stiv_deploy.runtime import files as runtime_files
from stiv_deploy.stiv_ref import files as reference_files
from stiv_deploy.stiv_ref.commands.terminal import check_json
from stiv_deploy.stiv_ref.errors import OutputError

both = pytest.mark.parametrize("files", [reference_files, runtime_files], ids=["stiv_ref", "runtime"])
interruptions = pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def leave_half(writing: AbstractContextManager[Path], error: type[BaseException]) -> None:
    with writing as temporary:
        (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
        raise error


@both
def test_hash_of_a_file(files: ModuleType, tmp_path: Path) -> None:
    content = b"weights" * 100_000
    (tmp_path / "file").write_bytes(content)
    assert files.sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    with pytest.raises(OSError, match="absent"):
        files.sha256(tmp_path / "absent")


@both
def test_a_file_appears_when_it_is_complete(files: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    target.write_text("old")
    with files.replaced_file(target) as temporary:
        assert temporary.name == "clip.mp4", "what encoders go by"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert names(tmp_path) == ["clip.mp4"]
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode, "others may read it as any file"


@both
@interruptions
def test_a_failed_file_leaves_the_old_one_and_nothing_else(
    files: ModuleType, tmp_path: Path, error: type[BaseException]
) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(error):
        leave_half(files.replaced_file(target), error)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


@both
def test_text(files: ModuleType, tmp_path: Path) -> None:
    files.write_text(tmp_path / "text", "größer\n")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
    assert names(tmp_path) == ["text"]


@both
def test_a_folder_takes_the_place_of_the_old_one(files: ModuleType, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    for name in ("first", "second"):
        with files.replaced_folder(target) as folder:
            (folder / name).touch()
            assert folder != target
    assert names(tmp_path) == ["deep", "deep/bundle", "deep/bundle/second"]


@both
@interruptions
def test_a_failed_folder_leaves_the_old_one_and_nothing_else(
    files: ModuleType, tmp_path: Path, error: type[BaseException]
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    with pytest.raises(error):
        leave_half(files.replaced_folder(tmp_path / "bundle"), error)
    assert names(tmp_path) == ["bundle", "bundle/old"]


@both
def test_what_a_killed_process_left_of_a_folder_goes_with_the_next(files: ModuleType, tmp_path: Path) -> None:
    killed = files.replaced_folder(tmp_path / "bundle")
    (killed.__enter__() / "half").touch()  # and never left
    with files.replaced_folder(tmp_path / "bundle") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["bundle", "bundle/new"]


@both
def test_a_folder_that_cannot_be_renamed_brings_the_old_one_back(
    files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "old").touch()
    rename = Path.rename

    def refused(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(KeyboardInterrupt), files.replaced_folder(tmp_path / "bundle") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["bundle", "bundle/old"]


def test_a_folder_is_made_and_proven_writable(tmp_path: Path) -> None:
    reference_files.make_writable(tmp_path / "runs" / "tiny")
    assert names(tmp_path) == ["runs", "runs/tiny"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=os.fspath(tmp_path / "file")):
        reference_files.make_writable(tmp_path / "file")


@both
@pytest.mark.parametrize("name", ["x" * 249 + ".onnx", "é" * 124 + ".mp4", "x" * 255])
def test_the_longest_names_are_written(files: ModuleType, tmp_path: Path, name: str) -> None:
    for text in ("old", "new"):
        files.write_text(tmp_path / name, text)
    assert (tmp_path / name).read_text() == "new"
    for text in ("old", "new"):
        with files.replaced_folder(tmp_path / "in" / name) as folder:
            (folder / text).touch()
    assert names(tmp_path / "in" / name) == ["new"]
    assert names(tmp_path) == sorted([name, "in", f"in/{name}", f"in/{name}/new"])


@both
@pytest.mark.parametrize("name", ["old", "new"])
def test_a_folder_may_have_any_name(files: ModuleType, tmp_path: Path, name: str) -> None:
    for inside in ("first", "second"):
        with files.replaced_folder(tmp_path / name) as folder:
            (folder / inside).touch()
    assert names(tmp_path) == [name, f"{name}/second"]


@both
def test_a_file_behind_a_link_is_replaced_where_it_lies_and_keeps_its_mode(files: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "blob", tmp_path / "clip.mp4"
    link.symlink_to(real)
    for text in ("made through a link that led nowhere", "replaced"):
        files.write_text(link, text)
        assert link.is_symlink()
        assert real.read_text() == text
    real.chmod(0o640)
    with files.replaced_file(link) as temporary:
        assert temporary.name == "clip.mp4", "what encoders go by"
        temporary.write_text("private")
    assert real.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["clip.mp4", "disk", "disk/blob"]


@both
def test_a_pipe_is_never_replaced(files: ModuleType, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Exception, match="it is a device or a pipe"):
        files.write_text(tmp_path / "pipe", "text")
    assert (tmp_path / "pipe").is_fifo()


def test_text_is_read_without_its_mark_and_what_is_none_is_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("\ufeffgrößer\n".encode())
    assert reference_files.read_text(path) == "größer\n"
    with pytest.raises(ValueError, match="^it is larger than 0 MiB$"):
        reference_files.read_text(path, 10)
    path.write_bytes(b"gr\xf6\xdfer")
    with pytest.raises(ValueError, match=r"^it is not UTF-8 text, its byte 2 is 0xf6$"):
        reference_files.read_text(path)
    for place, reason in ((tmp_path, "Is a directory"), (tmp_path / "absent", "No such file or directory")):
        with pytest.raises(ValueError, match=f"^{reason}$"):
            reference_files.read_text(place)


@pytest.mark.parametrize("text", ["[" * 50_000, "9" * 5_000, "{", '{"a": }' + " " * 1_000])
def test_json_that_is_none_is_said_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="^.{1,200}$"):
        reference_files.parse_json(text)


def test_a_name_in_another_spelling_is_the_same_name(tmp_path: Path) -> None:
    """A letter with a mark is one character (NFC) or two (NFD, as some systems write it)."""
    composed, decomposed = tmp_path / "caf\u00e9.txt", tmp_path / "cafe\u0301.txt"
    assert reference_files.same_name(composed) == composed, "nothing is there"
    decomposed.touch()
    assert reference_files.same_name(composed) == decomposed
    composed.touch()
    assert reference_files.same_name(composed) == composed
    assert not reference_files.is_file(tmp_path / ("x" * 300))


def test_a_report_goes_into_no_bundle(tmp_path: Path) -> None:
    for name, text in {"bundle": '{"format_version": 2, "graphs": {}}', "other": "[]"}.items():
        (tmp_path / name / "onnx").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match="new.json: cannot be written .it is in the bundle .*; name a file"):
        check_json(tmp_path / "bundle" / "onnx" / "new.json")
    check_json(tmp_path / "other" / "new.json")
