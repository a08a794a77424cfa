"""What runs on a Ray cluster: fronts, which answer clients, and makers, which make videos.

They speak to each other by the store and the files alone, as the processes of one machine do. Ray starts them, asks
whether they are well, and puts new ones in the place of the dead.
"""

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from threading import Event, Thread

from fastapi import FastAPI

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.serving.api.guard import Guard, Tokens
from stiv_deploy.serving.cluster.scaling import BACKLOG, backlog
from stiv_deploy.serving.errors import ServeError
from stiv_deploy.serving.front import Front
from stiv_deploy.serving.logs import set_up
from stiv_deploy.serving.settings import ServeSettings
from stiv_deploy.serving.store.opening import open_store
from stiv_deploy.serving.workers.process import Worker
from stiv_deploy.serving.workers.supervisor import HUNG

HERE = "127.0.0.1"
READY = 0.05
"""Seconds between two looks whether a worker has begun."""
log = logging.getLogger(__name__)


class FrontReplica:
    """Answers clients of the service of ``settings`` (JSON), for those with a token of ``digests`` (by name).

    It is given the ``_makers`` because an application of Ray is what its front knows of; it never calls them.
    """

    def __init__(self, settings: str, digests: Mapping[str, str], _makers: object = None) -> None:
        chosen = ServeSettings.model_validate_json(settings)
        set_up(as_json=chosen.log_json)
        stay_here()
        self._front, self._tokens = Front(chosen), Tokens(digests)

    def __serve_build_asgi_app__(self) -> Guard:  # noqa: N807  (Ray Serve's name)
        return self._front.app(self._tokens, self._life)

    @asynccontextmanager
    async def _life(self, _app: FastAPI) -> AsyncIterator[None]:
        with self._front.tidied():
            yield

    def __del__(self) -> None:
        if hasattr(self, "_front"):
            self._front.close()


class MakerReplica:
    """A worker of the service of ``settings`` (JSON), which has taken up its work when this is made.

    Raises what making a worker does. It has its GPU, if any, for itself, as number 0.
    """

    def __init__(self, settings: str) -> None:
        chosen = ServeSettings.model_validate_json(settings)
        set_up(as_json=chosen.log_json)
        stay_here()
        self._stop = Event()
        self._store, self._bundle = open_store(chosen.jobs), Bundle.open(chosen.bundle).hash
        self._worker = Worker(chosen, 0, replica_name())
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()
        while self._thread.is_alive() and not self._worker.ready:
            self._stop.wait(READY)
        self.check_health()

    def _work(self) -> None:
        try:
            self._worker.run(self._stop)
        except Exception:
            log.exception("%s ends", self._worker.name)

    def check_health(self) -> None:
        """Raise :class:`ServeError` if it does not work any more; Ray then puts another one in its place."""
        if not self._thread.is_alive():
            raise ServeError(f"{self._worker.name} has ended")
        if self._worker.idle_seconds > HUNG:
            raise ServeError(f"{self._worker.name} has not got on for {HUNG:g} s")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the number of workers depends on."""
        return {BACKLOG: backlog(self._store, self._bundle)}

    def __del__(self) -> None:  # Ray's way to say that it is enough: what can be finished in time is, the rest saved
        if hasattr(self, "_thread"):
            self._stop.set()
            self._thread.join()


def stay_here() -> None:
    """Let this replica's own port be at the loopback address where all others of its cluster are.

    Ray Serve opens it at every address, behind Ray's token, and has no option for that.
    """
    import ray
    from ray.serve._private import replica

    if ray.util.get_node_ip_address() == HERE:
        opened: Callable[..., int] = replica.add_port_to_grpc_server
        replica.add_port_to_grpc_server = lambda server, place: opened(server, place.replace("[::]", HERE))


def replica_name() -> str:
    """The name of the worker that is this replica."""
    from ray import serve

    return f"worker-{serve.get_replica_context().replica_id.unique_id}"
