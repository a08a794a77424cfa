"""The stage of ``stiv extend``, ``interpolate`` and ``long``: a bundle opened, a long video made and written."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stiv_deploy.runtime.files import check_folder
from stiv_deploy.runtime.pipeline.chained import Chain, ChainOutput
from stiv_deploy.runtime.pipeline.limits import check_memory
from stiv_deploy.runtime.pipeline.media import STREAMED, check_output, check_sides
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.visible import upscale_for
from stiv_deploy.runtime.progress import Progress, unheard

LongTask = Literal["extend", "interpolate", "long", "upsampled"]


@dataclass(frozen=True, kw_only=True)
class LongRequest:
    """A long video by the bundle in the folder ``bundle``, to be written to ``out``.

    ``arguments`` are those of the pipeline's method ``task``. Finished clips are kept in ``chunks``, by default beside
    ``out`` and until that is written. ``upscale``, ``backend``, ``device``, ``threads`` and ``loras`` are those of
    :class:`~stiv_deploy.runtime.pipeline.stage.ClipsRequest`.
    """

    bundle: Path
    task: LongTask
    arguments: Mapping[str, Any]
    out: Path
    chunks: Path | None = None
    upscale: int | None = None
    backend: str | None = None
    device: int = 0
    threads: int | None = None
    loras: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where finished clips are kept."""
        return self.chunks or self.out.with_name(f"{self.out.name}.chunks")


@dataclass(frozen=True, kw_only=True)
class LongReport:
    """What was written where, and how it was made."""

    written: Path
    output: ChainOutput = field(repr=False)

    def to_json(self) -> str:
        """The file, its chain, and every seam."""
        return json.dumps({"file": str(self.written)} | self.output.to_json(), indent=2)


def make_long(request: LongRequest, progress: Progress = unheard) -> LongReport:
    """Make and write a long video; ``progress`` hears that the bundle is loaded, and of sampling steps.

    Raises what :class:`~stiv_deploy.runtime.pipeline.long_videos.LongVideos` does, and
    :class:`~stiv_deploy.runtime.errors.OutputError`, before anything is computed where possible.
    """
    check_output(request.out)
    check_folder(request.folder, "choose another --chunks")
    progress("loading", 0, 1)
    with StivPipeline.from_bundle(
        request.bundle,
        backend=request.backend,
        threads=request.threads,
        device=request.device,
        loras=request.loras,
    ) as pipe:
        make = getattr(pipe, request.task)
        output = make(
            **request.arguments, folder=request.folder, progress=progress, planned=lambda chain: _check(request, chain)
        )
        output.write(request.out, request.upscale)
    if request.chunks is None:
        shutil.rmtree(request.folder, ignore_errors=True)
    return LongReport(written=request.out, output=output)


def _check(request: LongRequest, chain: Chain) -> None:
    """:class:`~stiv_deploy.runtime.errors.StivError` if ``out`` cannot take the frames of ``chain``."""
    height, width = chain.template.height or 1, chain.template.width or 1
    factor = upscale_for(request.out, height, width, request.upscale)
    height, width = height * factor, width * factor
    check_sides(request.out, height, width)
    if request.out.suffix.lower() not in STREAMED:
        needed, what = 6 * chain.frames * height * width, f"{chain.frames} frames of {width}x{height}"
        check_memory(what, needed, "write an .mp4 or a folder")


def kept_clips(request: LongRequest) -> int:
    """How many finished clips lie in the folder of ``request``."""
    try:
        return sum(path.suffix == ".npy" and not path.name.startswith("source") for path in request.folder.iterdir())
    except OSError:
        return 0
