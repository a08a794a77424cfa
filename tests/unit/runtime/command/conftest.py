"""The command, run in this process."""

import signal
import sys
from collections.abc import Callable, Iterator

import pytest

from stiv_deploy.runtime import GenerationPlan, GenerationRequest, StivPipeline
from stiv_deploy.runtime.command.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run ``stiv`` in this process: exit code, stdout, stderr."""
    handler = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", *map(str, arguments)])
        code = main()
        return code, *capsys.readouterr()

    yield call
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[GenerationRequest]:
    """The requests that commands plan."""
    seen: list[GenerationRequest] = []
    original = StivPipeline.plan

    def spy(self: StivPipeline, requests: list[GenerationRequest]) -> GenerationPlan:
        seen[:] = requests
        return original(self, requests)

    monkeypatch.setattr(StivPipeline, "plan", spy)
    return seen
