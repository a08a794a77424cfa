"""How long a step would take on a GPU, predicted from what it computes and moves. No prediction is a measurement.

``t = linear / (peak e) + attention / (0.8 peak16 e16) + bytes / (0.85 bandwidth)``: operations as ``roofline.py`` has
them, peaks of NVIDIA's data sheets, and efficiencies ``e`` that published runs reached with large GEMMs: FLUX.1-dev on
the H100 (49 % of the 16-bit peak compiled, 39 % of the FP8 peak) and the L20 (84 and 65 %), Wan2.2 on the B200 (65 %,
much of it attention). Launches are not in it: a model whose step takes less than they do is slower than this.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.command.bench.roofline import PEAKS, SQUARES, TEMPORAL_SQUARES, Peak

ATTENTION, COPIED = 0.8, 0.85
"""Of a GEMM's efficiency, what attention reaches; of the bandwidth, what element-wise kernels do."""
HALF_BYTES = 2
PASSES = {"native": 60, "plugins": 38}
"""Times that a token goes through memory in a block in 16 bits: norms, residuals, RoPE, GELU and attention in time."""
FEWER_IN_8_BITS = 5
"""Such times less, where GEMMs read 8 bits."""
PRECISIONS: tuple["PlannedPrecision", ...] = ("bfloat16", "fp8", "int8")
TEXT_TOKENS = 77

PlannedPrecision = Literal["bfloat16", "fp8", "int8"]
Form = Literal["native", "plugins"]
FORMS: tuple[Form, ...] = ("native", "plugins")


class Efficiency(NamedTuple):
    """Shares of the peak that large GEMMs reach in 16 and in 8 bits."""

    half: float
    eight: float


EFFICIENCIES = {
    "RTX 4090": Efficiency(0.80, 0.70),
    "RTX 5090": Efficiency(0.80, 0.70),
    "L40S": Efficiency(0.65, 0.50),
    "A100": Efficiency(0.70, 0.70),
    "H100": Efficiency(0.55, 0.45),
    "H200": Efficiency(0.55, 0.45),
    "B200": Efficiency(0.50, 0.40),
}
"""By the names of ``PEAKS``."""


class Shape(NamedTuple):
    """What a step's cost follows from: ``blocks`` of ``width``, an FFN ``ffn`` times that, attention in time or not."""

    width: int
    blocks: int
    ffn: int = 4
    temporal: bool = True

    @property
    def squares(self) -> int:
        """Weights of a block, in matrices of width x width."""
        return SQUARES + TEMPORAL_SQUARES * self.temporal + 2 * self.ffn


PAPER = {"XL": Shape(1152, 28), "XXL": Shape(1536, 38), "M": Shape(3072, 46)}
"""Sizes of STIV (arXiv 2412.07730, table 1)."""


class Load(NamedTuple):
    """What a step works on: ``rows`` of ``frames`` x ``places`` tokens each, and ``text`` tokens."""

    rows: int
    frames: int
    places: int
    text: int = TEXT_TOKENS


def seen_tokens(shape: Shape, load: Load) -> int:
    """Tokens that each token attends to in a block: of its frame, of the text, and of its place."""
    return load.places + load.text + (load.frames if shape.temporal else 0)


class Prediction(Frozen):
    """Predicted seconds of one evaluation of the model on the GPU ``gpu``, and the three terms that they are."""

    gpu: str
    precision: PlannedPrecision
    form: Form
    linear: float
    attention: float
    memory: float

    @property
    def seconds(self) -> float:
        """Of the evaluation."""
        return self.linear + self.attention + self.memory


def predicted(gpu: str, shape: Shape, load: Load, precision: PlannedPrecision, form: Form) -> Prediction | None:
    """The prediction for ``gpu``, one of ``EFFICIENCIES``; None if it has no arithmetic of this ``precision``."""
    peak, reached = PEAKS[gpu], EFFICIENCIES[gpu]
    fast = _peak(peak, precision)
    if fast is None:
        return None
    tokens = load.rows * load.frames * load.places * shape.blocks
    passes = PASSES[form] - (FEWER_IN_8_BITS if precision != "bfloat16" else 0)
    share = reached.half if precision == "bfloat16" else reached.eight
    return Prediction(
        gpu=gpu,
        precision=precision,
        form=form,
        linear=tokens * 2 * shape.squares * shape.width**2 / (fast * share),
        attention=tokens * 4 * seen_tokens(shape, load) * shape.width / (peak.half * reached.half * ATTENTION),
        memory=tokens * passes * shape.width * HALF_BYTES / (peak.bandwidth * COPIED),
    )


def _peak(peak: Peak, precision: PlannedPrecision) -> float | None:
    return peak.of(None if precision == "bfloat16" else precision)


def predictions(
    gpus: Iterable[str], shape: Shape, load: Load, precisions: Iterable[PlannedPrecision], forms: Iterable[Form]
) -> Iterator[Prediction]:
    """All predictions that there are."""
    forms, precisions = tuple(forms), tuple(precisions)
    for gpu in gpus:
        for precision in precisions:
            for form in forms:
                found = predicted(gpu, shape, load, precision, form)
                if found is not None:
                    yield found
