"""Capture in the second run, by a backend that records what it is asked."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from stiv_deploy.runtime.backends.base import Call
from stiv_deploy.runtime.errors import CaptureError
from stiv_deploy.runtime.sampling.replay import REPLAY, Replay


class Recorder:
    """Stands in for a backend: its replays are told from plain runs."""

    captures = True

    def __init__(self, refuse: bool = False) -> None:
        self.refuse = refuse
        self.ran: list[str] = []

    def call(self, name: str) -> Call:
        return lambda: self.ran.append(name)

    def capture(self, calls: Sequence[Call]) -> Call:
        self.ran.append("capture")
        if self.refuse:
            raise CaptureError("this engine cannot be captured")
        return lambda: self.ran.append(f"replay of {len(calls)}")


def test_hooks_see_every_call_and_replays_as_one() -> None:
    seen: list[str] = []
    backend = Recorder()

    def hook(name: str, call: Call) -> Call:
        return lambda: (seen.append(name), call())[1]

    run = Replay(backend, {name: backend.call(name) for name in "ab"}, hook)
    run()
    run()
    assert seen == ["a", "b", REPLAY]


def replay(backend: Any, **options: bool) -> Replay:
    return Replay(backend, {name: backend.call(name) for name in "ab"}, **options)


def test_runs_then_captures_then_replays() -> None:
    backend = Recorder()
    run = replay(backend)
    run()
    assert backend.ran == ["a", "b"], "graphs set themselves up in their first run"
    run()
    run()
    assert backend.ran[2:] == ["capture", "replay of 2", "replay of 2"]
    assert run.captured
    assert run.refused is None


def test_a_refusal_is_said_once_and_the_calls_go_on(caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder(refuse=True)
    run = replay(backend)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            run()
    assert backend.ran == ["a", "b", "capture", "a", "b", "a", "b"]
    assert run.refused == "this engine cannot be captured"
    assert not run.captured
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("wanted", "can"), [(False, True), (True, False)])
def test_without_capture_the_calls_run_as_they_are(wanted: bool, can: bool) -> None:
    backend = Recorder()
    backend.captures = can
    run = replay(backend, capture=wanted)
    for _ in range(3):
        run()
    assert backend.ran == ["a", "b"] * 3
