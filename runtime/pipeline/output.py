"""What a generation gives: videos, and how each was made."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from stiv_deploy.runtime.errors import OutputError, RequestError, briefly
from stiv_deploy.runtime.pipeline.grid import grid as grid_of
from stiv_deploy.runtime.pipeline.grid import grid_upscale
from stiv_deploy.runtime.pipeline.media import check_output, write_video
from stiv_deploy.runtime.pipeline.records import GenerationRecord, embedded_together
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.visible import upscale_for

if TYPE_CHECKING:
    from PIL.Image import Image

OUTPUT_TYPES = ("np", "pil", "pt", "latent")
OutputType = Literal["np", "pil", "pt", "latent"]


@dataclass(frozen=True, kw_only=True)
class StivOutput:
    """Result of a run of B videos.

    ``frames`` uint8 [B, F, H, W, 3], or lists of PIL images, or a torch tensor fp32 [B, F, 3, H, W] from 0 to 1, or
    ``None`` for latents only; ``latents`` fp32 [B, T, C, h, w]. ``requests`` make the videos again on a bundle with the
    hash ``bundle`` and on ``backend``, bit by bit in one plan, but for the rounding of another batch one alone: seed
    and all defaults are filled in.

    ``timings`` in seconds: ``load`` (graphs and buffers, only for a size that is new), ``text``, ``encode``,
    ``denoise`` and ``decode``; ``total`` is all of them and the rest, ``graphs`` the part of it that was spent inside
    graphs, ``replays`` the part of that in CUDA graphs: 0 where there are none, or the backend refused to capture (then
    a warning has said why).

    ``lost`` says by prompt what the model did not hear of it: words that it does not know, tokens that were cut.
    ``warnings`` say of each video what the model was not trained for: its stride, size, frames, what it is given.
    """

    frames: "np.ndarray | list[list[Image]] | Any"
    latents: np.ndarray
    requests: list[GenerationRequest]
    bundle: str
    backend: str
    timings: dict[str, float]
    lost: dict[str, str] = field(default_factory=dict)
    warnings: list[tuple[str, ...]] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """Seed of each video."""
        return [request.seed or 0 for request in self.requests]

    @property
    def records(self) -> list[GenerationRecord]:
        """How each video was made, as it is written into its file."""
        warnings = self.warnings or [()] * len(self.requests)
        return [self._record(*each) for each in zip(self.requests, warnings, strict=True)]

    def _record(self, request: GenerationRequest, warnings: tuple[str, ...]) -> GenerationRecord:
        prompts = (request.prompt, request.negative_prompt)
        lost = {each: self.lost[each] for each in prompts if each in self.lost}
        return GenerationRecord(bundle=self.bundle, backend=self.backend, request=request, lost=lost, warnings=warnings)

    @property
    def fps(self) -> float:
        """Frames per second of the videos; :class:`OutputError` if they differ."""
        return one_rate(self.requests)

    def write(self, path: str | Path, upscale: int | None = None, *, grid: bool = False) -> list[Path]:
        """Write the videos, with their records, to ``path`` (several: ``name-0.mp4``, ...); returns where they are.

        Formats are those of :func:`~stiv_deploy.runtime.pipeline.media.write_video`, and so is ``upscale``, whose
        default makes small clips visible (:func:`~stiv_deploy.runtime.pipeline.visible.upscale_for`); 1 leaves them
        as they are. A ``grid`` has all videos side by side in one file. Raises :class:`OutputError`.
        """
        if grid:
            return [self._write_grid(Path(path), upscale)]
        targets = check_output(path, len(self.requests))
        for target, clip, record in zip(targets, self._arrays(), self.records, strict=True):
            _, height, width, _ = clip.shape
            factor = upscale_for(target, height, width, upscale)
            write_video(target, clip, record.request.fps or 0, factor, record.embedded())
        return targets

    def _write_grid(self, path: Path, upscale: int | None) -> Path:
        clips, records = self._arrays(), self.records
        _, height, width, _ = clips[0].shape
        factor = grid_upscale(len(clips), height, width, upscale)
        sheet = grid_of(clips, [record.request.prompt for record in records], factor)
        return write_video(path, sheet, self.fps, comment=embedded_together(records))

    def _arrays(self) -> Sequence[np.ndarray]:
        if self.frames is None:
            raise OutputError("there are only latents to write; generate with output_type 'np' or 'pil'")
        return [as_frames(clip) for clip in self.frames]


def one_rate(requests: Sequence[GenerationRequest]) -> float:
    """Frames per second of all ``requests``, whose defaults are filled in; :class:`OutputError` if they differ."""
    rates = list(dict.fromkeys(request.fps or 0.0 for request in requests))
    if len(rates) > 1:
        raise OutputError(f"the videos have different frame rates, {rates[0]:g} and {rates[1]:g}; give all the same")
    return rates[0]


def as_frames(clip: Any) -> np.ndarray:
    """A clip of any form that :class:`StivOutput` has as uint8 [F, H, W, 3].

    PIL images, arrays uint8 or of floats from 0 to 1 [F, H, W, 3], a tensor of such floats [F, 3, H, W].
    """
    if hasattr(clip, "permute"):
        clip = clip.detach().cpu().permute(0, 2, 3, 1).numpy()
    frames = np.stack([np.asarray(frame) for frame in clip])
    if np.issubdtype(frames.dtype, np.floating):
        return np.round(255 * frames.clip(0, 1)).astype(np.uint8)
    return frames


def export_to_video(video_frames: Any, output_video_path: str | Path, fps: float = 10) -> str:
    """Write one clip (see :func:`as_frames`) as diffusers' function of this name does; returns its path.

    Formats are those of :func:`~stiv_deploy.runtime.pipeline.media.write_video`. Raises :class:`OutputError`.
    """
    write_video(Path(output_video_path), as_frames(video_frames), fps)
    return str(output_video_path)


def check_output_type(output_type: str) -> None:
    """Raise :class:`RequestError` if there is no such ``output_type``, or it wants torch, which is not there."""
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"unknown output_type {briefly(output_type)}; there are: {', '.join(OUTPUT_TYPES)}")
    if output_type == "pt" and find_spec("torch") is None:
        raise RequestError("output_type 'pt' wants torch, which is not installed; take 'np', or install torch")


def as_output(frames: Sequence[np.ndarray], output_type: OutputType) -> "np.ndarray | list[list[Image]] | Any":
    """Batches of frames uint8 [B, F, H, W, 3] as ``output_type``, see :class:`StivOutput`."""
    if output_type == "latent":
        return None
    if output_type == "np":
        return np.concatenate(frames)
    if output_type == "pt":
        from_numpy = import_module("torch").from_numpy  # by name: the runtime asks for no torch
        return from_numpy(np.concatenate(frames).transpose(0, 1, 4, 2, 3).astype(np.float32) / 255)
    from PIL import Image

    return [[Image.fromarray(frame) for frame in video] for batch in frames for video in batch]
