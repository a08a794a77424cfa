"""A contact sheet of what is drawn on the fly: clips of the world, or sets of views."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stiv_deploy.stiv_ref.data.views.sets import Views
from stiv_deploy.stiv_ref.data.world.clips import Frames, Split, World
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.files import told
from stiv_deploy.stiv_ref.plots import Row, contact_sheet
from stiv_deploy.stiv_ref.world_settings import ViewsData, WorldData

MOST_FRAMES, MOST_COLUMNS = 32, 8
"""A line of the sheet has at most so many frames, in at most so many strips."""


def drawn_sheet(
    settings: WorldData | ViewsData, out: Path, *, count: int, frames: int, side: int, split: Split = "test"
) -> None:
    """Write the first ``count`` clips of ``split``, as strips of ``frames`` frames with their captions, as a PNG.

    Raises :class:`DataError` if they cannot be drawn, :class:`~stiv_deploy.stiv_ref.errors.OutputError` if it cannot be
    written.
    """
    try:
        if isinstance(settings, ViewsData):
            row = _of_views(Views(settings, frames=frames, side=side, split=split))
        else:
            row = _of_world(World(settings, frames=frames, side=side, split=split))
    except ValueError as error:
        raise DataError(str(error)) from None
    rows = [row(index) for index in range(count)]
    with told(out, "choose another place"):
        contact_sheet(rows, out, columns=max(1, min(MOST_COLUMNS, MOST_FRAMES // frames)), zoom=1)


def _of_world(world: World) -> Callable[[int], Row]:
    """Clips by number; the caption has the stride if that is not 1."""

    def row(index: int) -> Row:
        clip = world.clip(index)
        return _row(clip.frames, clip.caption.text + (f" (stride {clip.stride})" if clip.stride > 1 else ""))

    return row


def _of_views(views: Views) -> Callable[[int], Row]:
    """Sets by number; the caption says what the solid is."""

    def row(index: int) -> Row:
        one = views.set(index)
        body, mark = one.colours
        return _row(one.frames, f"{body} {one.look.solid}, {mark} mark")

    return row


def _row(frames: Frames, caption: str) -> Row:
    """Frames uint8 [F, H, W, 3] as a strip."""
    video = frames.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - np.float32(1)
    return Row(video=video, caption=caption)
