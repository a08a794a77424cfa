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
