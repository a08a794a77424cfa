"""Clips of the world: scenes by index, and their frames."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stiv_deploy.stiv_ref.data.world.backgrounds import Picture, draw_background
from stiv_deploy.stiv_ref.data.world.captions import COLOURS, Caption, Colour, Size, Told, draw_caption
from stiv_deploy.stiv_ref.data.world.draws import Draws
from stiv_deploy.stiv_ref.data.world.motions import LARGEST, STILL_SPAN, Place, Stage, Track, draw_track
from stiv_deploy.stiv_ref.data.world.shapes import REACH, coverage
from stiv_deploy.stiv_ref.world_settings import SIDE, Background, Shape, WorldData

Frames = NDArray[np.uint8]
"""[F, H, W, 3]."""
Split = Literal["train", "test"]
HELD_OUT = 16
"""One scene of so many is held out."""
SMALL, BIG = (6.0, 8.0), (10.0, LARGEST)
"""Radii in pixels of a picture of :data:`SIDE`; those of growing and shrinking objects are in both."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What is to be seen: an object on a still background. ``size`` is ``None`` for one that grows or shrinks."""

    shape: Shape
    colour: Colour
    size: Size | None
    track: Track
    background: Background
    picture: Picture

    @property
    def truth(self) -> Told:
        """All that a caption can tell of it."""
        return Told(colour=self.colour, shape=self.shape, size=self.size, motion=self.track.motion)


@dataclass(frozen=True, kw_only=True)
class WorldClip:
    """Frames uint8 [F, H, W, 3] of ``scene`` from time ``start`` on, every ``stride``-th, and their caption."""

    index: int
    scene: Scene
    frames: Frames
    caption: Caption
    stride: int
    start: int

    @property
    def speed(self) -> float:
        """Pixels from one of the frames to the next."""
        return self.scene.track.speed * self.stride

    @property
    def places(self) -> list[Place]:
        """Where the object is in each frame, and its radius."""
        return [self.scene.track.at(time) for time in times_of(self)]


def times_of(clip: WorldClip) -> list[float]:
    """The time of each frame in the scene."""
    return _times(clip.start, len(clip.frames), clip.stride)


def _times(start: int, count: int, stride: int) -> list[float]:
    return [float(start + number * stride) for number in range(count)]


def scene_number(index: int, split: Split) -> int:
    """The number, among all scenes, of number ``index`` of a split."""
    return index * HELD_OUT if split == "test" else index + index // (HELD_OUT - 1) + 1


class World:
    """The clips of one split: ``frames`` frames of ``side`` x ``side`` pixels each, or stills if that is one.

    Clip ``index`` is the same in any order, and so are its scene's object and motion in any number of frames.
    """

    def __init__(
        self,
        settings: WorldData | None = None,
        *,
        frames: int = 16,
        side: int = SIDE,
        split: Split = "train",
        seed: int = 0,
    ) -> None:
        self.settings = settings or WorldData(kind="world")
        self.settings.check(frames, side)
        self.frames, self.side, self.split, self.seed = frames, side, split, seed

    def clip(self, index: int) -> WorldClip:
        """Clip number ``index`` of the split, from 0 on without end."""
        draws = Draws(self.seed, scene_number(index, self.split))
        stride = draws.choice(self.settings.strides) if self.frames > 1 else 1
        last = (self.frames - 1) * stride
        span = (self.settings.scene_frames or last + 1) - 1 or int(STILL_SPAN)
        start = draws.below(span - last + 1)
        scene = self._scene(float(span), draws)
        still = Told(colour=scene.colour, shape=scene.shape, size=scene.size)
        return WorldClip(
            index=index,
            scene=scene,
            frames=render(scene, _times(start, self.frames, stride)),
            caption=draw_caption(scene.truth if self.frames > 1 else still, draws),
            stride=stride,
            start=start,
        )

    def _scene(self, span: float, draws: Draws) -> Scene:
        settings, scale = self.settings, self.side / SIDE
        shape = draws.choice(settings.shapes)
        colour = draws.choice(tuple(COLOURS))
        motion = draws.choice(settings.motions)
        size: Size = draws.choice(("small", "big"))
        low, high = SMALL if size == "small" else BIG
        low = max(low, settings.least_radius)
        radius = draws.between(low, max(high, low + 0.5))
        stage = Stage(side=self.side, span=span, radius=radius * scale, least=settings.least_radius * scale)
        kind = draws.choice(settings.backgrounds)
        return Scene(
            shape=shape,
            colour=colour,
            size=None if motion in ("grow", "shrink") else size,
            track=draw_track(motion, stage, draws),
            background=kind,
            picture=draw_background(kind, self.side, draws),
        )


def render(scene: Scene, times: Sequence[float]) -> Frames:
    """Frames uint8 [F, H, W, 3] of ``scene`` at ``times``. Only the pixels around the object are computed."""
    places = np.array([scene.track.at(time) for time in times], np.float64)
    side = scene.picture.shape[0]
    window = min(side, 2 * int(np.ceil(REACH * places[:, 2].max())) + 3)
    corners = np.clip(np.floor(places[:, :2]).astype(np.int64) - window // 2, 0, side - window)
    pixels = np.arange(window) + 0.5
    x, y, radius = (
        part.astype(np.float32)
        for part in (*(corners[:, :, None] + pixels - places[:, :2, None]).transpose(1, 0, 2), places[:, 2])
    )
    cover = coverage(scene.shape, x[:, None, :], y[:, :, None], radius[:, None, None])[..., None]
    colour = np.array(COLOURS[scene.colour], np.float32)
    frames = np.repeat(_bytes(scene.picture)[None], len(times), axis=0)
    for frame, (left, top), share in zip(frames, corners.tolist(), cover, strict=True):
        inside = slice(top, top + window), slice(left, left + window)
        behind = scene.picture[inside]
        frame[inside] = _bytes(behind + share * (colour - behind))
    return frames


def _bytes(picture: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (picture * np.float32(255) + np.float32(0.5)).astype(np.uint8)
