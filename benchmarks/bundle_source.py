"""Clips from the torch-free runtime on a bundle; the same prompts and seeds give the reference's clips."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from clip_source import Given, Settings, Video, digest

from stiv_deploy.runtime.pipeline.pipeline import StivPipeline


def as_video(frames: np.ndarray) -> Video:
    """Video fp32 [B, F, 3, H, W] in [-1, 1] of uint8 frames [B, F, H, W, 3]."""
    return np.moveaxis(frames.astype(np.float32) / 127.5 - 1, -1, 2)


def as_image(picture: Video) -> np.ndarray:
    """Image uint8 [H, W, 3] of a picture fp32 [3, H, W] in [-1, 1]."""
    return np.moveaxis(((picture + 1) * 127.5).round().astype(np.uint8), 0, -1)


class BundleSource:
    """:class:`clip_source.Source` over :class:`StivPipeline`."""

    def __init__(self, path: Path, backend: str, threads: int) -> None:
        self.path, self.pipeline = path, StivPipeline.from_bundle(path, backend, threads)
        sampling = self.pipeline.bundle.manifest.sampling
        self.frames, self.side, self.stride = sampling.frames, sampling.height, sampling.stride

    def describe(self) -> dict[str, str]:
        """Runtime, backend and bundle."""
        manifest = self.pipeline.bundle.manifest
        return {
            "sampler": f"stiv_deploy.runtime ({self.pipeline.backend.name})",
            "bundle": str(self.path),
            "precision": str(manifest.precision),
            "manifest_sha256": digest(self.path / "manifest.json"),
        }

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, given: Given | None) -> Video:
        """One call for a batch of text-to-video; one a clip for image-to-video, whose images differ."""

        def call(texts: Sequence[str], seed: int, image: dict[int, np.ndarray] | None) -> Video:
            output = self.pipeline(
                list(texts),
                image=image,
                num_frames=settings.frames,
                stride=settings.stride,
                num_inference_steps=settings.steps,
                guidance_scale=settings.scale,
                image_guidance_scale=settings.image_scale,
                guidance_mode=settings.mode,
                guidance_renorm=settings.renorm,
                unseen=settings.unseen,
                time_shift=settings.time_shift,
                late_stretch=settings.late_stretch,
                solver=settings.solver,
                seed=seed,
            )
            return as_video(np.asarray(output.frames))

        if not given:
            return call(prompts, seeds[0], None)
        images = [{number: as_image(each[clip]) for number, each in given.items()} for clip in range(len(prompts))]
        parts = [call([text], seed, image) for text, seed, image in zip(prompts, seeds, images, strict=True)]
        return np.concatenate(parts)

    def reconstruct(self, video: Video) -> Video | None:
        """Not offered: the runtime decodes only what it generates."""
        return None
