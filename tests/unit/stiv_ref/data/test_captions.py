"""Captions: both forms, and a clear line for everything that can be wrong with them."""

import json
from pathlib import Path

import pytest

from stiv_deploy.stiv_ref.data.captions import known_captions, read_captions, read_clip_captions
from stiv_deploy.stiv_ref.errors import CaptionError, VideoError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos a.mp4, b.webm and deep/c.mp4; captions never open them."""
    folder = tmp_path / "videos"
    (folder / "deep").mkdir(parents=True)
    for name in ("b.webm", "a.mp4", "deep/c.mp4"):
        (folder / name).touch()
    return folder


def write_lines(folder: Path, *entries: object) -> Path:
    path = folder.parent / "captions.jsonl"
    lines = [entry if isinstance(entry, str) else json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


TEXTS = {"a.mp4": "one", "b.webm": "two", "deep/c.mp4": "3"}
ALL = tuple({"file": file, "caption": text} for file, text in TEXTS.items())


def test_sidecars(folder: Path) -> None:
    for name, text in (("a.txt", "\ufeffa red\n  ball\n"), ("b.txt", "ä b"), ("deep/c.txt", "c")):
        (folder / name).write_text(text, encoding="utf-8")
    captions = read_captions(folder)
    assert captions == {"a.mp4": "a red ball", "b.webm": "ä b", "deep/c.mp4": "c"}
    assert list(captions) == sorted(captions)


def test_jsonl(folder: Path) -> None:
    """In any order, with other keys and blank lines, and with what str.splitlines takes for the end of a line."""
    entries = ({**ALL[2], "score": 3}, "", {"file": "./b.webm", "caption": "two \u2028 lines"}, ALL[0])
    captions = read_captions(folder, write_lines(folder, *entries))
    assert list(captions.items()) == [("a.mp4", "one"), ("b.webm", "two lines"), ("deep/c.mp4", "3")]


NFC, NFD = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("there", "written"), [(NFD, NFC), (NFC, NFD)])
def test_a_name_in_another_spelling_is_the_same_name(folder: Path, there: str, written: str) -> None:
    """Some systems write a letter with a mark as one character, others as two."""
    (folder / f"{there}.mp4").touch()
    lines = write_lines(folder, *ALL, {"file": f"{written}.mp4", "caption": "coffee"})
    assert read_captions(folder, lines)[f"{there}.mp4"] == "coffee"
    (folder / f"{written}.txt").write_text("tea")
    assert known_captions(folder, [f"{there}.mp4"]) == {f"{there}.mp4": "tea"}


def test_both_spellings_may_be_two_files(folder: Path) -> None:
    entries = [{"file": f"{name}.mp4", "caption": text} for name, text in ((NFC, "one"), (NFD, "two"))]
    for name in (NFC, NFD):
        (folder / f"{name}.mp4").touch()
    captions = read_captions(folder, write_lines(folder, *ALL, *entries))
    assert (captions[f"{NFC}.mp4"], captions[f"{NFD}.mp4"]) == ("one", "two")


def test_with_jsonl_sidecars_do_not_count(folder: Path) -> None:
    (folder / "a.txt").write_text("other")
    assert read_captions(folder, write_lines(folder, *ALL))["a.mp4"] == "one"


def test_missing_ones_are_named_and_counted(folder: Path) -> None:
    with pytest.raises(CaptionError) as caught:
        read_captions(folder)
    assert str(caught.value) == (
        f"{folder}: 3 of 3 videos have no caption (a.mp4, b.webm, deep/c.mp4); "
        f"write {folder / 'a.txt'}, or move the video away"
    )
    (folder / "z.mp4").touch()
    path = write_lines(folder)
    with pytest.raises(CaptionError) as caught:
        read_captions(folder, path)
    assert "4 of 4 videos have no caption (a.mp4, b.webm, deep/c.mp4, ...); " in str(caught.value)
    assert f'add {{"file": "a.mp4", "caption": "..."}} to {path}' in str(caught.value)


def test_known_captions_leaves_the_missing_out(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    assert known_captions(folder, ["a.mp4", "b.webm"]) == {"a.mp4": "one"}
    assert known_captions(folder, ["a.mp4", "b.webm"], write_lines(folder, ALL[1])) == {"b.webm": "two"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "want {"),
        ('"a.mp4"', "want {"),
        ("{}", "want {"),
        ('{"file": "b.webm"}', "want {"),
        ('{"file": 3, "caption": "x"}', "want {"),
        ('{"file": "b.webm", "caption": null}', "want {"),
        ('{"file": "b.webm", "caption": " \\n"}', "the caption of 'b.webm' is empty"),
        ('{"file": "d.mp4", "caption": "x"}', "there is no video 'd.mp4' in "),
        ('{"file": "../a.mp4", "caption": "x"}', "there is no video '../a.mp4' in "),
        ('{"file": "a.mp4", "caption": "x"}', "'a.mp4' has a caption already"),
    ],
)
def test_bad_line(folder: Path, line: str, message: str) -> None:
    path = write_lines(folder, ALL[0], "", line, ALL[2])
    with pytest.raises(CaptionError) as caught:
        read_captions(folder, path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b" \n", "the caption is empty"), (b"\xff\xfe\x00", "it is not UTF-8")]
)
def test_bad_sidecar(folder: Path, content: bytes, message: str) -> None:
    (folder / "b.txt").write_bytes(content)
    with pytest.raises(CaptionError, match=message):
        read_captions(folder)


def test_no_such_file_and_no_such_folder(folder: Path) -> None:
    with pytest.raises(CaptionError, match="none.jsonl: cannot read the captions"):
        read_captions(folder, folder / "none.jsonl")
    with pytest.raises(VideoError, match="no such folder"):
        read_captions(folder / "none")


def test_clip_captions(folder: Path) -> None:
    """No video is looked for: the engine compares them with its clips."""
    one = {"file": "../v/a.mp4", "start": 0, "end": 9, "motion": 3, "caption": "one\n clip"}
    path = write_lines(folder, one, "", {**one, "start": 9, "end": 12, "caption": "two"}, {**one, "caption": None})
    assert read_clip_captions(path) == {("../v/a.mp4", 0, 9): "one clip", ("../v/a.mp4", 9, 12): "two"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": None}, "start and end are None and 9; want {"),
        ({"end": 9.5}, "start and end are 0 and 9.5; want {"),
        ({"start": True}, "start and end are True and 9; want {"),
        ({"caption": 7}, 'got {"file": "a.mp4"'),
        ({"file": None}, 'got {"file": null'),
        ({"caption": " "}, "the caption of 'a.mp4' is empty"),
        ({}, "'a.mp4' 0-9 has a caption already"),
    ],
)
def test_bad_clip_caption(folder: Path, changes: dict[str, object], message: str) -> None:
    one = {"file": "a.mp4", "start": 0, "end": 9, "caption": "one"}
    path = write_lines(folder, one, one | changes)
    with pytest.raises(CaptionError) as caught:
        read_clip_captions(path)
    assert str(caught.value).startswith(f"{path}, line 2: {message}")
