"""``benchmarks/serve_forms.py``: simulated servers; what the times say is held against both fixed forms."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from stiv_deploy.serving.store.jobs import Job, Measured, Size
from stiv_deploy.serving.workers.order import AGEING

SIZE = Size(20, 512, 512)


def calls(*alone: float, together: float, devices: int) -> list[Measured]:
    """Seconds of calls for 1, 2, 4, 8 clips on one GPU, and for one clip on ``devices``."""
    found = [Measured(SIZE, 2 * 2**index, seconds) for index, seconds in enumerate(alone)]
    return [*found, Measured(SIZE, 2, together, devices)]


FULL = (calls(1.0, 2.0, 4.0, 8.0, together=0.2, devices=8), 8)
"""One clip fills a GPU, and links lose much."""
IDLE = (calls(1.0, 1.2, 1.8, 3.2, together=0.4, devices=4), 4)
"""One clip leaves a GPU idle."""
PAIR = (calls(1.0, 1.6, 2.8, 5.4, together=0.7, devices=2), 2)


@pytest.fixture(scope="session")
def forms(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("serve_forms")


@pytest.mark.parametrize(("costs", "devices"), [FULL, IDLE, PAIR], ids=["full", "idle", "pair"])
@pytest.mark.parametrize("load", [0.1, 0.5, 0.8])
def test_it_is_at_least_about_as_good_as_the_better_form(
    forms: ModuleType, costs: list[Measured], devices: int, load: float
) -> None:
    """Mean seconds without deadlines, at most a tenth more than of the better one; and deadlines met."""
    jobs = forms.clips(SIZE, 1.0, devices, load, 200, seed=1)
    met = {name: each["met"] for name, each in forms.told(costs, devices, jobs).items()}
    assert met["measured"] >= max(met["apart"], met["together"]) - 0.02
    calm = [replace(job, due=None) for job in jobs]
    seconds = {name: each["seconds"] for name, each in forms.told(costs, devices, calm).items()}
    assert seconds["measured"] <= 1.1 * min(seconds["apart"], seconds["together"])


def test_it_beats_both_where_work_comes_in_bursts(forms: ModuleType) -> None:
    costs, devices = IDLE
    jobs = [replace(job, due=None) for job in forms.clips(SIZE, 1.0, devices, 0.5, 200, seed=1)]
    seconds = {name: each["seconds"] for name, each in forms.told(costs, devices, jobs).items()}
    assert seconds["measured"] < 0.95 * min(seconds["apart"], seconds["together"])


JOBS = st.lists(
    st.tuples(st.floats(0.0, 200.0), st.integers(1, 60), st.none() | st.floats(1.0, 60.0), st.integers(0, 3)),
    min_size=1,
    max_size=25,
)


@settings(deadline=None, max_examples=40)
@given(JOBS, st.sampled_from([FULL, IDLE, PAIR]))
def test_nobody_starves(forms: ModuleType, asked: list[tuple[float, int, float | None, int]], hall: object) -> None:
    """All are made; a clip that runs stands still for no longer than it moves, and one clip of all GPUs."""
    costs, devices = hall  # type: ignore[misc]
    jobs = [job_of(number, *each) for number, each in enumerate(asked)]
    made = forms.Hall(costs, devices, forms.FORMS["measured"])
    done = made.make(jobs)
    assert done.keys() == {job.id for job in jobs}
    for job, seconds in made.stood.items():
        assert seconds <= made.moved[job] + made.longest + 1e-6
    for job in jobs:
        assert done[job.id] >= job.steps * min(each.seconds for each in costs) - 1e-6


def job_of(number: int, created: float, steps: int, seconds: float | None, priority: int) -> Job:
    due = None if seconds is None else created + seconds
    plain = Job(id=str(number), owner="", created=created, rows=2, evaluations=steps, steps=steps, **SIZE._asdict())
    return replace(plain, due=due, priority=priority)


def test_a_stream_of_urgent_clips_keeps_nobody_waiting_for_ever(forms: ModuleType) -> None:
    costs, devices = IDLE
    urgent = [job_of(number, 2.0 * number, 10, 6.0, 0) for number in range(300)]
    calm = job_of(1000, 1.0, 10, None, 0)
    made = forms.Hall(costs, devices, forms.FORMS["measured"])
    done = made.make([*urgent, calm])
    assert done[calm.id] < AGEING + 2 * 10 * 3.2 + made.longest


def test_the_command_predicts_and_writes(forms: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "forms.json"
    app = typer.Typer()
    app.command()(forms.main)
    found = CliRunner().invoke(app, ["M", "--count", "20", "--out", str(out)], catch_exceptions=False)
    told = json.loads(out.read_text())
    assert found.output.count("\n") == 2 * len(told["rows"]) == 10
    assert told["calls"][1][2] == 4
    low = told["rows"][0]["calm"]
    assert low["measured"]["seconds"] < 0.5 * low["apart"]["seconds"]
