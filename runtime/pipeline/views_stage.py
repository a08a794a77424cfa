"""The stage of ``stiv views``: a bundle opened, views of an object made and written."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stiv_deploy.runtime.pipeline.media import check_output
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.records import report_text
from stiv_deploy.runtime.pipeline.views import ViewsOutput
from stiv_deploy.runtime.progress import Progress, unheard


@dataclass(frozen=True, kw_only=True)
class ViewsRequest:
    """Views of the object in the picture ``image`` by the bundle in the folder ``bundle``, to be written to ``out``.

    ``azimuths`` are those that are shown, all by default; ``options`` are those of a call, and ``upscale``,
    ``backend``, ``device`` and ``threads`` as of :class:`~stiv_deploy.runtime.pipeline.stage.ClipsRequest`.
    """

    bundle: Path
    image: Path
    out: Path
    azimuths: Sequence[float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    upscale: int | None = None
    backend: str | None = None
    device: int = 0
    threads: int | None = None


@dataclass(frozen=True, kw_only=True)
class ViewsReport:
    """What was written where, and how it was made."""

    written: Path
    views: ViewsOutput

    def to_json(self) -> str:
        """The file, its cameras, its request and timings; ``stiv generate --request`` makes the whole clip of it."""
        output = self.views.output
        values = json.loads(report_text([self.written], output.records, output.timings))
        return json.dumps(values | {"cameras": [each._asdict() for each in self.views.cameras]}, indent=2)


def make_views(request: ViewsRequest, progress: Progress = unheard) -> ViewsReport:
    """Make and write views; ``progress`` hears that the bundle is loaded, and of sampling steps.

    Raises what :meth:`StivPipeline.views` does, and :class:`~stiv_deploy.runtime.errors.OutputError`, before anything
    is computed where possible.
    """
    check_output(request.out)
    progress("loading", 0, 1)
    with StivPipeline.from_bundle(
        request.bundle, backend=request.backend, threads=request.threads, device=request.device
    ) as pipe:
        views = pipe.views(
            request.image,
            azimuths=request.azimuths,
            callback_on_step_end=lambda _pipe, step, _time, values: progress("", step + 1, values["total"]),
            **request.options,
        )
    return ViewsReport(written=views.write(request.out, request.upscale), views=views)
