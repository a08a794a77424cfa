"""Training recipes: a TOML file that says what is trained on what, in which stages, checked before the first step."""

import tomllib
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults
from stiv_deploy.stiv_ref.config import FrozenConfig, model_config, parse_config
from stiv_deploy.stiv_ref.data.moving_digits import SIZE, check_frames
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.vae import VaeConfig


class TextSection(FrozenConfig):
    """The small text encoder; its width is the model's ``text_width``, its words the data's."""

    layers: int = Field(default=2, gt=0)
    heads: int = Field(default=3, gt=0)
    max_tokens: int = Field(default=16, gt=1)


class VaeSection(VaeConfig):
    """The VAE and its training run."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    kl_weight: float = Field(default=1e-4, ge=0)


class Stage(FrozenConfig):
    """One stage of the progressive recipe (arXiv 2412.07730): T2I, then T2V, then TI2V.

    ``image_dropout`` is the share of clips without a given frame; ``joint_dropout`` the share of those that lose
    their text too. Learning rate: linear warm-up, then cosine to a tenth.
    """

    task: Literal["t2i", "t2v", "ti2v"]
    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    frames: int = Field(default=1, gt=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(default=100, ge=0)
    text_dropout: float = Field(default=0.1, ge=0, le=1)
    image_dropout: float = Field(default=0.1, ge=0, le=1)
    joint_dropout: float = Field(default=0.5, ge=0, le=1)
    logit_normal: bool = True
    time_shift: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.task == "t2i" and self.frames != 1:
            raise ValueError(f"task t2i trains on one frame, not {self.frames}")
        if self.task != "t2i" and self.frames < 2:
            raise ValueError(f"task {self.task} needs at least 2 frames, got {self.frames}")
        if self.task == "ti2v" and self.joint_dropout * self.image_dropout > self.text_dropout:
            raise ValueError("joint_dropout * image_dropout must not exceed text_dropout")
        return self


class Recipe(FrozenConfig):
    """A whole training run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    model: str
    seed: int = 0
    threads: int = Field(default=2, gt=0)
    ema: float = Field(default=0.999, gt=0, lt=1)
    gradient_clip: float = Field(default=1.0, gt=0)
    save_every: int = Field(default=250, gt=0)
    text: TextSection = TextSection()
    vae: VaeSection
    sampling: SamplingDefaults = SamplingDefaults()
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        ranks = [("t2i", "t2v", "ti2v").index(stage.task) for stage in self.stages]
        if ranks != sorted(ranks):
            raise ValueError(f"stages must go t2i, t2v, ti2v, got {', '.join(stage.task for stage in self.stages)}")
        for stage in self.stages:
            check_frames(stage.frames)
        self._check_parts()
        return self

    def _check_parts(self) -> None:
        """Everything that would else fail only after minutes of training: the parts must fit each other."""
        model, sampling = model_config(self.model), self.sampling
        if self.vae.latent_channels != model.latent_channels:
            raise ValueError(
                f"vae.latent_channels is {self.vae.latent_channels}, model {self.model} takes {model.latent_channels}"
            )
        if model.text_width % self.text.heads:
            raise ValueError(f"text.heads {self.text.heads} does not divide the text width {model.text_width}")
        pixels = self.vae.spatial_factor * model.patch[1]
        for name, size in (("data", SIZE), ("sampling.height", sampling.height), ("sampling.width", sampling.width)):
            if size % pixels:
                raise ValueError(f"{name} size {size} is not a multiple of {pixels} (VAE factor times patch)")
        if any(frames % model.patch[0] for frames in (*(stage.frames for stage in self.stages), sampling.frames)):
            raise ValueError(f"frames must be multiples of the model's temporal patch {model.patch[0]}")


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raise :class:`ConfigError` with one line if anything is off."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None
    return parse_config(Recipe, values, str(path))
