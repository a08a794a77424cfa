"""The stage of ``stiv generate``: a bundle opened, clips made and written."""

from dataclasses import dataclass
from pathlib import Path

from stiv_deploy.runtime.pipeline.limits import check_memory
from stiv_deploy.runtime.pipeline.media import check_output, check_sides
from stiv_deploy.runtime.pipeline.output import StivOutput
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.records import report_text
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.progress import Progress, unheard


@dataclass(frozen=True, kw_only=True)
class ClipsRequest:
    """Clips of ``requests`` by the bundle in the folder ``bundle``, to be written to ``out``, pixels enlarged.

    ``backend`` None is the best that works here, ``device`` the index of a GPU, ``threads`` None all cores.
    """

    bundle: Path
    requests: tuple[GenerationRequest, ...]
    out: Path
    upscale: int = 1
    backend: str | None = None
    device: int = 0
    threads: int | None = None

    @property
    def count(self) -> int:
        """Number of clips."""
        return sum(request.count for request in self.requests)


@dataclass(frozen=True, kw_only=True)
class ClipsReport:
    """What was written where, and how it was made."""

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
    check_output(request.out, request.count)
    progress("loading", 0, 1)
    with StivPipeline.from_bundle(
        request.bundle, backend=request.backend, threads=request.threads, device=request.device
    ) as pipe:
        plan = pipe.plan(list(request.requests))
        check_sides(request.out, plan.size.height * request.upscale, plan.size.width * request.upscale)
        enlarged = 3 * plan.size.frames * plan.size.height * plan.size.width * request.upscale**2
        check_memory(f"{plan.size}, enlarged {request.upscale} times,", enlarged, "give a smaller --upscale")
        output = pipe.run(plan, lambda _pipe, step, _time, values: progress("", step + 1, values["total"]))
    return ClipsReport(written=tuple(output.write(request.out, request.upscale)), output=output)
