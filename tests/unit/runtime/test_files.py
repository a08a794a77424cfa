"""Whole files and folders of the runtime: one-line errors and drafts; the rest is tested for both sides at once, in
tests/unit/stiv_ref/test_files.py."""

import os
from pathlib import Path

import pytest

from stiv_deploy.runtime.errors import OutputError, StivError, briefly, few, one_line
from stiv_deploy.runtime.files import (
    MIB,
    check_apart,
    check_file,
    check_folder,
    check_no_bundle,
    draft,
    make_folder,
    read_json,
    read_text,
    replaced_file,
    replaced_folder,
    write_text,
)


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


def test_text_is_read_without_its_mark(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("\ufeffgrößer".encode())
    assert read_text(tmp_path / "text") == "größer"


def test_text_that_cannot_be_read_is_told_in_words(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match="it is not UTF-8 text, its byte 2 is 0xf6"):
        read_text(tmp_path / "latin")
    (tmp_path / "large").write_bytes(bytes(MIB + 1))
    with pytest.raises(ValueError, match="it is larger than 1 MiB"):
        read_text(tmp_path / "large", MIB)
    for path, reason in (
        (Path("/dev/zero"), "larger than 1 MiB"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none", "No such file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "a\0b", "null byte"),
    ):
        with pytest.raises(ValueError, match=reason):
            read_text(path, MIB)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"a": ' * 50_000, "1" * 5000, "{", ""])
def test_json_that_no_parser_takes(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"^.{1,200}$"):
        read_json(tmp_path / "a.json")


def test_one_line_keeps_the_start_and_the_end() -> None:
    assert one_line(" a\n b\tc ") == "a b c"
    assert one_line("name\x1b[31m\udcff\0") == r"name\x1b[31m\udcff\x00"
    line = one_line(f"what is wrong: {'x' * 10_000}; what to do")
    assert len(line) == 500
    assert line.startswith("what is wrong: xxx")
    assert line.endswith("xxx; what to do")


def test_what_was_given_is_said_briefly() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert briefly("x") == "'x'"
    assert len(briefly("x" * 10**6)) == 80
    assert briefly(10**5000) == "a int that is too large to print"
    assert briefly(deep) == "a list that is too large to print"


def test_few_of_many_names() -> None:
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few([str(number) for number in range(1000)]) == "0, 1, 2 and 997 more"


def test_a_pipe_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for write in (check_file, lambda target: write_text(target, "text")):
        with pytest.raises(OutputError, match="pipe: cannot be written, it is a device or a pipe"):
            write(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the test is in: a file, a full folder, links in a circle."""
    (tmp_path / "here" / "full").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    Path("full", "inside").touch()
    Path("file").touch()
    Path("circle").symlink_to("circle")
    return tmp_path / "here"


FILES = [
    ("", "is a folder"),
    (".", "is a folder"),
    ("/", "is a folder"),
    ("full", "is a folder"),
    ("a\0b", "embedded null"),
    ("circle", "cannot be written"),
    ("absent/a.json", "the folder absent does not exist; make it first"),
    ("file/a.json", "does not exist"),
    ("/proc/a.json", "the folder /proc takes no files"),
    ("/dev/null", "is a device"),
    ("a" * 300, "File name too long"),
]
FOLDERS = [
    ("", "is the folder that you are in, or above it; choose another"),
    (".", "is the folder that you are in, or above it; choose another"),
    ("..", "is the folder that you are in, or above it; choose another"),
    ("/", "is the folder that you are in, or above it; choose another"),
    ("file", "this is a file and a folder is wanted"),
    ("file/deep/bundle", "the folder .*file takes no files"),
    ("/proc/deep/bundle", "the folder /proc takes no files"),
    ("/proc", "is a mounted folder, which cannot be replaced; name a folder in it"),
    ("a\0b", "embedded null"),
    ("circle", "cannot be written"),
    ("a" * 300, "File name too long"),
]


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("name", "words"), FILES, ids=[repr(name)[:20] for name, _ in FILES])
def test_no_place_for_a_file(name: str, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        check_file(Path(name))


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(("name", "words"), FOLDERS, ids=[repr(name)[:20] for name, _ in FOLDERS])
def test_no_place_for_a_folder(name: str, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        check_folder(Path(name))


def test_checks_leave_nothing_and_take_what_is_possible(places: Path) -> None:
    before = sorted(places.rglob("*"))
    for name in ("file", "new", "full/new"):
        check_file(Path(name))
    for name in ("full", "new", "new/deep"):
        check_folder(Path(name))
    assert sorted(places.rglob("*")) == before


def test_a_folder_is_made_where_one_can_be(places: Path) -> None:
    make_folder(Path("a/b"))
    make_folder(Path())
    assert list(Path("a/b").iterdir()) == []
    for name in ("file", "file/a", "/proc/a"):
        with pytest.raises(OutputError, match=f"{name}: cannot be written"):
            make_folder(Path(name))


def test_what_is_read_is_not_replaced(places: Path) -> None:
    Path("link").symlink_to("file")
    check_apart([Path("new"), None], [Path("file"), Path("full"), None])
    check_apart([Path("full/new")], [Path("full")])
    for target, given in (("file", "file"), ("link", "file"), ("file", "link"), ("full", "full/inside")):
        with pytest.raises(OutputError, match=f"{target}: would replace {given}, which is read; choose another"):
            check_apart([Path("new"), Path(target)], [Path("new2"), Path(given)])


def test_a_bundle_holds_its_own_files_only(tmp_path: Path) -> None:
    for name, text in {"bundle": '{"format_version": 8, "graphs": {}}', "other": '{"name": "x"}', "bad": "{"}.items():
        (tmp_path / name / "onnx").mkdir(parents=True)
        (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "bundle")
    for inside in ("bundle/tokenizer.json", "bundle/onnx/new.json", "link/new.json"):
        with pytest.raises(OutputError, match=f"{inside}: is in the bundle .*bundle, which holds its own files only"):
            check_no_bundle(tmp_path / inside)
    for outside in ("bundle.json", "other/a.json", "bad/onnx/a.json", "none/a.json"):
        check_no_bundle(tmp_path / outside)
