"""A contact sheet of views."""

from pathlib import Path

from stiv_deploy.stiv_ref.data.views.sets import Views, ViewSet
from stiv_deploy.stiv_ref.data.world.clips import Split
from stiv_deploy.stiv_ref.data.world.sheet import video_row
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.files import told
from stiv_deploy.stiv_ref.plots import contact_sheet
from stiv_deploy.stiv_ref.world_settings import ViewsData


def title_of(views: ViewSet) -> str:
    """What it is, for a sheet."""
    body, mark = views.colours
    return f"{body} {views.look.solid}, {mark} mark"


def views_sheet(settings: ViewsData, out: Path, *, count: int, frames: int, side: int, split: Split = "test") -> None:
    """Write the first ``count`` sets of ``split`` as a PNG.

    Raises :class:`DataError` if they cannot be drawn, :class:`~stiv_deploy.stiv_ref.errors.OutputError` if it cannot be
    written.
    """
    try:
        views = Views(settings, frames=frames, side=side, split=split)
    except ValueError as error:
        raise DataError(str(error)) from None
    sets = [views.set(index) for index in range(count)]
    with told(out, "choose another place"):
        rows = [video_row(each.frames, title_of(each)) for each in sets]
        contact_sheet(rows, out, columns=3 if frames > 1 else 8, zoom=1)
