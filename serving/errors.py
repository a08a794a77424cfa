"""Errors of the service: what keeps it from starting, and what a client is answered."""

from stiv_deploy.runtime.errors import StivError


class ServeError(StivError):
    """The service cannot start, or a worker of it cannot."""


class ApiError(StivError):
    """An answer other than success: an HTTP status, a code for programs, the parameter meant, when to retry.

    ``retry_after`` is in seconds.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


class StoreError(StivError):
    """The job store cannot be read or written now: ``full`` says whether for want of room on its disk."""

    def __init__(self, message: str, *, full: bool) -> None:
        super().__init__(message)
        self.full = full


class QueueFullError(StivError):
    """The queue has as many jobs as it may."""


class IdempotencyError(StivError):
    """An idempotency key has come before, with another request."""
