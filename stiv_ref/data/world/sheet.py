"""A contact sheet of the world."""

from pathlib import Path

import numpy as np

from stiv_deploy.stiv_ref.data.world.clips import Frames, Split, World, WorldClip
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.files import told
from stiv_deploy.stiv_ref.plots import Row, contact_sheet
from stiv_deploy.stiv_ref.world_settings import WorldData


def video_row(frames: Frames, caption: str) -> Row:
    """Frames uint8 [F, H, W, 3] as a strip."""
    video = frames.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return Row(video=video, caption=caption)


def row_of(clip: WorldClip) -> Row:
    """The clip as a strip, its caption with the stride if that is not 1."""
    return video_row(clip.frames, clip.caption.text + (f" (stride {clip.stride})" if clip.stride > 1 else ""))


def world_sheet(settings: WorldData, out: Path, *, count: int, frames: int, side: int, split: Split = "test") -> None:
    """Write the first ``count`` clips of ``split`` as a PNG.

    Raises :class:`DataError` if they cannot be drawn, :class:`~stiv_deploy.stiv_ref.errors.OutputError` if it cannot be
    written.
    """
    try:
        world = World(settings, frames=frames, side=side, split=split)
    except ValueError as error:
        raise DataError(str(error)) from None
    rows = [row_of(world.clip(index)) for index in range(count)]
    with told(out, "choose another place"):
        contact_sheet(rows, out, columns=2 if frames > 1 else 8, zoom=1)
