"""Costs: told from what was measured, and how large a batch is worth it."""

import dataclasses

import pytest

from stiv_deploy.serving.costs import Costs, worthwhile_rows
from stiv_deploy.serving.store.jobs import Job, Measured, Size

SIZE = Size(4, 8, 8)
JOB = Job(id="a", owner="me", created=0.0, frames=4, height=8, width=8, rows=2, evaluations=10, steps=10)
COSTS = Costs([Measured(SIZE, 2, 1.0), Measured(SIZE, 4, 1.5), Measured(SIZE, 8, 3.0), Measured(SIZE, 0, 0.5)])


def test_nothing_is_known_before_anything_was_measured() -> None:
    empty = Costs()
    assert empty.alone(JOB) is None
    assert empty.shared(JOB) is None
    assert empty.backlog([JOB], 1) is None
    assert empty.backlog([], 1) == 0


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1.0), (2, 1.0), (3, 1.5), (8, 3.0), (16, 6.0)])
def test_a_call_costs_what_its_rung_costs(rows: int, seconds: float) -> None:
    assert COSTS.call(SIZE, rows) == seconds


def test_other_sizes_cost_by_their_pixels() -> None:
    assert COSTS.call(Size(8, 16, 8), 2) == 4.0
    assert COSTS.decode(Size(8, 16, 8)) == 2.0


def test_what_is_done_costs_no_more() -> None:
    assert COSTS.alone(JOB) == 10.5
    assert COSTS.alone(dataclasses.replace(JOB, step=5)) == 5.5
    assert COSTS.shared(JOB) == 10 * 2 * 0.375 + 0.5
    assert COSTS.backlog([JOB, JOB], 2) == 8.0


@pytest.mark.parametrize(
    ("seconds", "rows"),
    [
        ({2: 1.0, 4: 1.2, 8: 2.0, 12: 2.5}, 12),  # a GPU that idles
        ({2: 1.0, 4: 1.2, 8: 2.4, 12: 3.6}, 4),  # full at 4 rows
        ({2: 1.0, 4: 2.0, 8: 4.0, 12: 6.0}, 2),  # full from the start
    ],
)
def test_a_batch_grows_while_it_is_worth_it(seconds: dict[int, float], rows: int) -> None:
    assert worthwhile_rows(seconds) == rows


def test_several_devices_make_a_clip_together_where_they_can_share_its_size() -> None:
    measured = [
        Measured(SIZE, 2, 1.0),
        Measured(SIZE, 4, 1.5),
        Measured(SIZE, 2, 0.6, 2),
        Measured(SIZE, 2, 0.3, 4),
        Measured(SIZE, 0, 0.5),
    ]
    two = Costs(measured, 2, lambda size: size.frames > 1)
    assert two.together(JOB) == 6.0
    assert two.soonest(JOB) == 6.5
    assert two.alone(JOB) == 10.5
    assert two.width(JOB) == 2
    still = dataclasses.replace(JOB, frames=1)
    assert (two.together(still), two.soonest(still)) == (None, two.alone(still))
    skips = dataclasses.replace(JOB, evaluations=8)  # of ten steps: its residuals are on one device
    assert (two.together(skips), two.soonest(skips)) == (None, two.alone(skips))
    assert Costs(measured, 4).together(JOB) == 3.0
    assert Costs(measured).together(JOB) is None  # what others had measured
    assert Costs(measured, 8).soonest(JOB) == 10.5
    assert Costs().soonest(JOB) is None
