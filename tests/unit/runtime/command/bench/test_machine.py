"""What else runs, by counters that say what they should."""

import itertools

import pytest

from stiv_deploy.runtime.command.bench.machine import LoadMeter, busy_seconds, machine, own_seconds, versions


def test_others_are_what_is_busy_and_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    counters = [itertools.count(start, step).__next__ for start, step in ((100, 6), (10, 2), (0, 10))]
    # in 10 seconds 6 of busy cores, 2 of them ours: 4 of 40
    assert LoadMeter(*counters).others() == pytest.approx(0.1)
    frozen = [itertools.repeat(0.0).__next__] * 3
    assert LoadMeter(*frozen).others() == 0.0


def test_our_own_work_is_not_others() -> None:
    before = busy_seconds(), own_seconds()
    sum(each * each for each in range(600_000))
    assert own_seconds() - before[1] > 0
    assert busy_seconds() >= before[0]


def test_the_machine_and_its_libraries() -> None:
    assert machine().cores > 0
    assert {"python", "numpy", "onnxruntime", "stiv-deploy"} <= versions().keys()
