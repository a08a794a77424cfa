"""Files written whole or not at all, and libraries kept quiet for a while."""

import logging
import os
import warnings
from pathlib import Path

import pytest

from stiv_deploy.stiv_ref.files import make_writable, replaced_file, write_text
from stiv_deploy.stiv_ref.quiet import quiet


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replaced_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with replaced_file(path) as temporary:
            temporary.write_text("half")
            raise failure

    with pytest.raises(failure):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_text_is_utf_8(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "ä\n")
    assert (tmp_path / "file").read_bytes() == "ä\n".encode()


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    make_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        make_writable(tmp_path / "file")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only to the administrator")
def test_a_folder_that_takes_no_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        make_writable(tmp_path)


def test_remarks_come_back_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("somebody.elses")
    logger.setLevel(logging.INFO)

    def work() -> None:
        with quiet(logger.name):
            logger.warning("kept off")
            logger.error("an error")
            raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        work()
    logger.info("heard again")
    assert caplog.messages == ["an error", "heard again"]


def test_warnings_are_kept_off() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with quiet("somebody.elses"):
            warnings.warn("kept off", stacklevel=1)
        warnings.warn("heard", stacklevel=1)
    assert [str(each.message) for each in seen] == ["heard"]
