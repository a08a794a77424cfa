from pathlib import Path

import pytest
from rich.console import Console

from stiv_deploy.export.demo import shared
from stiv_deploy.export.demo.shared import Demo


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    """A demo of the shipped checkpoint that says nothing."""
    return Demo(tmp_path, Path("checkpoints/world"), Console(quiet=True))


@pytest.fixture(autouse=True)
def _with_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "missing_library", lambda _: None)
