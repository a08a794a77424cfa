"""Settings of the drawn worlds in a recipe, and what can be in them; asked before anything is drawn."""

from typing import Annotated, Literal, Self, TypeVar, get_args

from pydantic import Field, model_validator

from stiv_deploy.stiv_ref.bounds import SIZE_LIMIT, Strides
from stiv_deploy.stiv_ref.config import FrozenConfig

Shape = Literal["circle", "square", "triangle", "star", "ring", "cross"]
Motion = Literal[
    "left", "right", "up", "down", "up-left", "up-right", "down-left", "down-right",
    "bounce", "orbit", "grow", "shrink", "stay",
]  # fmt: skip
Background = Literal["plain", "gradient", "texture"]
Solid = Literal["cube", "sphere", "cylinder", "cone", "pyramid", "octahedron", "torus"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
SOLIDS: tuple[Solid, ...] = get_args(Solid)
SIDE = 64
"""Height and width of the world's usual picture, in pixels; other sizes show the same, larger or smaller."""
LEAST_SIDE = 32
MOST_VIEWS = 361
"""The given view, and one for each degree."""

ItemT = TypeVar("ItemT")
Some = Annotated[tuple[ItemT, ...], Field(min_length=1, max_length=1_000)]


def _each_once(config: FrozenConfig, *names: str) -> None:
    for name in names:
        there = getattr(config, name)
        if len(set(there)) < len(there):
            raise ValueError(f"{name} has one twice: {', '.join(there)}")


def _check_side(what: str, side: int) -> None:
    if side < LEAST_SIDE or side % 16:
        raise ValueError(f"{what} drawn at multiples of 16 pixels from {LEAST_SIDE} on, got {side}")


class WorldData(FrozenConfig):
    """A world of one moving object, drawn on the fly at the resolution of the stage, with the truth behind it known.

    Fewer ``shapes``, ``motions`` and ``backgrounds`` and a larger ``least_radius`` (of :data:`SIDE` pixels) make it
    easier. ``strides`` are the frame strides drawn from. A clip is a whole scene, or is cut out of one of
    ``scene_frames`` frames: so key frames and what lies between them are of scenes with the same speeds.
    """

    kind: Literal["world"]
    shapes: Some[Shape] = SHAPES
    motions: Some[Motion] = MOTIONS
    backgrounds: Some[Background] = BACKGROUNDS
    least_radius: float = Field(default=6.0, ge=5, le=8.5)
    strides: Strides = (1,)
    scene_frames: int | None = Field(default=None, gt=1, le=SIZE_LIMIT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _each_once(self, "shapes", "motions", "backgrounds")
        return self

    def check(self, frames: int, side: int) -> None:
        """``ValueError`` if clips of ``frames`` frames and ``side`` pixels cannot be drawn."""
        _check_side("the world is", side)
        if self.scene_frames is not None and self.scene_frames <= (frames - 1) * max(self.strides):
            raise ValueError(
                f"{frames} frames at stride {max(self.strides)} are longer than scene_frames {self.scene_frames}"
            )


EASY = WorldData(
    kind="world", motions=("left", "right", "up", "down", "stay"), backgrounds=("plain",), least_radius=8.5
)
"""Large objects on plain backgrounds that rest or move along an axis: what small models learn, and are asked for."""


class ViewsData(FrozenConfig):
    """Views of a shaded solid from all around, drawn on the fly: the first frame is the given view, at any elevation,
    the others stand evenly around it, as ``layout`` in ``data/views/sets.py`` says. Captions are empty, as in STIV.
    """

    kind: Literal["views"]
    solids: Some[Solid] = SOLIDS

    @model_validator(mode="after")
    def _check(self) -> Self:
        _each_once(self, "solids")
        return self

    def check(self, frames: int, side: int) -> None:
        """``ValueError`` if sets of ``frames`` views of ``side`` pixels cannot be drawn."""
        _check_side("views are", side)
        if frames > MOST_VIEWS:
            raise ValueError(f"there are at most {MOST_VIEWS} views of a solid, got {frames}")
