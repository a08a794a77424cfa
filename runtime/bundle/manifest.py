"""The bundle's ``manifest.json``: the one thing that export writes and the runtime believes, after checking it."""

import hashlib
import json
import re
from pathlib import PureWindowsPath
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from stiv_deploy.runtime.bundle.bounds import (
    BLOCK_LIMIT,
    RATE_LIMIT,
    SHIFT_LIMITS,
    SIZE_LIMIT,
    STEP_LIMIT,
    STRETCH_LIMITS,
    Bytes,
    Digest,
    Name,
    Scale,
    Size,
    Steps,
    Weights,
)
from stiv_deploy.runtime.bundle.contract import (
    SAMPLE_ROWS,
    SKIP_GRAPHS,
    Choice,
    Format,
    Frozen,
    GraphSpec,
    ModelFacts,
    Precision,
    Reduced,
    dimensions,
    graph_specs,
    is_half,
)
from stiv_deploy.runtime.bundle.tuned import SolverName, Tuned, TunedGrid
from stiv_deploy.runtime.tensorrt_library import Flavour

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SKIPS_REMEDY = "make the bundle again with 'stiv export CHECKPOINT --out BUNDLE --skips'"
HALVES_REMEDY = "make the bundle again with 'stiv export CHECKPOINT --out BUNDLE --halves'"
PORTABLE = "portable"
"""The ``sm`` of an engine that is not bound to one GPU architecture."""


class FileRecord(Frozen):
    """A file of the bundle: path relative to it (forward slashes), SHA-256 (hex) and size in bytes.

    The file may be a link, as in the caches of model hubs, wherever it leads: what counts is the hash.
    """

    path: str = Field(max_length=1_000)
    sha256: Digest
    bytes: Bytes

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        parts = re.split(r"[/\\]", path)
        if not all(parts) or {".", ".."} & {*parts} or PureWindowsPath(path).anchor or not path.isprintable():
            raise ValueError("the path leaves the bundle, or is none")
        return path


class PluginForm(Frozen):
    """A graph's second file, with plugin nodes in place of native attention; it reads the same external weights.

    ``plugins`` are the nodes' types with their versions (``StivTemporalAttention/1``). Every node comes with a function
    body of standard operators, so that any runtime can execute the file.
    """

    file: FileRecord
    topology: Digest
    plugins: tuple[Name, ...] = Field(min_length=1, max_length=100)


class ReducedForm(Frozen):
    """A float32 graph's second file, whose inside is in ``precision``; it reads the same weights, which stay float32.

    Engines are built from it where the GPU has the type (:func:`~stiv_deploy.runtime.bundle.engine_files.reduced_for`).
    """

    file: FileRecord
    topology: Digest
    precision: Reduced


class Fp4Form(Frozen):
    """A graph's second file with products in NVFP4, which engines are built from, and its own external weights.

    The graph's first file is its twin: it rounds to the same values in standard operators.
    """

    file: FileRecord
    data: FileRecord
    topology: Digest


class GraphRecord(Frozen):
    """One ONNX graph: its file, its external weights (if any), its contract, and the hash of its topology.

    ``topology`` is the SHA-256 of the graph without weight values: equal for graphs that differ in weights only.
    """

    file: FileRecord
    data: FileRecord | None
    topology: Digest
    spec: GraphSpec
    plugin: PluginForm | None = None
    reduced: ReducedForm | None = None
    fp4: Fp4Form | None = None


class Range(Frozen):
    """Allowed values of one size: minimum, what engines are tuned for, maximum."""

    min: Size
    typical: Size
    max: Size

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.min <= self.typical <= self.max:
            raise ValueError(f"want min <= typical <= max, got {self.min}, {self.typical}, {self.max}")
        return self


class Bucket(Frozen):
    """A range of request sizes that the graphs were checked and the engines are profiled for."""

    name: Name
    batch: Range
    frames: Range
    height: Range
    width: Range

    def holds(self, *, batch: int, frames: int, height: int, width: int) -> bool:
        """Whether a request of this size lies inside."""
        sizes = ((batch, self.batch), (frames, self.frames), (height, self.height), (width, self.width))
        return all(allowed.min <= size <= allowed.max for size, allowed in sizes)

    def dims(self, model: ModelFacts, which: Literal["min", "typical", "max"]) -> dict[str, int]:
        """Symbol values at the ``min``, ``typical`` or ``max`` corner (1, 2 and 3 model rows a sample)."""
        batch = getattr(self.batch, which)
        return dimensions(
            model,
            batch=batch,
            model_batch=batch * {"min": 1, "typical": 2, "max": SAMPLE_ROWS}[which],
            video_frames=getattr(self.frames, which),
            height=getattr(self.height, which),
            width=getattr(self.width, which),
            text_tokens=1 if which == "min" else model.max_text_tokens,
        )


class SamplingDefaults(Frozen):
    """Defaults of a generation request, as the checkpoint recommends them."""

    frames: Size
    height: Size
    width: Size
    frames_per_second: int = Field(ge=1, le=RATE_LIMIT)
    stride: Size = 1
    steps: int = Field(ge=1, le=STEP_LIMIT)
    guidance_mode: Literal["none", "jit", "sit"] = "jit"
    guidance_scale: Scale
    image_scale: Scale
    renorm: bool = True
    solver: SolverName = "euler"
    time_shift: float = Field(ge=SHIFT_LIMITS[0], le=SHIFT_LIMITS[1])
    late_stretch: float = Field(default=1.0, ge=STRETCH_LIMITS[0], le=STRETCH_LIMITS[1])


class Recommended(SamplingDefaults):
    """Defaults of requests for some number of steps: ``solver_weights`` are AB2's, where some are fitted to these.

    Where steps are to be skipped, ``skipped_steps`` are those.
    """

    solver_weights: Weights | None = None
    skipped_steps: Steps | None = None


def _from_grid(own: dict[str, Any], grid: TunedGrid) -> Recommended:
    """The defaults ``own``, with solver, times, weights and skipped steps of ``grid``."""
    found = grid.model_dump(include={"solver", "time_shift", "late_stretch"})
    skipped = grid.skipped_steps or None
    return Recommended(**own | found, solver_weights=grid.solver_weights or None, skipped_steps=skipped)


Sizes = Annotated[tuple[Size, ...], Field(min_length=1, max_length=1_000)]


class TrainedOn(Frozen):
    """What the checkpoint's model has seen in training: tasks and givings by name, strides, sizes, frames."""

    tasks: tuple[Name, ...] = Field(min_length=1, max_length=100)
    givings: tuple[Name, ...] = Field(min_length=1, max_length=1_000)
    strides: Sizes
    sizes: tuple[tuple[Size, Size], ...] = Field(min_length=1, max_length=1_000)
    frames: Sizes


class EngineRecord(Frozen):
    """One compiled engine. ``onnx`` is the combined hash of the graph and weights it was built from.

    ``plugins`` is the SHA-256 of the plugin library that it needs, None if it needs none: it was built from the native
    form, or has the code of its plugins in it. ``weights`` are the initializers of the graph that the engine takes as
    inputs of the same names: then other graphs with equal topology may share its file.
    """

    graph: Name
    bucket: Name
    backend: Flavour
    backend_version: Name
    sm: Name
    file: FileRecord
    onnx: Digest
    plugins: Digest | None = None
    weights: Annotated[tuple[Name, ...], Field(max_length=10_000)] = ()
    build_seconds: float


class ParityRow(Frozen):
    """One comparison with the oracle: ``level`` is op, block, step, teacher_forced or free_run.

    With ``direct_`` in front of it the comparison is with the fake-quantized reference. An error that is not finite is
    one, too.
    """

    model_config = ConfigDict(allow_inf_nan=True)

    level: Name
    name: Name
    backend: Name
    precision: Name
    rel_l2: float
    max_abs: float
    gate: float
    passed: bool


class Preview(Frozen):
    """Colours of latents: RGB in [-1, 1] is about ``latents @ weights + bias``, without the decoder.

    ``weights`` [latent channels, 3] and ``bias`` [3] are a least-squares fit to the VAE's own decode of coded pictures,
    averaged over a latent's pixels, and ``error`` is the root of its mean squared residual.
    """

    weights: Annotated[tuple[tuple[Scale, Scale, Scale], ...], Field(min_length=1, max_length=SIZE_LIMIT)]
    bias: tuple[Scale, Scale, Scale]
    error: float = Field(ge=0)


class QuantizationRecord(Frozen):
    """How a bundle was quantized; ``precision`` of the manifest is the type of everything else.

    ``scales`` is the SHA-256 of the scale file, ``layers`` the whole plan: layer (``block_00.spatial.qkv``) to ``fp8``
    (E4M3), ``int8``, ``nvfp4`` or ``high``.
    """

    format: Format
    scales: Digest
    layers: Annotated[dict[Name, Choice], Field(max_length=100 * BLOCK_LIMIT)]


class LoraRecord(Frozen):
    """A LoRA that was merged into the checkpoint's weights: its file's name and SHA-256, and the scale."""

    name: Name
    sha256: Digest
    scale: Scale


class Manifest(Frozen):
    """Contents of ``manifest.json``."""

    format: Literal["stiv-bundle"] = "stiv-bundle"
    format_version: Literal[2] = 2
    precision: Precision
    opset: int = Field(ge=1, le=1_000)
    model: ModelFacts
    sampling: SamplingDefaults
    buckets: tuple[Bucket, ...] = Field(min_length=1, max_length=1_000)
    graphs: dict[Name, GraphRecord] = Field(max_length=4 * BLOCK_LIMIT)
    tokenizer: FileRecord
    checkpoint: Digest
    """SHA-256 over the checkpoint's files."""
    lora: Annotated[tuple[LoraRecord, ...], Field(max_length=1_000)] = ()
    """What was merged into the checkpoint's weights, in order."""
    trained: TrainedOn | None = None
    """What the model has seen; None where its checkpoint does not tell."""
    quantization: QuantizationRecord | None = None
    """Which layers run in 8 or 4 bits; None where none does."""
    tuned: Tuned | None = None
    """The best solvers and time shifts, by steps; None where nobody has looked for them."""
    preview: Preview | None = None
    """Colours of latents, to look at what is being made; None where an older export made it."""
    golden: FileRecord | None = None
    """Answers that prove the bundle where it runs; None where an older export made it."""
    tools: dict[Name, Name] = Field(max_length=1_000)
    """Versions of the tools that made the bundle."""
    parity: tuple[ParityRow, ...] = ()
    engines: tuple[EngineRecord, ...] = ()

    @model_validator(mode="after")
    def _check_preview(self) -> Self:
        wanted = self.model.latent_channels
        if self.preview is not None and len(self.preview.weights) != wanted:
            raise ValueError(f"want preview weights of {wanted} channels, got {len(self.preview.weights)}")
        return self

    def recommended(self, steps: int | None = None, solver: str | None = None) -> Recommended:
        """What a request with so many ``steps`` and this ``solver``, where it names them, gets for the rest."""
        wanted, own = steps or self.sampling.steps, self.sampling.model_dump()
        grid = None if self.tuned is None else self.tuned.grid(wanted, solver)
        return Recommended(**own) if grid is None else _from_grid(own, grid)

    def skipping(self, steps: int | None = None, solver: str | None = None) -> Recommended | None:
        """The same for a request that skips the blocks of some steps; None where nobody has found out of which ones."""
        grids = [] if self.tuned is None else self.tuned.skipping(steps or self.sampling.steps, solver)
        return _from_grid(self.sampling.model_dump(), grids[0]) if grids else None

    @property
    def halves(self) -> bool:
        """Whether blocks are also there as halves, which several devices share the work of a clip by."""
        return any(map(is_half, self.graphs))

    @property
    def skips(self) -> bool:
        """Whether steps can skip the blocks."""
        return SKIP_GRAPHS[0] in self.graphs

    @property
    def specs(self) -> dict[str, GraphSpec]:
        """The contract of this bundle's graphs, those included that others may lack."""
        return graph_specs(self.model, self.precision, halves=self.halves, skips=self.skips)

    @property
    def vae_precision(self) -> Precision:
        """What engines compute the VAE in, where the GPU has the type; on a CPU it is float32."""
        reduced = self.graphs["decoder"].reduced if "decoder" in self.graphs else None
        return "float32" if reduced is None else reduced.precision

    @property
    def bundle_hash(self) -> str:
        """SHA-256 (hex) of what the bundle's results follow from: model, precision, graphs, weights and tokenizer.

        Not of engines, parity rows, recommended and tuned settings, previews, golden answers, buckets or the graphs'
        second forms, which the halves of blocks are too, nor of what steps take that skip the blocks.
        """
        graphs = {
            name: [graph.file.sha256, None if graph.data is None else graph.data.sha256]
            for name, graph in sorted(self.graphs.items())
            if not (is_half(name) or name in SKIP_GRAPHS)
        }
        facts = self.model_dump(mode="json", include={"format_version", "model", "precision"})
        if self.model.student is None:
            del facts["model"]["student"]  # bundles have the hash that they had before there were students
        text = json.dumps(facts | {"graphs": graphs, "tokenizer": self.tokenizer.sha256}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
