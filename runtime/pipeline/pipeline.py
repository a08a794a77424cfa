"""Text, and images if given, to video: the public face of the runtime."""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions, graph_specs
from stiv_deploy.runtime.bundle.manifest import Bucket
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.images import (
    ImageLike,
    check_given_frames,
    clip_from_images,
    frames_from_video,
    given_images,
)
from stiv_deploy.runtime.pipeline.request import (
    GenerationRequest,
    Sample,
    VideoSize,
    draw_noise,
    in_batches,
    make_samples,
    sampling_settings,
    video_size,
    whole_number,
)
from stiv_deploy.runtime.pipeline.tiling import Bind, TiledGraph, TilePlan, check_tile, plan_tiles
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.conditioning import frame_mask, micro_conditions, scatter_frames
from stiv_deploy.runtime.sampling.denoiser import Denoiser, GraphClock
from stiv_deploy.runtime.sampling.guidance import BRANCHES
from stiv_deploy.runtime.sampling.sampler import Observer, Sampler, StepRecord

if TYPE_CHECKING:
    from PIL.Image import Image

KEPT_STATES = 2
"""Request sizes whose buffers are kept; two serve a call whose last batch is smaller than the others."""
OUTPUT_TYPES = ("np", "pil", "latent")
OutputType = Literal["np", "pil", "latent"]
PHASES = ("load", "text", "encode", "denoise", "decode")


@dataclass(frozen=True, kw_only=True)
class StivOutput:
    """Result of a call, for B = prompts * videos per prompt.

    ``frames`` uint8 [B, F, H, W, 3], or lists of PIL images, or ``None`` for latents only; ``latents`` fp32
    [B, T, C, h, w]; ``seeds`` reproduce each sample alone. ``timings`` in seconds: ``load`` (graphs and buffers, only
    for a size that is new), ``text``, ``encode``, ``denoise`` and ``decode``; ``total`` is all of them and the rest,
    ``graphs`` the part of it that was spent inside graphs.
    """

    frames: "np.ndarray | list[list[Image]] | None"
    latents: np.ndarray
    seeds: list[int]
    timings: dict[str, float]


class StepValues(Mapping[str, Any]):
    """What a step callback may look at: ``latents`` (fp32 [B, T, C, h, w], copied only when asked) and ``total``."""

    def __init__(self, record: StepRecord, total: int) -> None:
        self._values = {"latents": record.read_latents, "total": lambda: total}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


StepCallback = Callable[["StivPipeline", int, float, Mapping[str, Any]], object]
"""Called after each step with the pipeline, the step (counting on over batches), the time reached, and
:class:`StepValues`. It stops the generation by raising, for instance :class:`Cancelled`."""


class _RequestState:
    """Denoiser, sampler and decoder of one request size: every buffer and binding a generation needs."""

    def __init__(
        self, backend: Backend, bundle: Bundle, dims: dict[str, int], plan: TilePlan, clock: GraphClock, debug: bool
    ) -> None:
        self.denoiser = Denoiser(backend, bundle.manifest, dims, hook=clock)
        self.sampler = Sampler(self.denoiser, debug=debug)
        spec = self.denoiser.specs["decoder"]
        self.latent_shape = spec.inputs[0].sized(dims)
        self.video_shape = spec.outputs[0].sized(dims)
        self.decode = TiledGraph(backend, spec, _binder(backend, "decoder", clock), bundle.manifest.model, plan)


def _binder(backend: Backend, graph: str, clock: GraphClock) -> Bind:
    """Binds ``graph`` to buffers, timed."""
    return lambda inputs, outputs: clock(graph, backend.bind(graph, inputs, outputs))


class StivPipeline:
    """Generates videos from a bundle. One call at a time; close it, or use it with ``with``, to free the device.

    ``profile`` waits for the device after every graph, so that ``timings["graphs"]`` is right on a GPU too; ``debug``
    names the first step whose latents are not finite. Both cost time.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, profile: bool = False, debug: bool = False) -> None:
        self.bundle = bundle
        self.backend = backend
        self._debug = debug
        self._specs = graph_specs(bundle.manifest.model, bundle.manifest.precision)
        self._tokenizer = PromptTokenizer(bundle)
        self._clock = GraphClock(backend.synchronize if profile else None)
        self._states: OrderedDict[tuple[tuple[int, ...], TilePlan], _RequestState] = OrderedDict()

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str | None = None,
        threads: int | None = None,
        *,
        profile: bool = False,
        debug: bool = False,
    ) -> Self:
        """Open the bundle in the folder ``path`` on ``backend`` (by default the best that works here).

        ``threads`` limits the CPU threads. Raises :class:`BundleError`, :class:`BackendError` or :class:`EngineError`.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(backend, bundle, threads), profile=profile, debug=debug)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        image: ImageLike | Mapping[int, ImageLike] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        guidance_mode: str | None = None,
        guidance_renorm: bool | None = None,
        solver: str | None = None,
        time_shift: float | None = None,
        seed: int | None = None,
        generator: np.random.Generator | None = None,
        num_videos_per_prompt: int = 1,
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        output_type: OutputType = "np",
        resize: bool = False,
        decode_tile: int | None = None,
    ) -> StivOutput:
        """Generate videos. Whatever is ``None`` has the default that the checkpoint recommends.

        ``image`` is the first frame, or images by frame number (-1 is the last frame), the same for all prompts; they
        must have the video's size unless ``resize``. Sample i draws its noise from ``seed + i``. ``guidance_mode`` is
        none, jit or sit (``image_guidance_scale`` is for sit), ``solver`` euler or heun. Large frames go through the
        VAE in tiles of ``decode_tile`` pixels (0 for the whole video at once), see :mod:`runtime.tiling`.

        Raises :class:`RequestError` before anything is computed if the request is not possible, :class:`Cancelled`
        between two steps once ``cancel`` is set, :class:`StivError` if the result is not finite.
        """
        if output_type not in OUTPUT_TYPES:
            raise RequestError(f"unknown output_type {output_type!r}; there are: {', '.join(OUTPUT_TYPES)}")
        defaults = self.bundle.manifest.sampling
        size = video_size(defaults, num_frames, height, width)
        settings = sampling_settings(
            defaults,
            steps=num_inference_steps,
            guidance_scale=guidance_scale,
            image_scale=image_guidance_scale,
            guidance_mode=guidance_mode,
            renorm=guidance_renorm,
            solver=solver,
            time_shift=time_shift,
        )
        samples = make_samples(prompt, negative_prompt, num_videos_per_prompt, seed, generator)
        batches = in_batches(self.bundle, samples, size)
        images = given_images(image, size.frames, size.height, size.width, resize=resize)
        tile = None if decode_tile is None else whole_number("decode_tile", decode_tile)
        check_given_frames(images, self.bundle.manifest.model)
        check_tile(self.bundle.manifest.model, self._bucket(len(batches[0]), size), tile)
        request = GenerationRequest(batches=batches, size=size, images=images, settings=settings, decode_tile=tile)
        return self._generate(request, callback_on_step_end, cancel, output_type)

    def close(self) -> None:
        """Free buffers, sessions and engines."""
        self._states.clear()
        self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(
        self, request: GenerationRequest, callback: StepCallback | None, cancel: Event | None, output_type: OutputType
    ) -> StivOutput:
        start, graphs = time.perf_counter(), self._clock.total
        timings = dict.fromkeys(PHASES, 0.0)
        given = self._encode_images(request, timings)
        latents: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        for index, batch in enumerate(request.batches):
            observer = self._observer(callback, index, request)
            with self._timed(timings, "load"):
                state = self._state(len(batch), request)
            latents.append(self._denoise(state, batch, request, given, timings, observer, cancel))
            if output_type != "latent":
                frames.append(self._decode(state, latents[-1], timings))
        timings |= {"graphs": self._clock.total - graphs, "total": time.perf_counter() - start}
        return StivOutput(
            frames=_as_output(frames, output_type),
            latents=np.concatenate(latents),
            seeds=[sample.seed for batch in request.batches for sample in batch],
            timings=timings,
        )

    @contextmanager
    def _timed(self, timings: dict[str, float], phase: str) -> Iterator[None]:
        """Add the time until the device is done to ``timings[phase]``."""
        start = time.perf_counter()
        yield
        self.backend.synchronize()
        timings[phase] += time.perf_counter() - start

    def _dims(self, batch: int, branches: int, size: VideoSize, frames: int) -> dict[str, int]:
        model = self.bundle.manifest.model
        return dimensions(
            model,
            batch=batch,
            branches=branches,
            video_frames=frames,
            height=size.height,
            width=size.width,
            text_tokens=model.max_text_tokens,
        )

    def _state(self, batch: int, request: GenerationRequest) -> _RequestState:
        """The state for this size, kept from an earlier call or made now."""
        branches = len(BRANCHES[request.settings.guidance_mode])
        dims = self._dims(batch, branches, request.size, request.size.frames)
        plan = self._plan(dims, self._bucket(batch, request.size), request)
        key = (tuple(dims.values()), plan)
        if key not in self._states:
            while len(self._states) >= KEPT_STATES:
                self._states.popitem(last=False)
            self._states[key] = _RequestState(self.backend, self.bundle, dims, plan, self._clock, self._debug)
        self._states.move_to_end(key)
        return self._states[key]

    def _encode_images(self, request: GenerationRequest, timings: dict[str, float]) -> dict[int, np.ndarray]:
        """Clean latents [C, h, w] of the given images by latent frame."""
        if not request.images:
            return {}
        with self._timed(timings, "encode"):
            groups, clip = clip_from_images(request.images, self.bundle.manifest.model)
            latents = self._run_image_encoder(clip, request)
        return dict(zip(groups, latents, strict=False))  # what follows the groups encodes padding

    def _run_image_encoder(self, clip: np.ndarray, request: GenerationRequest) -> np.ndarray:
        """Latents [T, C, h, w] of ``clip``, repeated to the smallest batch and number of frames of the bucket."""
        bucket = self._bucket(len(request.batches[0]), request.size)
        clip = np.concatenate([clip, np.repeat(clip[-1:], max(0, bucket.frames.min - len(clip)), axis=0)])
        dims = self._dims(bucket.batch.min, 1, request.size, len(clip))
        spec, bind = self._specs["image_encoder"], _binder(self.backend, "image_encoder", self._clock)
        plan = self._plan(dims, bucket, request)
        encode = TiledGraph(self.backend, spec, bind, self.bundle.manifest.model, plan)
        latents = np.empty(spec.outputs[0].sized(dims), dtype=np.float32)
        for rows, frames, part in encode(np.broadcast_to(clip, (bucket.batch.min, *clip.shape))):
            latents[rows, frames] = part
        return latents[0]

    def _bucket(self, batch: int, size: VideoSize) -> Bucket:
        return self.bundle.bucket_for(batch, size.frames, size.height, size.width)

    def _plan(self, dims: dict[str, int], bucket: Bucket, request: GenerationRequest) -> TilePlan:
        return plan_tiles(self.bundle.manifest.model, bucket, dims, request.decode_tile)

    def _denoise(
        self,
        state: _RequestState,
        batch: Sequence[Sample],
        request: GenerationRequest,
        given: Mapping[int, np.ndarray],
        timings: dict[str, float],
        observer: Observer | None,
        cancel: Event | None,
    ) -> np.ndarray:
        """Latents [B, T, C, h, w] of one batch."""
        with self._timed(timings, "text"):
            self._set_conditions(state.denoiser, batch, request)
        with self._timed(timings, "denoise"):
            shape = state.latent_shape[1:]
            noise = draw_noise([sample.seed for sample in batch], shape)
            mask = frame_mask(len(batch), shape[0], given)
            clean = scatter_frames(given, len(batch), shape)
            return state.sampler.run(noise, clean, mask, request.settings, observer, cancel)

    def _set_conditions(self, denoiser: Denoiser, batch: Sequence[Sample], request: GenerationRequest) -> None:
        """Text of all branches, those without text getting the negative prompts, and micro-conditions."""
        texts = [
            sample.prompt if branch.text else sample.negative
            for branch in BRANCHES[request.settings.guidance_mode]
            for sample in batch
        ]
        denoiser.set_text(*self._tokenizer(texts))
        denoiser.set_micro(micro_conditions(len(texts), request.size.height, request.size.width, request.size.frames))

    def _decode(self, state: _RequestState, latents: np.ndarray, timings: dict[str, float]) -> np.ndarray:
        """Frames uint8 [B, F, H, W, 3] of ``latents``."""
        with self._timed(timings, "decode"):
            batch, count, _, height, width = state.video_shape
            frames = np.empty((batch, count, height, width, 3), dtype=np.uint8)
            for rows, columns, video in state.decode(latents):
                frames[rows, columns] = frames_from_video(video)
            return frames

    def _observer(self, callback: StepCallback | None, index: int, request: GenerationRequest) -> Observer | None:
        """``callback`` as the observer of batch ``index``."""
        if callback is None:
            return None
        steps = request.settings.steps
        total = steps * len(request.batches)

        def observe(record: StepRecord) -> None:
            callback(self, index * steps + record.step, record.time, StepValues(record, total))

        return observe


def _as_output(frames: Sequence[np.ndarray], output_type: OutputType) -> "np.ndarray | list[list[Image]] | None":
    if output_type == "latent":
        return None
    if output_type == "np":
        return np.concatenate(frames)
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video] for batch in frames for video in batch]
