"""A sequence of bound graphs that is run again and again: captured, where the backend can, in its second run."""

import logging
from collections.abc import Mapping

from stiv_deploy.runtime.backends.base import Backend, Call
from stiv_deploy.runtime.errors import CaptureError
from stiv_deploy.runtime.sampling.hooks import Hook, no_hook

REPLAY = "replay"
log = logging.getLogger(__name__)


class Replay:
    """Runs ``calls``, by name, in order: first as they are, from then on by :meth:`Backend.capture` where that records.

    Calls go through ``hook``, and a replay of all of them under the name :data:`REPLAY`. A capture that the backend
    refuses is logged, kept in ``refused``, and the calls go on as they are.
    """

    def __init__(
        self, backend: Backend, calls: Mapping[str, Call], hook: Hook = no_hook, *, capture: bool = True
    ) -> None:
        self._backend = backend
        self._hook = hook
        self._calls = tuple(calls.values())
        self._hooked = tuple(hook(name, call) for name, call in calls.items())
        self._captured: Call | None = None
        self._capture = capture and backend.captures
        self._warm = False
        self.refused: str | None = None

    @property
    def captured(self) -> bool:
        """Whether the next run is a replay."""
        return self._captured is not None

    def __call__(self) -> None:
        """Run the sequence; queues work."""
        if self._warm and self._capture and self._captured is None:
            self._try_capture()
        self._warm = True
        if self._captured is not None:
            self._captured()
            return
        for call in self._hooked:
            call()

    def _try_capture(self) -> None:
        try:
            self._captured = self._hook(REPLAY, self._backend.capture(self._calls))
        except CaptureError as error:
            self._capture, self.refused = False, str(error)
            log.warning("running without a CUDA graph: %s", error)
