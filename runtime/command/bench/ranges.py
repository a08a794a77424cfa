"""Ranges of NVTX around phases and graphs, which Nsight Systems shows beside what the GPU does."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

DOMAIN = "stiv-deploy"
"""Of all ranges, so that a profiler can show them alone."""


class Ranges:
    """A :data:`~stiv_deploy.runtime.sampling.hooks.Mark` of NVTX; costs next to nothing where no profiler listens.

    Raises ``ModuleNotFoundError`` where the library is not there.
    """

    def __init__(self) -> None:
        self._domain: Any = import_module("nvtx").get_domain(DOMAIN)
        self._known: dict[str, Any] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A range called ``name``, within those that are open in this thread."""
        if name not in self._known:
            self._known[name] = self._domain.get_event_attributes(message=name)
        self._domain.push_range(self._known[name])
        try:
            yield
        finally:
            self._domain.pop_range()
