"""Videos longer than a clip: passes of chunks over timelines, latents all the way, resumable at any chunk.

A task plans a :class:`Chain`; :func:`run_chain` makes it. What is given to a clip is read from the timeline of the pass
before or from its own finished chunks, and stays bit-equal; nothing is decoded before the end.
"""

import json
import logging
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.chunks import Chunk
from stiv_deploy.runtime.pipeline.coding import Clean
from stiv_deploy.runtime.pipeline.limits import SEED_LIMIT
from stiv_deploy.runtime.pipeline.media import write_windows
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.seams import Seam, measured
from stiv_deploy.runtime.pipeline.timeline import Piece, Timeline, locked, open_folder
from stiv_deploy.runtime.pipeline.tokenization import lost_line
from stiv_deploy.runtime.pipeline.visible import upscale_for
from stiv_deploy.runtime.progress import Progress, unheard

log = logging.getLogger(__name__)


class Maker(ABC):
    """What a chain asks of a pipeline. ``bundle`` and ``backend`` are those that it runs."""

    bundle: Bundle
    backend: Backend

    @abstractmethod
    def plan(self, requests: GenerationRequest | Sequence[GenerationRequest]) -> GenerationPlan:
        """The plan of one request, or of several of one size."""

    @abstractmethod
    def lost(self, plan: GenerationPlan) -> dict[str, str]:
        """What the model will not hear of the prompts of ``plan``, by prompt."""

    @abstractmethod
    def sample(self, plan: GenerationPlan, progress: Progress = unheard, cancel: Event | None = None) -> np.ndarray:
        """Latents fp32 [B, T, C, h, w] of the videos of ``plan``, without a warning; ``progress`` hears of steps."""

    @abstractmethod
    def encode(self, plan: GenerationPlan) -> list[Clean]:
        """Latents fp32 [C, h, w] by latent frame of what each video of ``plan`` is given."""

    @abstractmethod
    def decode(self, plan: GenerationPlan, latents: np.ndarray) -> np.ndarray:
        """Frames uint8 [B, F, H, W, 3] of ``latents`` fp32 [B, T, C, h, w], of the size of the videos of ``plan``."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Chunks over one timeline, sampled at ``stride``.

    Position p of the timeline before is position p * ``spacing`` of this one.
    """

    name: str
    chunks: tuple[Chunk, ...]
    stride: int
    spacing: int = 1


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A long video to make, of ``frames`` frames: ``template`` is the request of its clips, every default filled in.

    The first pass goes on from ``known`` latent frames, the source's, and every later one from the one before it.
    ``task`` names what it is for people, ``source`` what it was made from, if anything.
    """

    task: str
    template: GenerationRequest
    passes: tuple[Pass, ...]
    known: int
    frames: int
    fps: float
    bundle: str
    source: str | None = None

    @property
    def chunks(self) -> int:
        """Number of clips to make."""
        return sum(len(each.chunks) for each in self.passes)

    def to_json(self) -> dict[str, Any]:
        """All that its latents follow from, but for the backend."""
        passes = [
            {"name": each.name, "chunks": len(each.chunks), "stride": each.stride, "spacing": each.spacing}
            | {"clips": sorted({chunk.frames for chunk in each.chunks})}
            for each in self.passes
        ]
        return {
            "bundle": self.bundle,
            "task": self.task,
            "frames": self.frames,
            "fps": self.fps,
            "source": self.source,
            "passes": passes,
            "template": self.template.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class ChainOutput:
    """A long video: ``timeline`` holds its latents, by frame, on disk.

    ``seams`` measure where chunks meet, ``warnings`` say what of it the model was not trained for, ``lost`` what it did
    not hear of the prompts. ``made`` of its ``chain.chunks`` chunks are new, the others were there from an earlier run.
    Frames are decoded when they are asked for, while the pipeline is open.
    """

    chain: Chain
    timeline: Timeline
    seams: list[Seam]
    made: int
    warnings: tuple[str, ...] = ()
    lost: Mapping[str, str] = field(default_factory=dict)
    maker: Maker
    keeper: Any = None
    """What removes the chunks with it, if they lie in a folder that nobody asked for."""

    @cached_property
    def latents(self) -> np.ndarray:
        """Latents fp32 [T, C, h, w] of all of it."""
        return self.timeline.window(range(len(self.timeline)))

    def frames(self) -> Iterator[np.ndarray]:
        """All frames uint8 [F, H, W, 3], as many at a time as a clip has."""
        plan = self.maker.plan(self.chain.template)
        clip = plan.size.frames
        for latents in self.timeline.windows(clip):
            padded = np.concatenate([latents, np.repeat(latents[-1:], clip - len(latents), axis=0)])
            yield self.maker.decode(plan, padded[None])[0, : len(latents)]

    def write(self, path: str | Path, upscale: int | None = None) -> Path:
        """Write the video, with how it was made, to ``path``, frame by frame where the format lets it.

        Formats and ``upscale`` are those of :meth:`~stiv_deploy.runtime.pipeline.output.StivOutput.write`. Raises
        :class:`~stiv_deploy.runtime.errors.OutputError`.
        """
        record = self.to_json()
        comment = json.dumps(record | {"seams": len(self.seams)}, separators=(",", ":"))
        factor = upscale_for(path, self.chain.template.height or 1, self.chain.template.width or 1, upscale)
        return write_windows(path, self.frames(), self.fps, factor, comment)

    @property
    def fps(self) -> float:
        """Frames per second of what is written: as asked for, or as the bundle recommends."""
        return self.chain.fps

    def to_json(self) -> dict[str, Any]:
        """How it was made, and its seams."""
        values = {"backend": self.maker.backend.name} | self.chain.to_json()
        values |= {"seams": [each._asdict() for each in self.seams]}
        values |= {"warnings": list(self.warnings)} if self.warnings else {}
        return values | ({"lost": dict(self.lost)} if self.lost else {})


def check_frame_by_frame(bundle: Bundle, task: str) -> None:
    """:class:`RequestError` for a VAE that codes several frames as one: chunks could not be joined in latents."""
    model = bundle.manifest.model
    if not model.temporal:
        raise RequestError(f"{task} makes video, and this bundle is of an image model")
    if model.temporal_factor > 1 or model.causal_vae:
        raise RequestError(
            f"{task} joins clips in latents, which wants a VAE that codes every frame alone; this bundle's codes "
            f"{model.temporal_factor} frames as one"
        )


def run_chain(
    maker: Maker,
    chain: Chain,
    source: Iterable[np.ndarray] = (),
    *,
    folder: Path | None = None,
    progress: Progress = unheard,
    cancel: Event | None = None,
) -> ChainOutput:
    """Make ``chain`` from ``source``: its first ``known`` frames, as many at a time as a clip has.

    They are uint8 [N, H, W, 3], which is encoded, or latents fp32 [N, C, h, w]. Finished chunks lie in ``folder``,
    where a run that was killed goes on; without one they vanish with the result. ``progress`` hears of sampling steps.
    Raises :class:`~stiv_deploy.runtime.errors.Cancelled` between two steps once ``cancel`` is set, and what the
    pipeline's run does.
    """
    warnings, lost = _remarks(maker, chain)
    keeper = tempfile.TemporaryDirectory(prefix="stiv-") if folder is None else None
    place = Path(keeper.name) if keeper else Path(folder or "")
    work = _Work(maker, chain, place, progress, cancel)
    with locked(place):
        timeline = work.begun(source)
        for one in chain.passes:
            timeline = work.made(one, timeline)
    return ChainOutput(
        chain=chain,
        timeline=timeline,
        seams=measured(timeline),
        made=work.count,
        warnings=warnings,
        lost=lost,
        maker=maker,
        keeper=keeper,
    )


def _remarks(maker: Maker, chain: Chain) -> tuple[tuple[str, ...], dict[str, str]]:
    """One warning for each thing that is new to the model in any pass; what of the prompts is lost."""
    lines: dict[str, None] = {}
    plan = maker.plan(chain.template)
    size = plan.size
    model = maker.bundle.manifest.model
    blank = np.zeros((model.latent_channels, size.height // model.spatial_factor, size.width // model.spatial_factor))
    for one in chain.passes:
        for chunk in {(chunk.frames, chunk.given): chunk for chunk in one.chunks}.values():
            given = dict.fromkeys(chunk.given, blank.astype(np.float32))
            plan = maker.plan(chunk_request(chain, one, chunk, 0, given))
            lines |= dict.fromkeys(plan.videos[0].warnings)
    lost = maker.lost(plan)
    for line in (*([lost_line(lost)] if lost else []), *lines):
        log.warning(line)
    return tuple(lines), lost


def chunk_request(
    chain: Chain, one: Pass, chunk: Chunk, number: int, given: Mapping[int, np.ndarray]
) -> GenerationRequest:
    """The request of chunk ``number`` of the whole chain, which is given the latents ``given``, by its own frames.

    Only a chunk that is given nothing keeps the template's pictures.
    """
    seed = ((chain.template.seed or 0) + number) % SEED_LIMIT
    own = {"num_frames": chunk.frames, "stride": one.stride, "seed": seed, "latents": dict(given)}
    return chain.template.changed(**own | ({"frames": {}} if given else {}))


class _Work:
    """What is done in ``folder``; ``count`` chunks were made, of all that were looked at."""

    def __init__(self, maker: Maker, chain: Chain, folder: Path, progress: Progress, cancel: Event | None) -> None:
        self.maker, self.chain, self.folder = maker, chain, folder
        self._progress, self._cancel = progress, cancel
        self.count, self._number = 0, 0
        self._new = not folder.exists()

    def begun(self, source: Iterable[np.ndarray]) -> Timeline:
        """The folder opened, with the timeline of ``source`` in it; a new folder goes if ``source`` cannot be read."""
        open_folder(self.folder, self.chain.to_json())
        try:
            return self._taken(source)
        except BaseException:
            if self._new:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _taken(self, source: Iterable[np.ndarray]) -> Timeline:
        """The timeline of ``source``; windows that are there already are not encoded again."""
        clip = self.chain.template.num_frames or 1
        starts = range(0, self.chain.known, clip)
        pieces = [
            Piece(f"source-{number:05d}.npy", tuple(range(start, min(start + clip, self.chain.known))))
            for number, start in enumerate(starts)
        ]
        timeline = Timeline(self.folder, pieces)
        for piece, window in zip(pieces, source, strict=False):
            if not timeline.has(piece):
                timeline.keep(piece, window if window.dtype == np.float32 else self._encoded(window))
        return timeline

    def _encoded(self, frames: np.ndarray) -> np.ndarray:
        plan = self.maker.plan(self.chain.template.changed(frames=dict(enumerate(frames))))
        (clean,) = self.maker.encode(plan)
        return np.stack([clean[frame] for frame in sorted(clean)])

    def made(self, one: Pass, before: Timeline) -> Timeline:
        """The timeline of a pass, its chunks made, or found."""
        pieces = [
            Piece(f"{one.name}-{number:05d}.npy", tuple(chunk.start + place for place in chunk.kept))
            for number, chunk in enumerate(one.chunks)
        ]
        timeline = Timeline(self.folder, pieces, before, {at * one.spacing: at for at in range(len(before))})
        for piece, chunk in zip(pieces, one.chunks, strict=True):
            if not timeline.has(piece):
                timeline.keep(piece, self._sampled(one, chunk, timeline)[list(chunk.kept)])
                self.count += 1
            self._number += 1
        return timeline

    def _sampled(self, one: Pass, chunk: Chunk, timeline: Timeline) -> np.ndarray:
        given = {place: timeline.read(chunk.start + place) for place in chunk.given}
        plan = self.maker.plan(chunk_request(self.chain, one, chunk, self._number, given))
        what = f"{one.name}, clip {self._number + 1} of {self.chain.chunks}"

        def heard(_what: str, done: int, steps: int) -> None:
            self._progress(what, self._number * steps + done, self.chain.chunks * steps)

        return self.maker.sample(plan, heard, self._cancel)[0]
