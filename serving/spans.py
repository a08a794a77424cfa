"""Where spans of a service go: the pieces of work on its videos, each with its begin and end.

``submit`` is of the API: to plan a video and to store its job. The others are of the workers: ``queue``, ``prepare``,
``denoise``, ``decode``, ``write``, and ``failed``. They tell of ids, sizes and counts, never of prompts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from stiv_deploy.serving.store.jobs import Job

TRACE = "trace"
"""What the headers of W3C Trace Context are called among the facts of a job, which carry them to its worker."""
Carrier = dict[str, str]
"""Headers of W3C Trace Context by name; empty where there is no trace."""


class Spans:
    """Spans that nobody wants; what others do with them is in :class:`~stiv_deploy.serving.otlp.OtlpSpans`."""

    @contextmanager
    def submitting(self, headers: Mapping[str, str]) -> Iterator[Carrier]:
        """The span of a request that came with ``headers``; yields what its job is to carry."""
        yield {}

    def note(self, name: str, job: Job, seconds: float, **facts: str | int) -> None:
        """A piece of work on ``job`` has ended, and took so many ``seconds``."""

    def close(self) -> None:
        """Send what is left."""
