"""A service on a Ray cluster: one that is there already, or one on this machine for as long as the service runs."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from threading import Event
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingPolicy

from stiv_deploy.runtime.errors import one_line
from stiv_deploy.serving.api.guard import Tokens
from stiv_deploy.serving.cluster.replicas import HERE, FrontReplica, MakerReplica
from stiv_deploy.serving.cluster.scaling import Crew, QueuedCost, Scale, check_shared, crew_of
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.front import prepare_folder
from stiv_deploy.serving.server import CONNECTIONS, address, check_door, check_reachable, listen
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.workers.supervisor import SLACK

APP, FRONT, MAKER = "stiv", "front", "maker"
"""Names of the application, and of its deployments."""
FRONTS = 2
"""Replicas that answer clients: when one dies there is another."""
TRIES = 3
"""How often a replica may fail to start."""
JOIN = "RAY_ADDRESS"
"""Ray's own variable for the cluster to use."""
OBJECTS = 256 * 2**20
"""Bytes of Ray's object store on this machine, through which next to nothing goes."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}


def run_on_ray(
    settings: ServeSettings, tokens: Tokens, host: str, port: int, scale: Scale, say: Callable[[str], object]
) -> None:
    """Serve on Ray; ``say`` is told where, once all runs.

    With ``RAY_ADDRESS`` the service is handed to that cluster, in place of the one that it may have, and stays there.
    Else there is a cluster on this machine until Ctrl-C or SIGTERM. Raises :class:`ServeError`.
    """
    check_door(host, tokens)
    prepare_folder(settings)
    joins = JOIN in os.environ
    if joins:
        check_reachable(os.environ[JOIN], JOIN)
    with _cluster(joins):
        check_shared(settings, sum(node["Alive"] for node in ray.nodes()))
        crew = crew_of(settings, scale, ray.cluster_resources(), growing=joins)
        place = _open_door(host, port, tokens)
        try:
            _deploy(crew.settings, tokens, _makers(crew, scale.seconds))
            where = f"{settings.name}{place}, jobs in {settings.data}, on Ray at {_cluster_address()}"
            say(f"serving {where}; {'`serve shutdown` ends it' if joins else 'Ctrl-C stops it'}")
            with suppress(KeyboardInterrupt):
                while not joins:
                    Event().wait()
        finally:
            if not joins:
                _end(settings.grace_seconds + 2 * SLACK)


@contextmanager
def _cluster(joins: bool) -> Iterator[None]:
    """A connection to the cluster of ``RAY_ADDRESS``, or to one of this machine alone, at its loopback address."""
    own: dict[str, Any] = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECTS}
    before = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(**({} if joins else own), log_to_driver=not joins, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = f"{one_line(str(error))}; one that wants tokens wants RAY_AUTH_MODE=token too"
        raise ServeError(f"Ray at {os.environ.get(JOIN, HERE)}: no cluster ({reason})") from None
    signal.signal(signal.SIGTERM, before)  # Ray's own prints the stack
    try:
        yield
    finally:
        ray.shutdown()


def _cluster_address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def _makers(crew: Crew, seconds: float) -> dict[str, Any]:
    """Options of the deployment of workers: those of ``crew``, and how their number follows the work that there is."""
    options: dict[str, Any] = {
        "ray_actor_options": crew.wants,
        "graceful_shutdown_timeout_s": crew.settings.grace_seconds + SLACK,
    }
    if crew.most == crew.least:
        return options | {"num_replicas": crew.least}
    policy = AutoscalingPolicy(policy_function=QueuedCost, policy_kwargs={"seconds": seconds})
    bounds = {"min_replicas": crew.least, "initial_replicas": crew.least, "max_replicas": crew.most}
    return options | {"autoscaling_config": bounds | {"policy": policy}}


def _open_door(host: str, port: int, tokens: Tokens) -> str:
    """Let Ray Serve listen, if it does not yet; where, in words."""
    if serve.status().proxies:
        return ""
    with listen(host, port, tokens) as listening:  # else it would be Ray that finds the port in use, and not in a line
        place, port = address(listening), listening.getsockname()[1]
    serve.start("EveryNode", {"host": host, "port": port}, logging_config=QUIET)
    return f" at {place}"


def _deploy(settings: ServeSettings, tokens: Tokens, makers: Mapping[str, Any]) -> None:
    """Run the application, and wait until it runs; :class:`ServeError` if it cannot."""
    text, wants = settings.model_dump_json(), {"num_cpus": 0}
    common: dict[str, Any] = {"max_constructor_retry_count": TRIES, "logging_config": QUIET}
    maker = serve.deployment(name=MAKER, **common, **makers)(MakerReplica).bind(text)
    front = serve.deployment(
        name=FRONT, num_replicas=FRONTS, max_ongoing_requests=CONNECTIONS, ray_actor_options=wants, **common
    )(serve.ingress()(FrontReplica))
    try:
        serve.run(front.bind(text, tokens.digests, maker), name=APP, route_prefix="/", logging_config=QUIET)
    except RuntimeError as error:
        last = [line for line in str(error).splitlines() if line.strip()][-1]
        raise ServeError(f"Ray cannot start the service ({one_line(last)})") from None


def _end(seconds: float) -> None:
    """Let all replicas finish or save what they have, for so long at most; then end them."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(TimeoutError):  # Ray's own, after a minute
            serve.delete(APP)
            break
    serve.shutdown()
