"""Who makes the clips that are measured: a pipeline in this process, a sample at a time."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

from stiv_deploy.runtime.backends.onnxruntime import thread_count
from stiv_deploy.runtime.bundle.contract import dimensions, is_block
from stiv_deploy.runtime.command.bench.record import Sample, Stages, Work
from stiv_deploy.runtime.pipeline.pipeline import CPU, StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, PlannedVideo
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.timing import PHASES
from stiv_deploy.runtime.sampling.hooks import Mark, unmarked
from stiv_deploy.runtime.sampling.replay import REPLAY
from stiv_deploy.runtime.sampling.settings import SamplingSettings
from stiv_deploy.runtime.sampling.solvers import evaluations, row_evaluations

TEXTS = "texts"
"""The cache of prompts that were encoded."""
DENOISING = ("embed", "blocks", "head", "step", REPLAY)
"""Graphs of a step."""


class Maker(Protocol):
    """Makes samples."""

    def make(self, requests: Sequence[GenerationRequest]) -> Sample:
        """The time of the clips of ``requests``, from plan to files."""


class PipelineMaker:
    """Makes clips with a pipeline, and writes each to an mp4 file in a folder of its own.

    Without ``texts`` no prompt is kept from sample to sample. A sample is a range of ``mark``, and so is its writing.
    """

    def __init__(self, pipe: StivPipeline, *, texts: bool = False, mark: Mark = unmarked) -> None:
        self.pipe, self.mark = pipe, mark
        self._texts = texts
        self._folder = TemporaryDirectory(prefix="stiv-bench-")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def queues(self) -> bool:
        """Whether calls only queue work."""
        return self.pipe.backend.name != CPU

    @property
    def caches(self) -> tuple[str, ...]:
        """What it keeps."""
        return (TEXTS,) if self._texts else ()

    def make(self, requests: Sequence[GenerationRequest]) -> Sample:
        """As :class:`Maker` says."""
        if not self._texts:
            self.pipe.forget_texts()
        with self.mark("sample"):
            return self._made(requests)

    def _made(self, requests: Sequence[GenerationRequest]) -> Sample:
        before, bound = _counted(self.pipe), _bound(self.pipe)
        began, cpu = time.perf_counter(), time.process_time()
        output = self.pipe.run(self.pipe.plan(list(requests)))
        made = time.perf_counter()
        with self.mark("write"):
            output.write(Path(self._folder.name) / "clip.mp4", 1)
        ended, spent = time.perf_counter(), time.process_time() - cpu
        after = _counted(self.pipe)
        stages = {name: output.timings[name] for name in PHASES} | {"write": ended - made}
        stages["rest"] = max(0.0, ended - began - sum(stages.values()))
        return Sample(
            seconds=ended - began,
            stages=Stages(**stages),
            cpu_seconds=spent,
            graph_seconds={name: seconds - before[name][0] for name, (seconds, _) in after.items()},
            launches=sum(after[name][1] - before[name][1] for name in DENOISING),
            bound=_bound(self.pipe) - bound,
        )


def _bound(pipe: StivPipeline) -> int:
    """How often graphs were bound, but for the encoder of pictures, whose buffers are not kept."""
    return sum(count for graph, count in pipe.clock.bound.items() if graph != "image_encoder")


def _counted(pipe: StivPipeline) -> Mapping[str, tuple[float, int]]:
    """Seconds and calls of each graph so far, blocks as one."""
    found: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for graph, seconds in pipe.clock.seconds.items():
        name = "blocks" if is_block(graph) else graph
        found[name] = (found[name][0] + seconds, found[name][1] + pipe.clock.calls[graph])
    return found


def work_of(plan: GenerationPlan) -> Work:
    """What a sample of ``plan``, whose clips are alike, makes."""
    video, size = plan.videos[0], plan.size
    settings = video.settings
    scales = [f"{settings.guidance_scale:g}"]
    scales += [f"image {settings.image_scale:g}"] if settings.guidance_mode == "sit" else []
    scales += ["renormalized"] if settings.renormalizes else []
    scales += [f"from {settings.guidance_from:g} until {settings.guidance_until:g}"] if _partial(settings) else []
    return Work(
        batch=len(plan.videos),
        frames=size.frames,
        height=size.height,
        width=size.width,
        steps=settings.steps,
        evaluations=len(evaluations(settings)),
        solver=settings.solver,
        guidance=_guidance(video, scales),
        rows=len(plan.videos) * len(settings.rows()),
        row_evaluations=len(plan.videos) * row_evaluations(settings),
        given=len(video.given.images) + len(video.given.latents),
        decode_tile=plan.decode_tile,
    )


def _guidance(video: PlannedVideo, scales: Sequence[str]) -> str:
    """Mode and ``scales``; ``distilled`` where it is in the model."""
    mode, asked = video.settings.guidance_mode, video.request.guidance_mode
    if mode == "none":
        return f"distilled {scales[0]}" if asked != mode else "none"
    return " ".join([mode, *scales])


def _partial(settings: SamplingSettings) -> bool:
    """Whether guidance begins late or ends early."""
    return (settings.guidance_from, settings.guidance_until) != (0.0, 1.0)


def dims_of(pipe: StivPipeline, work: Work) -> dict[str, float]:
    """Values of all symbols of a sample of ``work``, and the mean rows of its evaluations."""
    model = pipe.bundle.manifest.model
    dims = dimensions(
        model,
        batch=work.batch,
        model_batch=work.rows,
        video_frames=work.frames,
        height=work.height,
        width=work.width,
        text_tokens=model.max_text_tokens,
    )
    return dims | {"model_batch": work.row_evaluations / work.evaluations}


def threads_of(asked: int | None) -> int:
    """CPU threads of a session."""
    import os

    return thread_count(asked) or os.cpu_count() or 1
