"""The canvas of moving digits: its sizes, and how many frames a digit stays on it; asked before anything is drawn."""

SIZE = 32
"""Default height and width of the canvas, in pixels; a digit is half as large and moves a sixteenth a frame."""


def speed_of(size: int) -> int:
    """Pixels a frame on a canvas of ``size`` pixels; ``ValueError`` unless it is a multiple of 16."""
    if size < 16 or size % 16:
        raise ValueError(f"the canvas of moving digits must be a multiple of 16 pixels, got {size}")
    return size // 16


def check_frames(frames: int, size: int = SIZE) -> None:
    """``ValueError`` if a digit, half as large as the canvas, would leave it in so many frames."""
    most = size // 2 // speed_of(size) + 1
    if not 1 <= frames <= most:
        raise ValueError(
            f"{frames} frames at {speed_of(size)} pixels a frame leave the canvas; there can be 1 to {most}"
        )
