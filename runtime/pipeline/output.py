"""What a generation gives: videos, and how each was made."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from stiv_deploy.runtime.errors import OutputError, RequestError
from stiv_deploy.runtime.pipeline.media import check_output, write_video
from stiv_deploy.runtime.pipeline.records import GenerationRecord
from stiv_deploy.runtime.pipeline.request import GenerationRequest

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("np", "pil", "latent")
OutputType = Literal["np", "pil", "latent"]


@dataclass(frozen=True, kw_only=True)
class StivOutput:
    """Result of a run of B videos.

    ``frames`` uint8 [B, F, H, W, 3], or lists of PIL images, or ``None`` for latents only; ``latents`` fp32
    [B, T, C, h, w]. ``requests`` make the videos again on a bundle with the hash ``bundle`` and on ``backend``, bit by
    bit in one plan, but for the rounding of another batch one alone: seed and all defaults are filled in.

    ``timings`` in seconds: ``load`` (graphs and buffers, only for a size that is new), ``text``, ``encode``,
    ``denoise`` and ``decode``; ``total`` is all of them and the rest, ``graphs`` the part of it that was spent inside
    graphs, ``replays`` the part of that in CUDA graphs: 0 where there are none, or the backend refused to capture (then
    a warning has said why).
    """

    frames: "np.ndarray | list[list[Image]] | None"
    latents: np.ndarray
    requests: list[GenerationRequest]
    bundle: str
    backend: str
    timings: dict[str, float]

    @property
    def seeds(self) -> list[int]:
        """Seed of each video."""
        return [request.seed or 0 for request in self.requests]

    @property
    def records(self) -> list[GenerationRecord]:
        """How each video was made, as it is written into its file."""
        return [GenerationRecord(bundle=self.bundle, backend=self.backend, request=each) for each in self.requests]

    def write(self, path: str | Path, upscale: int = 1) -> list[Path]:
        """Write the videos, with their records, to ``path`` (several: ``name-0.mp4``, ...); returns where they are.

        Formats and ``upscale`` are those of :func:`~stiv_deploy.runtime.pipeline.media.write_video`. Raises
        :class:`OutputError`.
        """
        targets = check_output(path, len(self.requests))
        for target, clip, record in zip(targets, self._arrays(), self.records, strict=True):
            write_video(target, clip, record.request.fps or 0, upscale, record.embedded())
        return targets

    def _arrays(self) -> Sequence[np.ndarray]:
        if self.frames is None:
            raise OutputError("there are only latents to write; generate with output_type 'np' or 'pil'")
        return [np.stack([np.asarray(frame) for frame in clip]) for clip in self.frames]


def check_output_type(output_type: str) -> None:
    """Raise :class:`RequestError` if there is no such ``output_type``."""
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"unknown output_type {output_type!r}; there are: {', '.join(OUTPUT_TYPES)}")


def as_output(frames: Sequence[np.ndarray], output_type: OutputType) -> "np.ndarray | list[list[Image]] | None":
    """Batches of frames uint8 [B, F, H, W, 3] as ``output_type``: one array, lists of PIL images, or ``None``."""
    if output_type == "latent":
        return None
    if output_type == "np":
        return np.concatenate(frames)
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video] for batch in frames for video in batch]
