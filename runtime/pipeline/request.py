"""A generation request as a value: frozen, checked as far as no bundle is needed, JSON in and out."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from pydantic import Field, ModelWrapValidatorHandler, ValidationError, ValidationInfo, field_validator, model_validator

from stiv_deploy.runtime.bundle.bounds import SIZE_LIMIT, Steps, Weights
from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.bundle.faults import fault_text
from stiv_deploy.runtime.errors import RequestError, briefly, one_line
from stiv_deploy.runtime.files import parse_json
from stiv_deploy.runtime.pipeline.given import Latents, Noise, Picture
from stiv_deploy.runtime.pipeline.images import Fit
from stiv_deploy.runtime.pipeline.limits import BOUNDS, SEED_LIMIT, TEXT_LIMIT, bounded, named, number, switch, text
from stiv_deploy.runtime.pipeline.pictures import rgb_of
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.settings import Solver

NAMES = {"guidance_mode": GuidanceMode, "solver": Solver, "fit": Fit, "unseen": Unseen}
"""Fields that choose one of several names."""


def _number(name: str, description: str, default: float | None = None) -> Any:
    low, high = BOUNDS[name]
    return Field(default=default, ge=low, le=high, description=description)


class GenerationRequest(Frozen):
    """What to generate: ``count`` videos of one prompt. Every field but ``prompt`` may be left out.

    ``None`` means what the bundle recommends. Numbers are finite and within :data:`limits.BOUNDS`, texts have at most
    20000 characters; what depends on the bundle (sizes, frames that can be given, tiles) is checked by the plan, see
    :func:`plan.plan_generation`. ``frames`` are pictures by video frame (any :data:`given.ImageLike` when it is made
    in Python), ``latents`` fp32 [C, h, w] by latent frame, both with negative indices counted from the end; give
    either. ``noise`` fp32 [T, C, h, w] stands for what the seed would draw. Frame i of a video was, so to say, taken
    ``stride`` frames of the source after frame i - 1 (by default as most clips that the model was trained on), from a
    source of ``original_height`` x ``original_width`` pixels (by default the video's own size): conditions of the
    model, like no crop and the number of frames. JSON is written by :meth:`to_json` and read by :meth:`from_json`.

    Raises :class:`RequestError`, one line, for anything else and for keys that are unknown.
    """

    prompt: str = Field(max_length=TEXT_LIMIT, description="What to show; may be empty.")
    negative_prompt: str = Field(default="", max_length=TEXT_LIMIT, description="What to steer away from.")
    frames: dict[int, Picture] = Field(default={}, description="Pictures of given frames, by frame.")
    latents: dict[int, Latents] = Field(default={}, description="Given latents, by latent frame.")
    fit: Fit = Field(default=Fit.EXACT, description="How pictures of another size become frames.")
    background: str = Field(default="black", description="Colour behind pictures with alpha, and of the fit pad.")
    num_frames: int | None = _number("num_frames", "Number of frames.")
    height: int | None = _number("height", "Height in pixels.")
    width: int | None = _number("width", "Width in pixels.")
    fps: float | None = _number("fps", "Frames per second of what is written.")
    stride: int | None = _number("stride", "Sampling stride: source frames from one frame to the next.")
    original_height: int | None = _number("original_height", "Height of the source in pixels.")
    original_width: int | None = _number("original_width", "Width of the source in pixels.")
    num_inference_steps: int | None = _number("num_inference_steps", "Sampling steps.")
    guidance_mode: GuidanceMode | None = Field(default=None, description="Which branches guide.")
    guidance_scale: float | None = _number("guidance_scale", "Guidance scale (of the text, in mode sit).")
    image_guidance_scale: float | None = _number("image_guidance_scale", "Guidance scale of the image, in mode sit.")
    guidance_renorm: bool | None = Field(default=None, description="Keep the norm of the conditional velocity.")
    guidance_from: float | None = _number("guidance_from", "Time, 0 noise to 1 data, before which nothing guides.")
    guidance_until: float | None = _number("guidance_until", "Time, 0 noise to 1 data, after which nothing guides.")
    unseen: Unseen | None = Field(
        default=None, description="What the branch without the image gets at given frames; None: noised."
    )
    solver: Solver | None = Field(default=None, description="Solver of the sampling ODE.")
    time_shift: float | None = _number("time_shift", "Above 1 spends more steps near the noise.")
    late_stretch: float | None = _number("late_stretch", "Above 1 takes longer steps once the clip is decided.")
    solver_weights: Weights | None = Field(
        default=None, description="AB2's in every step but the first, of the velocity there and the one before."
    )
    skip_blocks: bool | None = Field(
        default=None, description="Skip the model's blocks in the steps that tuning found for so many of them."
    )
    skipped_steps: Steps | None = Field(
        default=None, description="Numbers of the steps, from 0 on, that skip the model's blocks."
    )
    seed: int | None = _number("seed", "Seed of the first video's noise; video i takes seed + i. None: a new one.")
    noise: Noise = Field(default=None, description="Initial noise of the one video, instead of the seed's.")
    count: int = _number("count", "Number of videos.", 1)
    decode_tile: int | None = _number("decode_tile", "Tile of the VAE in pixels, 0 for whole frames.")

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(values)
        except ValidationError as error:
            raise RequestError(_first_fault(error, cls)) from None

    @field_validator(*BOUNDS, mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return None if value is None and cls.model_fields[name].default is None else bounded(name, value)

    @field_validator("solver_weights", mode="before")
    @classmethod
    def _check_weights(cls, value: Any) -> Any:
        """Neither text nor a truth value is a number, as in other fields."""
        for pair in value if isinstance(value, list | tuple) else ():
            for weight in pair if isinstance(pair, list | tuple) else ():
                if isinstance(weight, str | bool):
                    number("solver_weights", weight)
        return value

    @field_validator(*NAMES, mode="before")
    @classmethod
    def _check_name(cls, value: Any, info: ValidationInfo) -> Any:
        name = str(info.field_name)
        return None if value is None and cls.model_fields[name].default is None else named(NAMES[name], name, value)

    @field_validator("prompt", "negative_prompt", mode="before")
    @classmethod
    def _check_text(cls, value: Any, info: ValidationInfo) -> str:
        return text(str(info.field_name).replace("_", " "), value)

    @field_validator("background", mode="before")
    @classmethod
    def _check_colour(cls, value: Any) -> str:
        rgb_of(value)
        return str(value)

    @field_validator("skipped_steps", mode="before")
    @classmethod
    def _check_steps(cls, value: Any) -> Any:
        """The same, and a step has no parts."""
        for step in value if isinstance(value, list | tuple) else ():
            if isinstance(step, str | bool | float):
                raise RequestError(f"skipped_steps are whole numbers, got {step!r}")
        return value

    @field_validator("guidance_renorm", "skip_blocks", mode="before")
    @classmethod
    def _check_switch(cls, value: Any, info: ValidationInfo) -> bool | None:
        return None if value is None else switch(str(info.field_name), value)

    @field_validator("frames", "latents", mode="before")
    @classmethod
    def _check_indices(cls, value: Any, info: ValidationInfo) -> dict[int, Any]:
        what = {"frames": "images", "latents": "latents"}[str(info.field_name)]
        if not isinstance(value, Mapping):
            raise RequestError(f"{what} are given by frame number, as in {{0: ...}}, got a {type(value).__name__}")
        return {_index(index, what): each for index, each in value.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.frames and self.latents:
            raise RequestError("frames and latents are given; give either")
        if self.noise is not None and self.count > 1:
            raise RequestError(f"noise is of one video, and count is {self.count}; make a request for each video")
        if self.seed is not None and self.seed + self.count > SEED_LIMIT:
            raise RequestError(f"seed must be from 0 to 2^63 - {self.count}, got {self.seed}")
        return self

    def changed(self, **values: Any) -> Self:
        """A request with other ``values``, checked like any."""
        return type(self)(**(dict(self) | values))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without the fields that are left to the bundle; see :meth:`from_json`."""
        values = self.model_dump(mode="json", exclude_none=True)
        return {name: value for name, value in values.items() if value != {}}

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """The request of JSON text, or of the values in it; raises :class:`RequestError`."""
        if isinstance(values, str | bytes):
            try:
                values = parse_json(values)
            except ValueError as error:
                raise RequestError(f"the request is not JSON ({error})") from None
        return cls.model_validate(values)


def _index(value: Any, what: str) -> int:
    """A key of ``frames`` or ``latents``; JSON has but strings."""
    number = value.removeprefix("-") if isinstance(value, str) else ""
    if number.isdecimal() and number.isascii() and len(number) <= 6:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{what} are given by frame number, got {briefly(value)}")
    if abs(int(value)) > SIZE_LIMIT:
        raise RequestError(
            f"{what} are given by frame number, from {-SIZE_LIMIT} to {SIZE_LIMIT}; got {briefly(value)}"
        )
    return int(value)


def _first_fault(error: ValidationError, model: type[GenerationRequest]) -> str:
    """The first of pydantic's faults in our words; most are found, and worded, by the validators."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = one_line(".".join(str(part) for part in fault["loc"]), 80)
    match fault["type"]:
        case "missing":
            return f"no {where} given"
        case "extra_forbidden":
            return f"a request has no {where!r}; there are: {', '.join(model.model_fields)}"
    return fault_text(error) if where else f"a request: {fault_text(error)}"


def new_seed(generator: np.random.Generator | None = None) -> int:
    """A seed below 2^32, drawn from ``generator`` or from the system's entropy."""
    return int((np.random.default_rng() if generator is None else generator).integers(2**32))


def in_a_row(requests: Sequence[GenerationRequest], seed: int) -> list[GenerationRequest]:
    """``requests`` with seeds that count on from ``seed`` over all their videos; :class:`RequestError`."""
    numbered = []
    for request in requests:
        numbered.append(request.changed(seed=seed))
        seed += request.count
    return numbered
