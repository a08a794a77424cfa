"""Golden answers: what a bundle's graphs must give, wherever they run; written by export, held against by verify.

There are answers of each graph alone, and of short runs of the sampling loop in every guidance mode, which speak of the
runtime's own code. Inputs are not kept but drawn anew from a seed (:mod:`~stiv_deploy.runtime.sampling.golden_inputs`,
:mod:`~stiv_deploy.runtime.sampling.golden_samples`), of outputs there are sketches
(:mod:`~stiv_deploy.runtime.bundle.sketch`). The answers are those of the reference in float64; the gates follow from
what plain PyTorch loses in the bundle's precision.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, field_validator, model_validator

from stiv_deploy.runtime.bundle.bounds import BLOCK_LIMIT, SHIFT_LIMITS, TOKEN_LIMIT, Name, Scale, Size
from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.bundle.contract import Frozen, ModelFacts, dimensions
from stiv_deploy.runtime.bundle.faults import fault_text
from stiv_deploy.runtime.bundle.sketch import packed, sketch, unpacked
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.runtime.files import read_json

GOLDEN = "golden.json"


class Answer(Frozen):
    """One output tensor: the L2 norm and the sketch of what is right, and the largest relative error that passes.

    ``engine_gate`` is that of engines where they compute the graph in another type than the bundle's graph is in.
    """

    name: Name
    norm: float = Field(ge=0)
    sketch: str = Field(max_length=1_000)
    gate: float = Field(gt=0)
    engine_gate: float | None = Field(default=None, gt=0)

    @field_validator("sketch")
    @classmethod
    def _check(cls, text: str) -> str:
        if not np.isfinite(unpacked(text)).all():
            raise ValueError("a sketch is of finite numbers")
        return text

    def error(self, got: np.ndarray) -> float:
        """The relative L2 error of ``got``, as well as sketches tell it; infinite where ``got`` is not finite."""
        difference = float(np.linalg.norm(sketch(got) - unpacked(self.sketch)))
        if not math.isfinite(difference):
            return math.inf
        if self.norm == 0:
            return math.inf if difference else 0.0
        return difference / self.norm


def answer(name: str, truth: np.ndarray, gate: float, engine_gate: float | None = None) -> Answer:
    """The answer that ``truth`` is."""
    norm = float(np.linalg.norm(truth.astype(np.float64).reshape(-1)))
    return Answer(name=name, norm=norm, sketch=packed(sketch(truth)), gate=gate, engine_gate=engine_gate)


class Sizes(Frozen):
    """The numbers that a call's shapes follow from; names as those of the contract's symbols."""

    batch: Size
    model_batch: Size
    video_frames: Size
    height: Size
    width: Size
    text_tokens: int = Field(ge=1, le=TOKEN_LIMIT)

    def dims(self, model: ModelFacts) -> dict[str, int]:
        """Values of all symbols."""
        return dimensions(model, **self.model_dump())


class GraphAnswer(Frozen):
    """What ``graph`` must give at one size, which ``size`` describes."""

    graph: Name
    size: Name
    sizes: Sizes
    outputs: tuple[Answer, ...] = Field(min_length=1, max_length=10)


class RunSettings(Frozen):
    """How a run is sampled, by the names of the runtime's settings; ``given`` are its given latent frames.

    Where ``forced``, each step but the first starts from drawn latents instead of those that the step before has made.
    """

    steps: int = Field(ge=1, le=100)
    guidance_mode: Literal["none", "jit", "sit"]
    guidance_scale: Scale = 4.0
    image_scale: Scale = 1.5
    renorm: bool = True
    solver: Literal["euler", "heun", "ab2"] = "euler"
    time_shift: Annotated[float, Field(ge=SHIFT_LIMITS[0], le=SHIFT_LIMITS[1])] = 1.0
    unseen: Literal["noised", "zero"] = "noised"
    guidance_from: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_until: Annotated[float, Field(ge=0, le=1)] = 1.0
    given: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=100)] = ()
    forced: bool = False

    @model_validator(mode="after")
    def _check_interval(self) -> Self:
        if self.guidance_from > self.guidance_until:
            raise ValueError("guidance ends before it begins")
        return self


class RunAnswer(Frozen):
    """What a short run must give: after each step its latents, and what the model sees next in each row.

    Outputs are named by :func:`latents_of` and :func:`inputs_of`; after the last step there are no inputs.
    """

    name: Name
    settings: RunSettings
    outputs: tuple[Answer, ...] = Field(min_length=1, max_length=200)


def latents_of(step: int) -> str:
    """Name of the latents fp32 [T, C, h, w] after ``step``, the first being 1."""
    return f"latents after step {step}"


def inputs_of(step: int) -> str:
    """Name of what the model sees after ``step``, fp32 [rows, T, C, h, w], the conditional row first."""
    return f"inputs after step {step}"


class RunAnswers(Frozen):
    """Runs of one size, which ``size`` describes; ``sizes.batch`` of them are to go side by side."""

    size: Name
    sizes: Sizes
    runs: tuple[RunAnswer, ...] = Field(min_length=1, max_length=100)


class Golden(Frozen):
    """Contents of :data:`GOLDEN`. ``vocabulary`` is the number of token ids that inputs are drawn from.

    ``sampling`` is None where the runs of 8-bit layers could not be simulated.
    """

    format: Literal["stiv-golden"] = "stiv-golden"
    version: Literal[1] = 1
    vocabulary: int = Field(ge=1, le=2**31)
    graphs: Annotated[tuple[GraphAnswer, ...], Field(max_length=100 * BLOCK_LIMIT)]
    sampling: RunAnswers | None = None


def read_golden(bundle: Bundle) -> Golden:
    """The answers of ``bundle``, their file verified; :class:`BundleError` where it has none, or not those of it."""
    record = bundle.manifest.golden
    if record is None:
        raise BundleError(f"{bundle.folder}: has no golden answers, an older export made it; {AGAIN}")
    path = bundle.verified(record)
    try:
        golden = Golden.model_validate(read_json(path))
    except ValidationError as error:
        raise BundleError(f"{path}: {fault_text(error)}; {AGAIN}") from None
    except ValueError as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from None
    _check_names(bundle, golden, path)
    return golden


def _check_names(bundle: Bundle, golden: Golden, path: Path) -> None:
    """:class:`BundleError` where ``golden`` speaks of graphs, outputs or sizes that the bundle has not."""
    model, graphs = bundle.manifest.model, bundle.manifest.graphs
    for each in golden.graphs:
        outputs = {tensor.name for tensor in graphs[each.graph].spec.outputs} if each.graph in graphs else set()
        if not {output.name for output in each.outputs} <= outputs:
            raise BundleError(f"{path}: knows a graph {each.graph!r} or outputs of it that are not here; {AGAIN}")
        if not _fits(each.sizes, model):
            raise BundleError(f"{path}: {each.graph} at the {each.size}: the model takes no such size; {AGAIN}")
    if golden.sampling is not None:
        _check_runs(golden.sampling, model, path)


def _fits(sizes: Sizes, model: ModelFacts) -> bool:
    padded, factor = sizes.video_frames + model.frame_padding, model.spatial_factor
    return not (padded % model.temporal_factor or sizes.height % factor or sizes.width % factor)


def _check_runs(found: RunAnswers, model: ModelFacts, path: Path) -> None:
    """:class:`BundleError` where runs are of a size, or have outputs, that there cannot be."""
    if not _fits(found.sizes, model) or found.sizes.text_tokens != model.max_text_tokens:
        raise BundleError(f"{path}: sampling at the {found.size}: the model takes no such size; {AGAIN}")
    frames = model.latent_frames(found.sizes.video_frames)
    for run in found.runs:
        steps = range(1, run.settings.steps + 1)
        known = {*map(latents_of, steps), *map(inputs_of, steps[:-1])}
        if not {each.name for each in run.outputs} <= known or max(run.settings.given, default=0) >= frames:
            raise BundleError(f"{path}: run {run.name!r} has outputs or given frames that cannot be; {AGAIN}")
