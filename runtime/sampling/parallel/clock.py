"""How long a rank's host is in exchanges: waiting for the other ranks, and copying."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds in exchanges: until other ranks had come or sent, and for everything else that an exchange is.

    What a GPU copies by itself, while the host goes on, is in neither.
    """

    waiting: float = 0.0
    copying: float = 0.0

    @property
    def total(self) -> float:
        """Both."""
        return self.waiting + self.copying

    def since(self, earlier: "Spent") -> "Spent":
        """What has been spent after ``earlier``."""
        return Spent(self.waiting - earlier.waiting, self.copying - earlier.copying)


class ExchangeClock:
    """Adds up what one rank spends; ``spent`` is the sum up to now."""

    def __init__(self) -> None:
        self.spent = Spent()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The ``with`` block waits for other ranks."""
        started = time.perf_counter()
        try:
            yield
        finally:
            waited = time.perf_counter() - started
            self.spent = self.spent._replace(waiting=self.spent.waiting + waited)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """The ``with`` block is an exchange: what is not :meth:`waiting` in it is copying."""
        before, started = self.spent, time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - started
            waited = self.spent.since(before).waiting
            self.spent = self.spent._replace(copying=self.spent.copying + took - waited)
