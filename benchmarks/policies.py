"""``stiv`` with another scheduler than its own, to compare with: ``python benchmarks/policies.py POLICY serve BUNDLE``.

``fifo``: one clip at a time, in the order that they came. ``request``: clips that wait are batched in that order, and
nobody joins a batch that runs. ``step``: the product's own, between steps, short clips before long ones.
"""

import sys
from collections.abc import Callable
from typing import Any

from stiv_deploy.runtime.command.main import main
from stiv_deploy.serving.workers import order, process, supervisor
from stiv_deploy.serving.workers.lane import Lane

POLICIES = ("fifo", "request", "step")
WORKER = "worker"


def closed_once_it_runs(room: Callable[[Lane, int], bool]) -> Callable[[Lane, int], bool]:
    """``room`` of a lane, but for that nobody joins clips that have begun."""

    def only_at_the_start(lane: Lane, rows: int) -> bool:
        return not any(clip.step for clip in lane.running) and room(lane, rows)

    return only_at_the_start


def one_at_a_time(lane: Lane, _rows: int) -> bool:
    """Whether nobody is in ``lane``."""
    return not lane.running


def adopt(policy: str) -> None:
    """Let lanes of this process follow ``policy``."""
    lane: Any = Lane
    if policy != "step":
        order.STRETCH = 0.0
    if policy == "fifo":
        lane.room = one_at_a_time
    elif policy == "request":
        lane.room = closed_once_it_runs(lane.room)


def run(arguments: list[str]) -> int:
    """Serve, or be a worker of a server, with the policy that is the first of ``arguments``."""
    policy, what, *rest = arguments
    assert policy in POLICIES, f"there are {', '.join(POLICIES)}"
    if what == WORKER:
        adopt(policy)
        sys.argv = [__file__, *rest]
        return process.main()
    supervisor.COMMAND = (sys.executable, __file__, policy, WORKER)
    sys.argv = ["stiv", what, *rest]
    return main()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
