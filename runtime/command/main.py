"""The start of ``stiv``; all else is imported inside ``main``, so that Ctrl-C is one word from the first moment."""

import os
import signal
import sys
from io import TextIOWrapper
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run() -> int:
    """The exit code of a command, or of its error."""
    from stiv_deploy.runtime.command.group import run, told
    from stiv_deploy.runtime.errors import raise_interrupt

    try:
        result = run(sys.argv[1:])
    except Exception as error:
        raise_interrupt(error)
        return told(error)
    if result == INTERRUPTED:  # Typer's own answer to Ctrl-C
        raise KeyboardInterrupt
    return result if isinstance(result, int) else 0


def _printed(code: int) -> int:
    """``code``, once standard output has taken all that was printed; 2 if it does not, with a line that says so."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains again when it ends
        if isinstance(error, BrokenPipeError):  # a reader that has seen enough, such as head
            return code or 1
        if code == 0:  # else there was a line
            sys.stderr.write(f"error: standard output cannot be written ({error.strerror})\n")
        return code or 2
    return code


def main() -> int:
    """Run ``stiv`` with the process's arguments and return its exit code.

    A user's error is one line and the error's ``exit_code`` (2 for usage), Ctrl-C and SIGTERM are 130; anything else is
    a fault of ours and keeps its traceback.
    """
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be Unicode, nor terminals know it
        return _printed(_run())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
