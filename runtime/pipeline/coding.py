"""The VAE of a pipeline: given pictures to latents, latents to frames."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.backends.pieces import Bind
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import FRAMES, dimensions
from stiv_deploy.runtime.bundle.manifest import Bucket
from stiv_deploy.runtime.pipeline.images import clip_from_images, frames_from_video
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, Given, VideoSize
from stiv_deploy.runtime.pipeline.recent import Recent
from stiv_deploy.runtime.pipeline.tiling import Begin, TiledGraph, TilePlan, plan_tiles
from stiv_deploy.runtime.sampling.hooks import GraphClock
from stiv_deploy.runtime.sampling.parallel.team import Team

KEPT_DECODERS = 2
"""Sizes whose decoder is kept; two serve a plan whose last batch is smaller than the others."""
Clean = dict[int, np.ndarray]
"""Given latents fp32 [C, h, w] by latent frame."""


class Coder:
    """Encodes and decodes with ``backend``, in tiles where a plan's frames are large; decoders are kept.

    The other devices of a ``team`` decode their share of the frames, or tiles.
    """

    def __init__(self, backend: Backend, bundle: Bundle, clock: GraphClock, team: Team | None = None) -> None:
        self._backend = backend
        self._team = team
        self._bundle = bundle
        self._clock = clock
        self._model = bundle.manifest.model
        self._specs = bundle.manifest.specs
        self._decoders: Recent[TiledGraph] = Recent(KEPT_DECODERS)

    def free(self) -> None:
        """Free all buffers."""
        self._decoders.clear()

    def clean_latents(self, plan: GenerationPlan) -> dict[Given, Clean]:
        """The given latents of everything that the videos of ``plan`` are given, each encoded once."""
        found = {video.given: dict(video.given.latents) for video in plan.videos}
        encoders: Recent[TiledGraph] = Recent(1)
        for given in sorted(filter(lambda each: each.images, found), key=lambda each: len(each.images)):
            found[given] = self._encode(given, plan, encoders)
        return found

    def _encode(self, given: Given, plan: GenerationPlan, encoders: Recent[TiledGraph]) -> Clean:
        """Latents of ``given.images``, encoded at the smallest batch and number of frames of the bucket."""
        bucket = self._bucket(len(plan.batches[0]), plan.size)
        groups, clip = clip_from_images(given.images, self._model)
        clip = np.concatenate([clip, np.repeat(clip[-1:], max(0, bucket.frames.min - len(clip)), axis=0)])
        dims = self._dims(bucket.batch.min, plan.size, len(clip))
        tiles = plan_tiles(self._model, bucket, dims, plan.decode_tile)
        encode = encoders.get(tiles, lambda: self._graph("image_encoder", tiles))
        latents = np.empty(self._specs["image_encoder"].outputs[0].sized(dims), dtype=np.float32)
        for rows, frames, part in encode(np.broadcast_to(clip, (bucket.batch.min, *clip.shape))):
            latents[rows, frames] = part
        return dict(zip(groups, latents[0], strict=False))  # what follows the groups encodes padding

    def decoder(self, plan: GenerationPlan, batch: int) -> Callable[[np.ndarray], np.ndarray]:
        """From latents fp32 [batch, T, C, h, w] of ``plan`` to frames uint8 [batch, F, H, W, 3]; kept, or made now."""
        parts = self.parts(plan, batch)

        def decode(latents: np.ndarray) -> np.ndarray:
            *_, frames = parts(latents)
            return frames

        return decode

    def parts(self, plan: GenerationPlan, batch: int) -> Callable[[np.ndarray], Iterator[np.ndarray]]:
        """As :meth:`decoder`, one piece of work at a time: yields the same frames again and again, at last all made."""
        size = plan.size
        dims = self._dims(batch, size, size.frames)
        devices = 1 if self._team is None else self._team.placement.size
        tiles = plan_tiles(self._model, self._bucket(batch, size), dims, plan.decode_tile, devices=devices)
        decode = self._decoders.get(tiles, lambda: self._decoder(tiles))
        return lambda latents: _frames(decode, latents, (batch, size.frames, size.height, size.width, 3))

    def _decoder(self, tiles: TilePlan) -> TiledGraph:
        """The decoder, on all devices that there are."""
        after = self._after(tiles)
        names = ["decoder"] if after is None else ["decoder", after]
        others = () if self._team is None else self._team.coders(names, tiles.piece(self._model))
        return self._graph("decoder", tiles, after, others)

    def _after(self, tiles: TilePlan) -> str | None:
        """The graph after the decoder: that of 8-bit frames, where the bundle has it and nothing is left to blend."""
        return FRAMES if FRAMES in self._bundle.manifest.graphs and not tiles.tiled else None

    def _graph(self, name: str, tiles: TilePlan, after: str | None = None, others: Sequence[Begin] = ()) -> TiledGraph:
        """The graph ``name``, and the one ``after`` it, bound to buffers."""
        following = None if after is None else (self._specs[after], self._bind(after))
        return TiledGraph(self._backend, self._specs[name], self._bind(name), self._model, tiles, following, others)

    def _bind(self, name: str) -> Bind:
        """What binds the graph ``name``, timed."""
        return lambda inputs, outputs: self._clock(name, self._backend.bind(name, inputs, outputs))

    def _bucket(self, batch: int, size: VideoSize) -> Bucket:
        return self._bundle.bucket_for(batch, size.frames, size.height, size.width)

    def _dims(self, batch: int, size: VideoSize, frames: int) -> dict[str, int]:
        return dimensions(
            self._model,
            batch=batch,
            model_batch=batch,
            video_frames=frames,
            height=size.height,
            width=size.width,
            text_tokens=self._model.max_text_tokens,
        )


def _frames(decode: TiledGraph, latents: np.ndarray, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    frames = np.empty(shape, dtype=np.uint8)
    for rows, columns, part in decode(latents):
        frames[rows, columns] = part if part.dtype == np.uint8 else frames_from_video(part)
        yield frames
