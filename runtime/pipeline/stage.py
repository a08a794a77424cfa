"""The stage of ``stiv generate``: a bundle opened, clips made and written."""

from dataclasses import dataclass
from pathlib import Path

from stiv_deploy.runtime.pipeline.grid import grid_sides, grid_upscale
from stiv_deploy.runtime.pipeline.limits import check_memory
from stiv_deploy.runtime.pipeline.media import check_output, check_sides
from stiv_deploy.runtime.pipeline.output import StivOutput, one_rate
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.plan import GenerationPlan
from stiv_deploy.runtime.pipeline.records import report_text
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.visible import upscale_for
from stiv_deploy.runtime.progress import Progress, unheard


@dataclass(frozen=True, kw_only=True)
class ClipsRequest:
    """Clips of ``requests`` by the bundle in the folder ``bundle``, to be written to ``out``.

    ``upscale`` None enlarges small clips so that they can be seen
    (:func:`~stiv_deploy.runtime.pipeline.visible.upscale_for`), 1 none. In a ``grid`` all are in one file.
    ``backend`` None is the best that works here, ``device`` the index of a GPU, ``threads`` None all cores. Several
    ``devices`` make a clip together, as ``parallel`` says, in ``processes`` of their own or in threads. ``loras`` are
    merged into the weights at load, each a file with its scale as ``FILE[:SCALE]``.
    """

    bundle: Path
    requests: tuple[GenerationRequest, ...]
    out: Path
    upscale: int | None = None
    grid: bool = False
    backend: str | None = None
    device: int = 0
    threads: int | None = None
    devices: tuple[str, ...] = ()
    parallel: str | None = None
    processes: bool = False
    nccl: bool = False
    loras: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of clips."""
        return sum(request.count for request in self.requests)

    @property
    def files(self) -> int:
        """Number of files that they are written to."""
        return 1 if self.grid else self.count


@dataclass(frozen=True, kw_only=True)
class ClipsReport:
    """What was written where (each clip's file; in a grid the same for all), and how it was made."""

    written: tuple[Path, ...]
    output: StivOutput

    def to_json(self) -> str:
        """Files with their requests, and timings; ``stiv generate --request`` reads it."""
        return report_text(self.written, self.output.records, self.output.timings)


def make_clips(request: ClipsRequest, progress: Progress = unheard) -> ClipsReport:
    """Generate and write clips; ``progress`` hears that the bundle is loaded, and of sampling steps.

    Raises what :meth:`StivPipeline.from_bundle`, its plan and its run do, and
    :class:`~stiv_deploy.runtime.errors.OutputError`, before anything is computed where possible.
    """
    check_output(request.out, request.files)
    progress("loading", 0, 1)
    with StivPipeline.from_bundle(
        request.bundle,
        backend=request.backend,
        threads=request.threads,
        device=request.device,
        devices=request.devices,
        parallel=request.parallel,
        processes=request.processes,
        nccl=request.nccl,
        loras=request.loras,
    ) as pipe:
        plan = pipe.plan(list(request.requests))
        _check_written(request, plan)
        output = pipe.run(plan, lambda _pipe, step, _time, values: progress("", step + 1, values["total"]))
    files = output.write(request.out, request.upscale, grid=request.grid)
    return ClipsReport(written=tuple(files * (request.count // len(files))), output=output)


def _check_written(request: ClipsRequest, plan: GenerationPlan) -> None:
    """Raise if what ``request`` writes of the clips of ``plan`` is more than its format or this machine takes."""
    size, height, width = plan.size, plan.size.height, plan.size.width
    if request.grid:
        one_rate([video.request for video in plan.videos])
        factor = grid_upscale(request.count, height, width, request.upscale)
        height, width = grid_sides(request.count, height * factor, width * factor)
    else:
        factor = upscale_for(request.out, height, width, request.upscale)
        height, width = height * factor, width * factor
    check_sides(request.out, height, width)
    enlarged = 3 * size.frames * height * width
    check_memory(f"{size}, enlarged {factor} times,", enlarged, "give a smaller --upscale")
