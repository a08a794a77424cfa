"""From requests to a plan: every default filled in, everything checked and read, before a device is touched."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.bundle.manifest import SKIPS_REMEDY, Manifest, Recommended
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.experience import beyond_training
from stiv_deploy.runtime.pipeline.given import Latents
from stiv_deploy.runtime.pipeline.images import check_given_frames, fitted_image, latent_groups
from stiv_deploy.runtime.pipeline.limits import check_memory
from stiv_deploy.runtime.pipeline.pictures import rgb_of
from stiv_deploy.runtime.pipeline.request import GenerationRequest, new_seed
from stiv_deploy.runtime.pipeline.tiling import check_tile
from stiv_deploy.runtime.sampling.conditioning import frame_indices, micro_conditions
from stiv_deploy.runtime.sampling.guidance import GuidanceMode, Unseen
from stiv_deploy.runtime.sampling.settings import SamplingSettings
from stiv_deploy.runtime.sampling.student import one_row

Item = TypeVar("Item")
RECOMMENDED = {
    "num_frames": "frames",
    "height": "height",
    "width": "width",
    "fps": "frames_per_second",
    "stride": "stride",
    "num_inference_steps": "steps",
    "guidance_mode": "guidance_mode",
    "guidance_scale": "guidance_scale",
    "image_guidance_scale": "image_scale",
    "guidance_renorm": "renorm",
    "solver": "solver",
    "time_shift": "time_shift",
    "late_stretch": "late_stretch",
    "solver_weights": "solver_weights",
    "skipped_steps": "skipped_steps",
}
"""Fields of a request that a bundle recommends, by the name of its recommendation."""
TIMES = ("time_shift", "late_stretch")
"""Fields that say when a given number of steps are."""
FOUND = ("solver_weights", "skipped_steps")
"""Fields with what tuning found for a solver, its steps and their times, and that hold for these alone."""


@dataclass(frozen=True, kw_only=True)
class VideoSize:
    """Size of a video in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.width}x{self.height}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Given:
    """What is given of a video: ``images`` uint8 [H, W, 3] by frame, or ``latents`` fp32 [C, h, w] by latent frame.

    Videos of one request, and of requests that are given the same, share one object.
    """

    images: Mapping[int, np.ndarray] = field(default_factory=dict)
    latents: Mapping[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class PlannedVideo:
    """One video to make.

    ``request`` is its own: one video, its seed and every default filled in, pictures with the SHA-256 of their files;
    it makes this video again. It comes from number ``origin`` of the planned requests. ``micro`` fp32 [6] are its
    micro-conditions. ``warnings`` say what of it the model was not trained for, a line each.
    """

    request: GenerationRequest
    origin: int
    settings: SamplingSettings
    given: Given
    micro: np.ndarray
    warnings: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What to show."""
        return self.request.prompt

    @property
    def negative_prompt(self) -> str:
        """What to steer away from."""
        return self.request.negative_prompt

    @property
    def noise(self) -> np.ndarray | None:
        """Initial noise fp32 [T, C, h, w], if it is not drawn."""
        return None if self.request.noise is None else self.request.noise.array

    @property
    def seed(self) -> int:
        """Seed of the noise."""
        assert self.request.seed is not None
        return self.request.seed


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationPlan:
    """All videos of some requests, in batches that the bundle can run, and what they share.

    ``bundle`` is the hash of the bundle that they were planned for; ``decode_tile`` is for
    :func:`~stiv_deploy.runtime.pipeline.tiling.plan_tiles`.
    """

    batches: tuple[tuple[PlannedVideo, ...], ...]
    size: VideoSize
    decode_tile: int | None
    bundle: str

    @property
    def videos(self) -> list[PlannedVideo]:
        """All videos, in the order of the requests."""
        return [video for batch in self.batches for video in batch]


def plan_generation(bundle: Bundle, requests: GenerationRequest | Sequence[GenerationRequest]) -> GenerationPlan:
    """The plan of one request, or of several that are of one size and tile; they may differ in everything else.

    Raises :class:`RequestError` for whatever keeps ``bundle`` from making the videos: sizes, tiles, pictures that
    cannot be read or do not fit, frames that the VAE cannot code, latents of another shape.
    """
    model = bundle.manifest.model
    each = [_with_defaults(request, bundle.manifest) for request in _listed(requests)]
    size = _shared("size", [_size(request) for request in each])
    tile = _shared("decode_tile", [request.decode_tile for request in each])
    largest = bundle.max_batch(size.frames, size.height, size.width)
    total = sum(request.count for request in each)
    check_memory(f"{total} times {size}", total * _bytes(size, model), "ask for fewer or smaller videos at once")
    counts = _batches(total, largest)
    for count in counts:
        bucket = bundle.bucket_for(count, size.frames, size.height, size.width)
        check_tile(model, bucket, tile)
    videos = iter(_planned(each, size, bundle.manifest))
    batches = tuple(tuple(next(videos) for _ in range(count)) for count in counts)
    return GenerationPlan(batches=batches, size=size, decode_tile=tile, bundle=bundle.hash)


def _listed(requests: GenerationRequest | Sequence[GenerationRequest]) -> list[GenerationRequest]:
    listed = [requests] if isinstance(requests, GenerationRequest) else list(requests)
    for each in listed:
        if not isinstance(each, GenerationRequest):
            raise RequestError(f"a plan is made of GenerationRequest, got a {type(each).__name__}")
    if not listed:
        raise RequestError("no request given; give one or more")
    return listed


def _with_defaults(request: GenerationRequest, manifest: Manifest) -> GenerationRequest:
    """``request`` with what it leaves open as ``manifest`` recommends for its steps and solver, and with a seed.

    What was tuned together goes together: times that are named in part get the checkpoint's own for the rest, and have
    no fitted weights. So have skipped steps that are named: none were fitted, nor are times good, with those.
    """
    own = manifest.sampling
    if request.skip_blocks:
        defaults = _skipping(request, manifest)
    else:
        defaults = manifest.recommended(request.num_inference_steps, request.solver)
    if (request.time_shift, request.late_stretch) != (None, None) or request.skipped_steps:
        times = {"time_shift": own.time_shift, "late_stretch": own.late_stretch, "solver_weights": None}
        defaults = defaults.model_copy(update=times)
    given = {name: value for name, value in request if value is not None and name != "skip_blocks"}
    values = {name: getattr(defaults, recommended) for name, recommended in RECOMMENDED.items()} | given
    more = {"original_height": values["height"], "original_width": values["width"]}
    if request.seed is None:
        more["seed"] = new_seed()
    return GenerationRequest(**(more | values))


def _skipping(request: GenerationRequest, manifest: Manifest) -> Recommended:
    """Defaults of a request that skips blocks, which are tuned together with its times."""
    found = manifest.skipping(request.num_inference_steps, request.solver)
    if found is None:
        known = [] if manifest.tuned is None else manifest.tuned.skipping()
        kinds = ", ".join(sorted({f"{each.steps} steps of {each.solver}" for each in known})) or "none"
        raise RequestError(
            f"skip_blocks: this bundle was tuned to skip blocks in {kinds}; ask for one of these, name skipped_steps, "
            "or run 'stiv tune' on a bundle exported with --skips"
        )
    if named := [name for name in (*TIMES, *FOUND) if getattr(request, name) is not None]:
        raise RequestError(f"skip_blocks comes with its own {', '.join(named)}; leave out one or the other")
    return found


def _shared(what: str, values: Sequence[Item]) -> Item:
    """The one value of all requests; :class:`RequestError` naming the first two that differ."""
    for index, value in enumerate(values):
        if value != values[0]:
            raise RequestError(
                f"requests of one plan have one {what}, but request 0 has {values[0]} and request {index} has {value}; "
                "plan them apart"
            )
    return values[0]


def _size(request: GenerationRequest) -> VideoSize:
    values = dict(request)
    return VideoSize(frames=values["num_frames"], height=values["height"], width=values["width"])


def _bytes(size: VideoSize, model: ModelFacts) -> int:
    """Least memory of a video's result: frames of a batch and of all of them as uint8, latents as fp32."""
    pixels = size.frames * size.height * size.width
    latents = model.latent_frames(size.frames) * model.latent_channels * 4
    return 2 * 3 * pixels + latents * (size.height // model.spatial_factor) * (size.width // model.spatial_factor)


def _batches(count: int, largest: int) -> list[int]:
    """Sizes of as few batches of at most ``largest`` as hold ``count``, the first ones larger by one or equal."""
    batches = math.ceil(count / largest)
    return [count // batches + (index < count % batches) for index in range(batches)]


def _planned(requests: Sequence[GenerationRequest], size: VideoSize, manifest: Manifest) -> Iterable[PlannedVideo]:
    model = manifest.model
    known: dict[Any, tuple[GenerationRequest, Given]] = {}
    for origin, request in enumerate(requests):
        key = (tuple(request.frames.items()), tuple(request.latents.items()), request.fit, request.background)
        if key not in known:
            known[key] = _given(request, size, model)
        read, given = known[key]
        _check_noise(request, size, model)
        settings = _settings(request, manifest)
        micro, warnings = _micro(request), _warnings(request, given, size, manifest)
        for index in range(request.count):
            seed = (request.seed or 0) + index
            changes = {"frames": read.frames, "latents": read.latents, "seed": seed, "count": 1}
            own = request.model_copy(update=changes)  # of values that are checked already
            yield PlannedVideo(
                request=own, origin=origin, settings=settings, given=given, micro=micro, warnings=warnings
            )


def _warnings(request: GenerationRequest, given: Given, size: VideoSize, manifest: Manifest) -> tuple[str, ...]:
    model, values = manifest.model, dict(request)
    return beyond_training(
        manifest.trained,
        stride=values["stride"],
        size=(size.height, size.width),
        frames=size.frames,
        given=given.latents or latent_groups(given.images, model),
        latent_frames=model.latent_frames(size.frames),
    )


def _settings(request: GenerationRequest, manifest: Manifest) -> SamplingSettings:
    values, student = dict(request), manifest.model.student
    if student is not None:
        _check_branches(request, manifest)
    if values["skipped_steps"] and not manifest.skips:
        raise RequestError(f"skipped_steps: this bundle has no graphs for that; {SKIPS_REMEDY}, or leave them out")
    settings = SamplingSettings(
        steps=values["num_inference_steps"],
        guidance_mode=values["guidance_mode"],
        guidance_scale=values["guidance_scale"],
        image_scale=values["image_guidance_scale"],
        renorm=values["guidance_renorm"],
        solver=values["solver"],
        time_shift=values["time_shift"],
        late_stretch=values["late_stretch"],
        solver_weights=values["solver_weights"] or (),
        skipped_steps=values["skipped_steps"] or (),
        unseen=values["unseen"] or Unseen.NOISED,
        guidance_from=0.0 if values["guidance_from"] is None else values["guidance_from"],
        guidance_until=1.0 if values["guidance_until"] is None else values["guidance_until"],
    )
    return one_row(settings, student)


def _check_branches(request: GenerationRequest, manifest: Manifest) -> None:
    """:class:`RequestError` where ``request`` has a word for guidance branches, which a student has not."""
    if request.guidance_mode is GuidanceMode.NONE:
        raise RequestError("guidance_mode none: a student has its guidance in it; leave it out, and give a low scale")
    if request.negative_prompt:
        raise RequestError("a student has no row for a negative prompt; leave it out, or use a bundle of its teacher")
    views = manifest.trained is not None and "views" in manifest.trained.tasks
    if request.unseen is Unseen.ZERO and not views:
        raise RequestError(
            "unseen zero: this student has no branch without the image, and no views in it; leave it out"
        )


def _micro(request: GenerationRequest) -> np.ndarray:
    values = dict(request)
    return micro_conditions(values["original_height"], values["original_width"], values["stride"], values["num_frames"])


def _given(request: GenerationRequest, size: VideoSize, model: ModelFacts) -> tuple[GenerationRequest, Given]:
    """``request`` with frames counted from 0 and its pictures' SHA-256, and what it is given, read and fitted."""
    pictures = dict(zip(frame_indices(request.frames, size.frames, "image"), request.frames.values(), strict=True))
    check_given_frames(pictures, size.frames, model)
    loaded = {index: picture.load(request.background) for index, picture in pictures.items()}
    behind = rgb_of(request.background)
    images = {
        index: fitted_image(pixels, size.height, size.width, request.fit, str(picture), behind)
        for index, (picture, pixels) in loaded.items()
    }
    latents = _given_latents(request, size, model)
    read = request.changed(frames={index: picture for index, (picture, _) in loaded.items()}, latents=latents)
    return read, Given(images=images, latents={index: each.array for index, each in latents.items()})


def _given_latents(request: GenerationRequest, size: VideoSize, model: ModelFacts) -> dict[int, Latents]:
    frames = model.latent_frames(size.frames)
    wanted = _latent_shape(size, model)
    given = dict(zip(frame_indices(request.latents, frames, "latents"), request.latents.values(), strict=True))
    for index, each in given.items():
        if each.array.shape != wanted:
            shape = list(each.array.shape)
            raise RequestError(f"the latents of frame {index} are {shape}; {size} wants {list(wanted)}")
    return given


def _check_noise(request: GenerationRequest, size: VideoSize, model: ModelFacts) -> None:
    wanted = (model.latent_frames(size.frames), *_latent_shape(size, model))
    if request.noise is not None and request.noise.array.shape != wanted:
        raise RequestError(f"the noise is {list(request.noise.array.shape)}; {size} wants {list(wanted)}")


def _latent_shape(size: VideoSize, model: ModelFacts) -> tuple[int, int, int]:
    """That of one latent frame, [C, h, w]."""
    return model.latent_channels, size.height // model.spatial_factor, size.width // model.spatial_factor
