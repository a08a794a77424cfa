"""Hooks around bound graphs: to time them, or to look at what they compute."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from stiv_deploy.runtime.backends.base import Call

Hook = Callable[[str, Call], Call]
"""Given a graph's name and its bound call, returns the call to use instead: to time it, or to look at its buffers."""


Mark = Callable[[str], AbstractContextManager[object]]
"""Opens a range of that name on a profiler's time line, such as NVTX's, until the block ends."""


def unmarked(_name: str) -> AbstractContextManager[object]:
    """The mark that says nothing to nobody."""
    return nullcontext()


def no_hook(_graph: str, call: Call) -> Call:
    """The hook that changes nothing."""
    return call


class GraphClock:
    """A hook that counts how often each graph was bound and called, and sums the seconds spent in it.

    Without ``synchronize`` these are the seconds until a call returns; with a backend's ``synchronize`` they include
    the device's work, at the price of a wait after every graph. Calls are in a range of ``mark`` each, named after
    the graph.
    """

    def __init__(self, synchronize: Call | None = None, mark: Mark = unmarked) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.bound: dict[str, int] = defaultdict(int)
        self._synchronize = synchronize
        self._mark = mark

    @property
    def total(self) -> float:
        """Seconds in all graphs."""
        return sum(self.seconds.values())

    def __call__(self, graph: str, call: Call) -> Call:
        """Wrap ``call``."""
        self.bound[graph] += 1
        seconds, calls, synchronize, now = self.seconds, self.calls, self._synchronize, time.perf_counter
        call = call if self._mark is unmarked else _marked(call, self._mark, graph)

        def timed() -> None:
            start = now()
            call()
            if synchronize is not None:
                synchronize()
            seconds[graph] += now() - start
            calls[graph] += 1

        return timed


def _marked(call: Call, mark: Mark, name: str) -> Call:
    def marked() -> None:
        with mark(name):
            call()

    return marked
