"""Errors of the runtime that a user can cause and mend; each is one line and ends a command with ``exit_code``."""

from collections.abc import Sequence


class StivError(Exception):
    """Base of all user-facing errors: what was given, what is wanted, what to do."""

    exit_code = 2


class BundleError(StivError):
    """The bundle or one of its files is missing, damaged, or does not fit its manifest."""


class LoraError(StivError):
    """A LoRA file is missing, damaged, or made for another model, or there is none to merge it into here."""


class RequestError(StivError):
    """A generation request is not possible: an image, size, step count or scale is out of range."""


class BackendError(StivError):
    """A backend is unknown, not installed, or cannot run this bundle here."""


class Quarantined(BackendError):
    """A backend gave wrong results for this bundle, and is not used with it until it gives right ones."""


class DeviceError(BackendError):
    """One of several devices that make a clip together has stopped."""


class CaptureError(BackendError):
    """Calls cannot be captured into one graph here; run one after another they still work."""


class EngineError(StivError):
    """An engine is missing or was built for another GPU, version or graph."""


class KernelError(StivError):
    """The kernel library is missing, does not fit this version, or refused a call."""


class RegisterError(StivError):
    """A kernel spills, or uses more registers than the ceiling, or there is no report."""


class MeasurementError(StivError):
    """A measurement would not be fair, or two of them do not compare."""


class OutputError(StivError):
    """The output cannot be written."""


class Cancelled(StivError):
    """The caller asked to stop between two steps."""

    exit_code = 130


def raise_interrupt(error: BaseException) -> None:
    """Raise ``KeyboardInterrupt`` if ``error`` is an import that Ctrl-C stopped: modules of C then say ImportError."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    if all(any(isinstance(each, kind) for each in chain) for kind in (ImportError, KeyboardInterrupt)):
        raise KeyboardInterrupt


def one_line(text: str, limit: int = 500) -> str:
    """``text`` with every run of white space as one space and what cannot be printed escaped.

    What is longer than ``limit`` characters lacks its middle: the start says what is wrong, the end what to do.
    """
    flat = " ".join(text.split())
    if not flat.isprintable():
        flat = "".join(each if each.isprintable() else repr(each)[1:-1] for each in flat)
    return flat if len(flat) <= limit else f"{flat[: limit - limit // 3 - 3]}...{flat[len(flat) - limit // 3 :]}"


def briefly(value: object, limit: int = 80) -> str:
    """What was given, for an error: its ``repr`` in at most ``limit`` characters."""
    try:
        return one_line(repr(value), limit)
    except (ValueError, RecursionError):  # thousands of digits, or lists in lists in lists
        return f"a {type(value).__name__} that is too large to print"


def few(names: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of ``names``, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(one_line(name, 80) for name in names[:most]) + more
