"""What ``stiv bench plan`` is asked: a bundle or a size of the paper, a clip, and the GPUs to predict for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Frozen, dimensions
from stiv_deploy.runtime.command.bench.predict import (
    EFFICIENCIES,
    FORMS,
    PAPER,
    PRECISIONS,
    Form,
    Load,
    PlannedPrecision,
    Prediction,
    Shape,
    predictions,
)
from stiv_deploy.runtime.command.bench.record import BenchReport
from stiv_deploy.runtime.command.bench.roofline import ffn_ratio
from stiv_deploy.runtime.command.bench.scale import Link, Scaled, all_scaled
from stiv_deploy.runtime.command.bench.stage import Size
from stiv_deploy.runtime.errors import RequestError, briefly
from stiv_deploy.runtime.pipeline.plan import plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.sampling.solvers import evaluations, most_rows

PAPER_SIZE = Size(20, 256, 256)
PAPER_PIXELS = 16
"""Pixels of a token's side in the paper: a VAE of 8, patches of 2."""
PAPER_STEPS, PAPER_ROWS = 50, 2
"""Sampling steps, and rows of JIT-CFG."""


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """Predict for one clip of ``what``: a bundle's folder, or one of the sizes of the paper, ``PAPER``.

    ``rows`` of the model are its guidance branches. None is what the bundle recommends, or the paper does. ``measured``
    are reports of ``stiv bench``, to tell what was measured of the same work. With ``counts`` it also predicts for so
    many GPUs that share the clip, with a ``link`` between them. Raises :class:`RequestError`.
    """

    what: str
    size: Size | None = None
    rows: int | None = None
    evaluations: int | None = None
    gpus: tuple[str, ...] = tuple(EFFICIENCIES)
    precisions: tuple[PlannedPrecision, ...] = PRECISIONS
    forms: tuple[Form, ...] = FORMS
    measured: tuple[Path, ...] = ()
    counts: tuple[int, ...] = ()
    link: Link = "nvlink"

    def __post_init__(self) -> None:
        unknown = [each for each in self.gpus if each not in EFFICIENCIES]
        if unknown:
            raise RequestError(f"nothing is known of a {briefly(unknown[0])}; known are {', '.join(EFFICIENCIES)}")
        for name, value in (("rows", self.rows), ("evaluations", self.evaluations)):
            if value is not None and value < 1:
                raise RequestError(f"{name} must be 1 or more, got {value}")


class Planned(Frozen):
    """A prediction, and the seconds that an evaluation of the same work was measured to take on such a GPU, if any."""

    prediction: Prediction
    measured: float | None = None


class Plan(Frozen):
    """Predictions for one clip of ``what``; all of them are of denoising alone."""

    what: str
    size: str
    rows: int
    evaluations: int
    planned: tuple[Planned, ...]
    link: Link | None = None
    scaled: tuple[Scaled, ...] = ()


class _Work(NamedTuple):
    shape: Shape
    load: Load
    size: Size
    evaluations: int


def plan(request: PlanRequest) -> Plan:
    """All predictions of ``request``; :class:`RequestError`, and what :meth:`Bundle.open` raises."""
    work = _of_paper(request) if request.what in PAPER else _of_bundle(request)
    reports = [BenchReport.read(path) for path in request.measured]
    found = list(predictions(request.gpus, work.shape, work.load, request.precisions, request.forms))
    scale = all_scaled(found, work.shape, work.load, request.counts, request.link) if request.counts else ()
    return Plan(
        what=request.what,
        size=f"{work.size.frames} frames of {work.size.width}x{work.size.height}",
        rows=work.load.rows,
        evaluations=work.evaluations,
        planned=tuple(Planned(prediction=each, measured=_measured(each, work, reports)) for each in found),
        link=request.link if request.counts else None,
        scaled=scale,
    )


def _of_paper(request: PlanRequest) -> _Work:
    size = request.size or PAPER_SIZE
    if size.height % PAPER_PIXELS or size.width % PAPER_PIXELS:
        raise RequestError(
            f"a token of {request.what} is {PAPER_PIXELS} pixels wide, got {size.height}x{size.width}; give multiples"
        )
    places = size.height // PAPER_PIXELS * (size.width // PAPER_PIXELS)
    load = Load(request.rows or PAPER_ROWS, size.frames, places)
    return _Work(PAPER[request.what], load, size, request.evaluations or PAPER_STEPS)


def _of_bundle(request: PlanRequest) -> _Work:
    if not Path(request.what).is_dir():
        raise RequestError(f"{briefly(request.what)}: no bundle, and none of {', '.join(PAPER)}")
    bundle = Bundle.open(Path(request.what))
    frames, height, width = request.size or (None, None, None)
    asked = GenerationRequest(prompt="", num_frames=frames, height=height, width=width)
    clip = plan_generation(bundle, asked)
    settings, size = clip.videos[0].settings, Size(clip.size.frames, clip.size.height, clip.size.width)
    model, rows = bundle.manifest.model, request.rows or most_rows(settings)
    dims = dimensions(
        model,
        batch=1,
        model_batch=rows,
        video_frames=size.frames,
        height=size.height,
        width=size.width,
        text_tokens=model.max_text_tokens,
    )
    shape = Shape(model.width, model.blocks, ffn_ratio(bundle.manifest), model.temporal)
    load = Load(rows, dims["token_frames"], dims["tokens"], dims["text_tokens"])
    return _Work(shape, load, size, request.evaluations or len(evaluations(settings)))


def _measured(prediction: Prediction, work: _Work, reports: Sequence[BenchReport]) -> float | None:
    """Of the first report on such a GPU, precision, shape, size and number of rows."""
    for report in reports:
        facts, model = report.bundle, report.bundle.model
        alike = (facts.quantization or facts.precision) == prediction.precision and prediction.gpu in report.device
        if alike and (model.width, model.blocks) == (work.shape.width, work.shape.blocks):
            for point in report.points:
                size = Size(point.work.frames, point.work.height, point.work.width)
                if size == work.size and point.work.rows == work.load.rows:
                    return point.evaluation_seconds
    return None
