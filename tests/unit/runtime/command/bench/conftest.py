"""A machine on which nothing else runs."""

import sys
from pathlib import Path

import pytest

from stiv_deploy.runtime.command.bench import stage
from stiv_deploy.runtime.command.bench.machine import LoadMeter
from stiv_deploy.runtime.command.bench.record import Verification

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy bundle has no golden answers, and would have passed."""
    right = Verification(state="verified", reason="all was right")
    monkeypatch.setattr(stage, "verification", lambda _: right)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs on this machine, whatever does."""
    monkeypatch.setattr(LoadMeter, "others", lambda _: 0.0)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.stage.LOOK_SECONDS", 0.0)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.measure.GETS_FASTER", 1.0)
    monkeypatch.setattr("stiv_deploy.runtime.command.bench.measure.NARROW", 10.0)
