"""Sets of views of one solid: one that is given, and those all around it that are to be made."""

from dataclasses import dataclass

import numpy as np

from stiv_deploy.stiv_ref.data.views.solids import Look, View, picture
from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Colour
from stiv_deploy.stiv_ref.data.world.clips import Frames, Split, scene_number
from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.world_settings import SIDE, ViewsData

ELEVATIONS = (30.0, -20.0)
"""Of the views to be made, in turn."""
GIVEN_ELEVATIONS = (-10.0, 40.0)
MARK_SEEN = 50.0
"""The mark is at most so many degrees beside the given view: what shows how the solid is turned is seen in it."""
SCALE = (0.8, 1.0)
DARK = (0.04, 0.25)
"""Each of red, green and blue of the background."""
VIEW_DRAWS = 3
"""Seeds the draws of views, beside the number of the set."""


def layout(frames: int) -> list[View]:
    """Cameras of the ``frames`` - 1 views to be made, azimuths relative to that of the given view.

    Evenly around, half a step beside it, elevations in turn: azimuths 30, 90, ... 330 with 7 frames, as STIV has it
    (arXiv 2412.07730, section 3.6) from Zero123++.
    """
    step = 360 / max(1, frames - 1)
    return [View(step * (number + 0.5), ELEVATIONS[number % 2]) for number in range(frames - 1)]


@dataclass(frozen=True, kw_only=True)
class ViewSet:
    """Frames uint8 [F, H, W, 3] of a solid: the given view first, at azimuth 0, then those of :func:`layout`.

    ``colours`` of its body and its mark; ``turned`` is where the given view's camera stands around the solid.
    """

    index: int
    look: Look
    colours: tuple[Colour, Colour]
    turned: float
    views: list[View]
    frames: Frames

    def seen_from(self, view: View) -> Frames:
        """A view uint8 [H, W, 3] of the solid from elsewhere."""
        return shown(self.look, self.turned, view, self.frames.shape[1])


class Views:
    """The view sets of one split: ``frames`` views of ``side`` x ``side`` pixels each, or one from anywhere."""

    def __init__(
        self, settings: ViewsData | None = None, *, frames: int = 7, side: int = SIDE, split: Split = "train"
    ) -> None:
        self.settings = settings or ViewsData(kind="views")
        self.settings.check(frames, side)
        self.frames, self.side, self.split = frames, side, split

    def set(self, index: int) -> ViewSet:
        """Set number ``index`` of the split, from 0 on without end."""
        draws = Draws(VIEW_DRAWS, scene_number(index, self.split))
        colours = _two_colours(draws)
        turned = draws.between(0, 360)  # the corners of a cube are anywhere in the given view
        look = Look(
            solid=draws.choice(self.settings.solids),
            scale=draws.between(*SCALE),
            body=COLOURS[colours[0]],
            marked=COLOURS[colours[1]],
            behind=(draws.between(*DARK), draws.between(*DARK), draws.between(*DARK)),
            mark=turned + draws.between(-MARK_SEEN, MARK_SEEN),
        )
        given = View(0.0, draws.between(*GIVEN_ELEVATIONS))
        views = [given, *layout(self.frames)] if self.frames > 1 else [draws.choice([given, *layout(7)])]
        frames = np.stack([shown(look, turned, view, self.side) for view in views])
        return ViewSet(index=index, look=look, colours=colours, turned=turned, views=views, frames=frames)


def _two_colours(draws: Draws) -> tuple[Colour, Colour]:
    first = draws.choice(tuple(COLOURS))
    return first, draws.choice([each for each in COLOURS if each != first])


def shown(look: Look, turned: float, view: View, side: int) -> Frames:
    """A view uint8 [side, side, 3], its azimuth relative to a camera that stands ``turned`` degrees around."""
    values = picture(look, View(turned + view.azimuth, view.elevation), side)
    return (values * np.float32(255) + np.float32(0.5)).astype(np.uint8)
