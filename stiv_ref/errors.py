"""Errors that a user of the reference can cause and mend."""


class StivRefError(ValueError):
    """Bad input to the reference. The message says what was given, what is wanted and what to do."""

    exit_code = 2


class OutputError(StivRefError):
    """A file or folder cannot be written: a full disk, a place that is read-only, or no folder at all."""


class ConfigError(StivRefError):
    """A model config or a training recipe is not valid."""


class CheckpointError(StivRefError):
    """A checkpoint is missing, damaged, or does not fit its config."""


class AttentionError(StivRefError):
    """Fused attention cannot be used as asked: no backward pass, or tensors that its kernels do not take."""


class DivergedError(StivRefError):
    """Training produced a loss that is not finite."""


class VideoError(StivRefError):
    """A video cannot be used: missing, truncated, damaged, without frames, or no video at all."""


class CaptionError(StivRefError):
    """Captions are missing, empty, or do not fit their videos."""


class DataError(StivRefError):
    """A training dataset is missing, damaged, or does not fit the recipe."""


class ClipsError(StivRefError):
    """An index of clips, or what it was asked to be made of, is not valid."""


def one_line(text: str, limit: int = 500) -> str:
    """``text`` in one line of at most ``limit`` characters, without its middle; what cannot be printed is escaped."""
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
