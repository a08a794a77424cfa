"""Views of solids as training data."""

from stiv_deploy.stiv_ref.data.drawn import Drawn, DrawnSource
from stiv_deploy.stiv_ref.data.views.sets import Views
from stiv_deploy.stiv_ref.world_settings import ViewsData


def views_source(settings: ViewsData, *, seed: int, stage: int, frames: int, side: int) -> DrawnSource:
    """A source of view sets, drawn on the fly; their captions are empty, their stride is 1."""
    sets, stills = (Views(settings, frames=count, side=side) for count in (frames, 1))

    def draw(views: Views, index: int) -> Drawn:
        return Drawn(frames=views.set(index).frames, caption="", stride=1, name=f"view set {index}")

    return DrawnSource(lambda index: draw(sets, index), lambda index: draw(stills, index), (), seed=seed, stage=stage)
