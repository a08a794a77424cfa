"""Golden answers: what a bundle's graphs must give, wherever they run; written by export, held against by verify.

Inputs are not kept but drawn anew from a seed (:mod:`~stiv_deploy.runtime.sampling.golden_inputs`), of outputs there
are sketches (:mod:`~stiv_deploy.runtime.bundle.sketch`). The answers are those of the reference in float64; the gates
follow from what plain PyTorch loses in the bundle's precision.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError, field_validator

from stiv_deploy.runtime.bundle.bounds import BLOCK_LIMIT, TOKEN_LIMIT, Name, Size
from stiv_deploy.runtime.bundle.bundle import AGAIN, Bundle
from stiv_deploy.runtime.bundle.contract import Frozen, ModelFacts, dimensions
from stiv_deploy.runtime.bundle.faults import fault_text
from stiv_deploy.runtime.bundle.sketch import packed, sketch, unpacked
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.runtime.files import read_json

GOLDEN = "golden.json"


class Answer(Frozen):
    """One output tensor: the L2 norm and the sketch of what is right, and the largest relative error that passes."""

    name: Name
    norm: float = Field(ge=0)
    sketch: str = Field(max_length=1_000)
    gate: float = Field(gt=0)

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


def answer(name: str, truth: np.ndarray, gate: float) -> Answer:
    """The answer that ``truth`` is."""
    norm = float(np.linalg.norm(truth.astype(np.float64).reshape(-1)))
    return Answer(name=name, norm=norm, sketch=packed(sketch(truth)), gate=gate)


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


class Golden(Frozen):
    """Contents of :data:`GOLDEN`. ``vocabulary`` is the number of token ids that inputs are drawn from."""

    format: Literal["stiv-golden"] = "stiv-golden"
    version: Literal[1] = 1
    vocabulary: int = Field(ge=1, le=2**31)
    graphs: Annotated[tuple[GraphAnswer, ...], Field(max_length=100 * BLOCK_LIMIT)]


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
    factor = model.spatial_factor
    for each in golden.graphs:
        outputs = {tensor.name for tensor in graphs[each.graph].spec.outputs} if each.graph in graphs else set()
        if not {output.name for output in each.outputs} <= outputs:
            raise BundleError(f"{path}: knows a graph {each.graph!r} or outputs of it that are not here; {AGAIN}")
        padded = each.sizes.video_frames + model.frame_padding
        if padded % model.temporal_factor or each.sizes.height % factor or each.sizes.width % factor:
            raise BundleError(f"{path}: {each.graph} at the {each.size}: the model takes no such size; {AGAIN}")
