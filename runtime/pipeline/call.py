"""The keywords of a pipeline's call, and the requests that they make."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from stiv_deploy.runtime.errors import RequestError, briefly
from stiv_deploy.runtime.pipeline.given import ImageLike, as_array, as_picture
from stiv_deploy.runtime.pipeline.images import Fit
from stiv_deploy.runtime.pipeline.limits import SEED_LIMIT, bounded, switch, whole_number
from stiv_deploy.runtime.pipeline.request import GenerationRequest, in_a_row, new_seed


class ClipOptions(TypedDict, total=False):
    """Keywords of every method that makes clips: fields of :class:`GenerationRequest`, and short forms.

    ``num_videos_per_prompt`` is the field ``count``, ``resize`` the fit ``crop``. A NumPy ``generator`` draws the seed,
    a torch one is asked for its initial seed. ``latents`` of given frames are a dictionary; an array or tensor fp32
    [B, T, C, h, w] is the initial noise (the field ``noise``). ``negative_prompt`` may be a list, one for each prompt.
    What is ``None`` is left out.
    """

    negative_prompt: str | Sequence[str] | None
    latents: Mapping[int, np.ndarray] | np.ndarray | None
    fit: str
    background: str
    resize: bool
    num_frames: int | None
    height: int | None
    width: int | None
    fps: float | None
    stride: int | None
    original_height: int | None
    original_width: int | None
    num_inference_steps: int | None
    guidance_mode: str | None
    guidance_scale: float | None
    image_guidance_scale: float | None
    guidance_renorm: bool | None
    guidance_from: float | None
    guidance_until: float | None
    unseen: str | None
    solver: str | None
    time_shift: float | None
    late_stretch: float | None
    solver_weights: Sequence[tuple[float, float]] | None
    skip_blocks: bool | None
    skipped_steps: Sequence[int] | None
    seed: int | None
    generator: Any
    num_videos_per_prompt: int
    decode_tile: int | None


class CallOptions(ClipOptions, total=False):
    """Keywords of :class:`pipeline.StivPipeline`'s call: those of all clips, and pictures.

    ``image`` is the picture of frame 0 or pictures by frame (the field ``frames``).
    """

    image: ImageLike | Mapping[int, ImageLike] | None


def options_of(request: GenerationRequest) -> dict[str, Any]:
    """Keywords of a call that asks for ``request``, its prompt among them; its pictures are ``image``."""
    options = {name: value for name, value in request if value is not None and value != {}}
    return options | ({"image": options.pop("frames")} if "frames" in options else {})


def requests_of_call(prompt: str | Sequence[str], options: Mapping[str, Any]) -> list[GenerationRequest]:
    """One request for each prompt, with ``options`` (see :class:`CallOptions`); seeds count on over all videos.

    Raises :class:`RequestError`.
    """
    prompts = prompt_list(prompt)
    fields = {name: value for name, value in options.items() if value is not None}
    negatives = negative_list(fields.pop("negative_prompt", None), len(prompts))
    seed, generator = fields.pop("seed", None), fields.pop("generator", None)
    fields = _with_short_forms(fields)
    texts = list(zip(prompts, negatives, strict=True))
    noise = as_array(fields.get("latents"))
    if noise is None:
        requests = [GenerationRequest(prompt=each, negative_prompt=negative, **fields) for each, negative in texts]
    else:
        requests = _from_noise(texts, fields, noise)
    return in_a_row(requests, first_seed(seed, generator))


def _from_noise(texts: list[tuple[str, str]], fields: dict[str, Any], noise: np.ndarray) -> list[GenerationRequest]:
    """A request for each video of ``noise``, [B, T, C, h, w]; :class:`RequestError`."""
    count = int(bounded("count", fields.pop("count", 1)))
    if len(noise.shape) != 5 or len(noise) != count * len(texts):
        raise RequestError(
            f"the initial noise of {count * len(texts)} videos is [{count * len(texts)}, T, C, h, w], got "
            f"{list(noise.shape)}; latents of given frames are a dictionary by latent frame"
        )
    del fields["latents"]
    videos = [text for text in texts for _ in range(count)]
    return [
        GenerationRequest(prompt=prompt, negative_prompt=negative, noise=own, **fields)
        for (prompt, negative), own in zip(videos, noise, strict=True)
    ]


def _with_short_forms(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with ``image``, ``num_videos_per_prompt`` and ``resize`` as the fields that they stand for."""
    image = options.pop("image", None)
    if image is not None:
        pictures = image if isinstance(image, Mapping) else {0: image}
        options["frames"] = {index: as_picture(each) for index, each in pictures.items()}
    if "num_videos_per_prompt" in options:
        options["count"] = options.pop("num_videos_per_prompt")
    if switch("resize", options.pop("resize", False)) and options.setdefault("fit", Fit.CROP) == Fit.EXACT:
        raise RequestError("resize is given, and the fit 'exact' resizes nothing; give one of them")
    return options


def prompt_list(prompt: str | Sequence[str]) -> list[str]:
    """Prompts as a list; :class:`RequestError` if there is none."""
    prompts = [prompt] if isinstance(prompt, str) else _texts("prompt", prompt)
    if not prompts:
        raise RequestError("no prompt given; give a string or a list of at least one (an empty string is allowed)")
    return prompts


def negative_list(negative: str | Sequence[str] | None, count: int) -> list[str]:
    """One negative prompt for each of ``count`` prompts, the empty one for ``None``; :class:`RequestError`."""
    if negative is None or isinstance(negative, str):
        return [negative or ""] * count
    negatives = _texts("negative_prompt", negative)
    if len(negatives) != count:
        raise RequestError(f"{len(negatives)} negative prompts for {count} prompts; give one for all, or one each")
    return negatives


def _texts(name: str, values: Any) -> list[str]:
    if isinstance(values, bytes | Mapping) or not isinstance(values, Iterable):
        raise RequestError(f"{name} must be a string or a list of strings, got {briefly(values)}")
    return list(values)


def first_seed(seed: Any, generator: Any = None) -> int:
    """The seed of the first sample: given, of ``generator``, or new; :class:`RequestError`."""
    if seed is None:
        return new_seed() if generator is None else seed_of(generator)
    if generator is not None:
        raise RequestError("give either seed or generator, not both")
    return whole_number("seed", seed)


def seed_of(generator: Any) -> int:
    """A seed drawn from a NumPy generator, or a torch generator's initial one, below 2^63; :class:`RequestError`."""
    if isinstance(generator, np.random.Generator):
        return new_seed(generator)
    initial = getattr(generator, "initial_seed", None)
    if not callable(initial):
        raise RequestError(f"generator must be one of NumPy or torch, got {briefly(generator)}; or give a seed")
    return int(initial()) % SEED_LIMIT
