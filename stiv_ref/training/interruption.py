"""Ctrl-C and SIGTERM while training: a wish to stop, granted where weights, moments and step number agree."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

Handler = Callable[[int, FrameType | None], object]


class Interruption:
    """In its ``with`` block the signals set :attr:`requested`; a second one, if ``impatient``, acts as it did before.

    Signals without a Python handler (ignored ones), and threads other than the main one, are left alone. With several
    processes a terminal and torchrun both send the signal, so there the second one must be held back too.
    """

    def __init__(self, impatient: bool = True) -> None:
        self.impatient = impatient
        self.requested = False
        self._handlers: dict[int, Handler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._handlers = {number: handler for number, handler in found.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, self._catch)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.requested and self.impatient:
            self._handlers[number](number, frame)
        self.requested = True
