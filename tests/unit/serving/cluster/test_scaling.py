"""How many workers: by the seconds of work that wait, more at once and fewer in time."""

import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "store"))
from store_jobs import submit

from stiv_deploy.serving.cluster.scaling import BACKLOG, CALM, QueuedCost, Scale, backlog, check_shared, crew_of
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.server import check_reachable
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.jobs import Measured
from stiv_deploy.serving.store.sqlite import SqliteJobStore


@dataclass
class Told:
    """What Ray Serve tells a policy."""

    aggregated_metrics: dict[str, dict[Any, float]] | None = None
    target_num_replicas: int = 2
    capacity_adjusted_min_replicas: int = 1
    capacity_adjusted_max_replicas: int = 8
    policy_state: dict[str, Any] = field(default_factory=dict)
    current_time: float | None = 0.0


def told(seconds: float, **rest: Any) -> Told:
    return Told({BACKLOG: {"a": seconds, "b": seconds / 2}}, **rest)


@pytest.mark.parametrize(("seconds", "workers"), [(61, 3), (100, 4), (1e9, 8), (60, 2), (31, 2)])
def test_more_workers_come_at_once(seconds: float, workers: int) -> None:
    assert QueuedCost(30)(told(seconds))[0] == workers


def test_fewer_are_left_when_that_was_enough_for_a_while() -> None:
    """As many as the most that were wanted meanwhile."""
    policy, context = QueuedCost(30), told(0, target_num_replicas=5)
    seen = []
    for now, seconds in ((0.0, 0.0), (CALM / 2, 80.0), (CALM - 1, 0.0), (CALM, 0.0)):
        context = replace(context, aggregated_metrics={BACKLOG: {"a": seconds}}, current_time=now)
        found, context.policy_state = policy(context)
        seen.append(found)
    assert seen == [5, 5, 5, 3]
    busy = told(200, target_num_replicas=5, policy_state={"since": 0.0, "most": 1}, current_time=CALM)
    assert QueuedCost(30)(busy) == (7, {})


@pytest.mark.parametrize("metrics", [None, {}, {BACKLOG: {}}])
def test_where_nobody_tells_all_stays_as_it_is(metrics: Any) -> None:
    assert QueuedCost(30)(Told(metrics, target_num_replicas=4)) == (4, {})


@given(st.floats(0, 1e6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.floats(1, 1e4))
def test_the_number_is_within_its_bounds(seconds: float, one: int, other: int, now: int, each: float) -> None:
    least, most = sorted((one, other))
    current = min(max(now, least), most)
    bounds = {"capacity_adjusted_min_replicas": least, "capacity_adjusted_max_replicas": most}
    found, _ = QueuedCost(each)(told(seconds, target_num_replicas=current, **bounds))
    assert current <= found <= most or found == current


def test_the_backlog_is_what_one_worker_needs_for_all(tmp_path: Path) -> None:
    store = SqliteJobStore(tmp_path / "jobs.sqlite")
    size = [submit(store, rows=1, evaluations=10, steps=10) for _ in range(2)][0].size
    assert backlog(store, "bundle") == 0  # nothing was measured
    store.measure("bundle", [Measured(size, 1, 0.5)])
    assert backlog(store, "bundle") == pytest.approx(2 * 10 * 0.5)
    store.close()


def settings(**changes: Any) -> ServeSettings:
    return ServeSettings(bundle=Path("b"), data=Path("d"), name="toy", **changes)


def test_each_gpu_has_a_worker() -> None:
    crew = crew_of(settings(device=2), Scale(), {"GPU": 4, "CPU": 64}, growing=False)
    assert (crew.least, crew.most, crew.wants) == (4, 4, {"num_gpus": 1, "num_cpus": 0})
    assert (crew.settings.device, crew.settings.threads) == (0, None)  # it sees no other


@pytest.mark.parametrize(("there", "backend"), [({"CPU": 8}, None), ({"CPU": 8, "GPU": 1}, "onnxruntime")])
def test_on_a_cpu_workers_share_the_cores(there: dict[str, float], backend: str | None) -> None:
    crew = crew_of(settings(backend=backend), Scale(least=1, most=3), there, growing=False)
    assert (crew.least, crew.most, crew.wants, crew.settings.threads) == (1, 3, {"num_cpus": 2}, 2)


def test_workers_that_there_is_no_room_for_are_refused() -> None:
    chosen = settings(threads=2)
    with pytest.raises(ServeError, match="3 workers want 6 CPUs, there are 2"):
        crew_of(chosen, Scale(least=3), {"CPU": 2}, growing=False)
    with pytest.raises(ServeError, match="3 workers want 3 GPUs, there are 1"):
        crew_of(chosen, Scale(least=3), {"CPU": 2, "GPU": 1}, growing=False)
    assert crew_of(chosen, Scale(least=3), {"CPU": 2}, growing=True).least == 3


def test_machines_cannot_share_a_file_of_jobs() -> None:
    with pytest.raises(ServeError, match="has 2 machines; give --store postgresql://"):
        check_shared(settings(), 2)
    check_shared(settings(), 1)
    check_shared(settings(store="postgresql://db/stiv"), 2)


@pytest.mark.parametrize("place", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "somewhere", "auto"])
def test_a_cluster_that_is_not_there_is_one_line(place: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        if "{" in place:
            check_reachable(place.format(port), "RAY_ADDRESS")
    with pytest.raises(ServeError, match="RAY_ADDRESS=.* nothing is reached there"):
        check_reachable(place.format(port), "RAY_ADDRESS")
