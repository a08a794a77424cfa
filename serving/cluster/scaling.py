"""How many workers there are room for, and how many there should be, by the seconds of work that wait."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from stiv_deploy.serving.costs import Costs
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.jobs import JobStore
from stiv_deploy.serving.workers.process import CPU

BACKLOG = "backlog"
"""Name of the number that workers tell: seconds that one of them would need for all that is to be made."""
CALM = 120.0
"""Seconds that fewer workers must have been enough before there are fewer."""


class Scale(NamedTuple):
    """Fewest workers (``None``: one for each GPU), most, and the seconds of work that each may have before it."""

    least: int | None = None
    most: int | None = None
    seconds: float = 60.0


class Crew(NamedTuple):
    """Fewest and most workers, what each ``wants`` of a machine (options of an actor of Ray), and its settings."""

    least: int
    most: int
    wants: dict[str, int]
    settings: ServeSettings


def check_shared(settings: ServeSettings, machines: int) -> None:
    """Raise :class:`ServeError` if ``machines`` would have to share a file of jobs."""
    if machines > 1 and settings.store is None:
        raise ServeError(f"the Ray cluster has {machines} machines; give --store postgresql://HOST/NAME for their jobs")


def crew_of(settings: ServeSettings, scale: Scale, there: Mapping[str, float], *, growing: bool) -> Crew:
    """Workers on a GPU of their own each, or with CPUs of their own, of a cluster that has ``there``.

    Raises :class:`ServeError` if there is no room for the fewest of them, unless the cluster may be ``growing``.
    """
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    on_gpus = settings.backend != CPU and gpus > 0
    least = scale.least or (gpus if on_gpus else 1)
    most = max(least, scale.most or least)
    each = 1 if on_gpus else settings.threads or max(1, cpus // most)
    room, kind = (gpus, "GPUs") if on_gpus else (cpus, "CPUs")
    if least * each > room and not growing:
        raise ServeError(f"{least} workers want {least * each} {kind}, there are {room}; ask for fewer --workers")
    wants = {"num_gpus": each, "num_cpus": 0} if on_gpus else {"num_cpus": each}
    chosen = {"device": 0, "threads": settings.threads if on_gpus else each}
    return Crew(least, most, wants, settings.model_copy(update=chosen))


class Context(Protocol):
    """What Ray Serve tells a policy, as far as it matters here; ``aggregated_metrics`` is by name and replica."""

    aggregated_metrics: dict[str, dict[Any, float]] | None
    target_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int
    policy_state: dict[str, Any]
    current_time: float | None


class QueuedCost:
    """A policy of Ray Serve: so many workers that all that is to be made takes them ``seconds``.

    More come at once; fewer are left when that has been enough for ``CALM`` seconds.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        """The number of workers, and what to remember until the next call."""
        told = (context.aggregated_metrics or {}).get(BACKLOG, {}).values()
        now, state, current = context.current_time or 0.0, dict(context.policy_state), context.target_num_replicas
        wanted = math.ceil(max(told, default=0.0) / self._seconds) if told else current
        wanted = min(max(wanted, context.capacity_adjusted_min_replicas), context.capacity_adjusted_max_replicas)
        if wanted >= current:
            return wanted, {}
        since = state.setdefault("since", now)
        most = state["most"] = max(wanted, state.get("most", 0))
        return (current, state) if now < since + CALM else (most, {})


def backlog(store: JobStore, bundle: str) -> float:
    """Seconds that one worker would need for all live jobs, by what was measured with ``bundle``; else 0."""
    costs = Costs(store.measurements(bundle))
    return costs.backlog([*store.running(), *store.waiting()], 1) or 0.0
