"""The grounds that a study can stand on, by name, and where each keeps its parts."""

from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from digit_ground import DigitGround
from ground import Ground
from world_ground import WorldGround


class GroundName(StrEnum):
    """Moving digits, or the drawn world."""

    DIGITS = "digits"
    WORLD = "world"


DIGITS = GroundName.DIGITS
Stand = Annotated[GroundName, typer.Option("--ground", help="What clips are of, and whose checkpoint is taken.")]


@cache
def ground_of(name: GroundName) -> Ground:
    """The ground called ``name``."""
    return {GroundName.DIGITS: DigitGround, GroundName.WORLD: WorldGround}[name]()


def suffixed(name: str, ground: Ground) -> str:
    """``name`` of a result of ``ground``: as it is for digits, which came first."""
    return name if ground.name == DIGITS else f"{name}-{ground.name}"


def folder_of(ground: Ground, work: Path) -> Path:
    """Where in ``work`` parts of ``ground`` are kept: in it for digits, in a folder of its own otherwise."""
    return work if ground.name == DIGITS else work / ground.name
