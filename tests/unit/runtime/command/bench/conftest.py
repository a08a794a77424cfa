"""A machine on which nothing else runs."""

import sys
from pathlib import Path

import pytest

from stiv_deploy.runtime.command.bench.machine import LoadMeter

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs on this machine, whatever does."""
    monkeypatch.setattr(LoadMeter, "others", lambda _: 0.0)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.stage.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.measure.GETS_FASTER", 1.0)
