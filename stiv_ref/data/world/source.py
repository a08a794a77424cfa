"""The world as training data."""

from stiv_deploy.stiv_ref.data.drawn import Drawn, DrawnSource
from stiv_deploy.stiv_ref.data.world.captions import words
from stiv_deploy.stiv_ref.data.world.clips import World
from stiv_deploy.stiv_ref.world_settings import WorldData


def world_source(settings: WorldData, *, seed: int, stage: int, frames: int, side: int) -> DrawnSource:
    """A source of clips of the world, drawn on the fly; its words are those of any world."""
    clips, stills = (World(settings, frames=count, side=side) for count in (frames, 1))

    def draw(world: World, index: int) -> Drawn:
        clip = world.clip(index)
        name = f"clip {index} of the world"
        return Drawn(frames=clip.frames, caption=clip.caption.text, stride=clip.stride, name=name)

    return DrawnSource(
        lambda index: draw(clips, index), lambda index: draw(stills, index), words(), seed=seed, stage=stage
    )
