"""Model configurations: the architecture facts of STIV, checked, frozen, and by name.

The three large sizes are the paper's (arXiv 2412.07730, table of model variants), all with heads of 64; ``tiny`` is the
one that trains on two CPU cores and ships with the repository.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stiv_deploy.stiv_ref.bounds import SIZE_LIMIT, Factor, Layers, Name, Scale, Size
from stiv_deploy.stiv_ref.errors import ConfigError, briefly, one_line
from stiv_deploy.stiv_ref.files import parse_json, read_text

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

SHOWN = 2
"""So many faults of a config are told."""
Section = TypeVar("Section", bound="FrozenConfig")
StoredType = Literal["float16", "bfloat16", "float32"]
"""Types that latents and text states are stored in."""


class FrozenConfig(BaseModel):
    """Base of every config: immutable, finite, and an unknown key is an error instead of a silent no-op."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_config(kind: type[Section], values: object, source: str) -> Section:
    """Build ``kind`` from ``values``; raise one-line :class:`ConfigError` naming ``source`` if they do not fit."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}: {faults_of(error)}") from None


def faults_of(error: ValidationError) -> str:
    """The first faults in words, with what was given, and how many there are more."""
    faults = error.errors(include_url=False, include_context=False)
    more = f" (and {len(faults) - SHOWN} more faults)" if len(faults) > SHOWN else ""
    return "; ".join(_said(fault) for fault in faults[:SHOWN]) + more


def _said(fault: "ErrorDetails") -> str:
    where = one_line(".".join(str(part) for part in fault["loc"]), 80) or "config"
    given = "" if isinstance(fault["input"], dict | BaseModel) else f" (got {briefly(fault['input'])})"
    return f"{where}: {one_line(fault['msg'].removeprefix('Value error, '), 200)}{given}"


def read_config(kind: type[Section], path: Path) -> Section:
    """Read a JSON config file; raise :class:`ConfigError` if it is missing, is not JSON, or does not fit."""
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    return parse_config(kind, values, str(path))


class Student(FrozenConfig):
    """What a distilled model has in the place of guidance branches: JIT-CFG with CFG-Renorm in one row.

    ``guidance`` are the least and the greatest scale that it was trained for; the scale is a condition of the model. A
    ``flow_map`` also takes the time that a step ends at, and gives the mean velocity up to there: few steps are enough.
    """

    guidance: tuple[Scale, Scale]
    flow_map: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Student":
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"guidance goes from the least scale to the greatest, got {list(self.guidance)}")
        return self

    def covers(self, scale: float) -> bool:
        """Whether it was trained for ``scale``."""
        return self.guidance[0] <= scale <= self.guidance[1]

    @property
    def scales(self) -> str:
        """The scales in words."""
        least, greatest = self.guidance
        return f"{least:g}" if least == greatest else f"{least:g} to {greatest:g}"


class StivConfig(FrozenConfig):
    """Architecture of one STIV transformer.

    ``patch`` is (pt, ps): frames and pixels of latent that make one token. ``base_frames`` and ``base_grid`` (in
    tokens) are the sizes at which RoPE positions are used as they are; larger inputs are interpolated back to them.
    The last ``full_blocks`` of the ``blocks`` see all tokens in masked training (MaskDiT), else they are as the others.
    ``cross_qk_norm``: whether queries and keys of cross-attention are normalized; those of self-attention always are.
    ``student``: what a distilled model has instead of guidance branches.
    """

    name: Name
    blocks: Layers
    width: Size
    heads: Size
    patch: tuple[Factor, Factor] = (1, 2)
    latent_channels: Size = 4
    text_width: Size = 1024
    temporal: bool = True
    mlp_ratio: int = Field(default=4, gt=0, le=64)
    base_frames: Size = 20
    base_grid: tuple[Size, Size] = (16, 16)
    rope_theta: float = Field(default=10_000.0, gt=0, le=1e12)
    frequency_width: int = Field(default=256, gt=0, le=SIZE_LIMIT, multiple_of=2)
    full_blocks: int = Field(default=0, ge=0, le=1_000)
    cross_qk_norm: bool = True
    student: Student | None = None

    @model_validator(mode="after")
    def _check(self) -> "StivConfig":
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.head_dim % 4:
            raise ValueError(f"head size {self.head_dim} (width / heads) must be a multiple of 4 for 2D RoPE")
        if self.full_blocks >= self.blocks:
            raise ValueError(f"full_blocks {self.full_blocks} must leave main blocks, there are {self.blocks} in all")
        if self.student is not None and not self.temporal:
            raise ValueError("students are of video models; an image model has temporal = false")
        return self

    @property
    def teacher(self) -> "StivConfig":
        """The architecture that a student learns from: that of a flow map is a student of guidance alone."""
        student = self.student
        before = student.model_copy(update={"flow_map": False}) if student is not None and student.flow_map else None
        return self.model_copy(update={"student": before})

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads

    @property
    def patch_values(self) -> int:
        """Latent values in one token: C * pt * ps * ps."""
        return self.latent_channels * self.patch[0] * self.patch[1] ** 2


CONFIGS = {
    config.name: config
    for config in (
        StivConfig(
            name="tiny", blocks=6, width=160, heads=5, text_width=96, base_frames=8, base_grid=(4, 4), rope_theta=100.0
        ),
        StivConfig(name="XL", blocks=28, width=1152, heads=18),
        StivConfig(name="XXL", blocks=38, width=1536, heads=24),
        StivConfig(name="M", blocks=46, width=3072, heads=48),
    )
}


def model_config(name: str) -> StivConfig:
    """Return the named configuration; raise :class:`ConfigError` that lists the names if there is none."""
    try:
        return CONFIGS[name]
    except KeyError:
        raise ConfigError(f"no model config named {name!r}; there are: {', '.join(CONFIGS)}") from None
