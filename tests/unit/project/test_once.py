"""What tests share: made once, whole, by whoever asks first."""

from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

Once = Callable[[str | Path, Callable[[Path], object]], Path]


def test_all_who_ask_at_once_get_what_one_made(once: Once) -> None:
    made: list[Path] = []
    found: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.mkdir()
        (path / "file").write_text("whole")

    askers = [Thread(target=lambda: found.append(once("test of many", make))) for _ in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(made) == 1
    assert found == made * 4
    assert (made[0] / "file").read_text() == "whole"


def test_what_failed_is_made_again_from_nothing(once: Once) -> None:
    def fail(path: Path) -> None:
        (path / "half").mkdir(parents=True)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        once("test of failure", fail)
    assert not list(once("test of failure", Path.mkdir).iterdir())
