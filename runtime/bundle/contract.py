"""The graph contract: which graphs a bundle has, and the name, type and symbolic shape of every tensor.

Export names its inputs and outputs by it, the runtime allocates and binds by it, engines are profiled by it.

Symbols: ``batch`` samples (clips); ``model_batch`` rows of the model, of which a sample has one for each of its
guidance branches (1 to 3), in any order; ``video_frames``, ``height``, ``width`` in pixels; ``frames``,
``latent_height``, ``latent_width`` of the latents;
``token_frames``, ``tokens`` (of a frame) of the transformer; ``text_tokens``.

Types: whatever the host makes or reads is float32, int64, bool or uint8; ``FLOAT`` is the bundle's precision and stays
on the device.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stiv_deploy.runtime.bundle.bounds import BLOCK_LIMIT, TOKEN_LIMIT, Factor, Name, Scale, Size

MICRO_VALUES = 6
"""Micro-conditions: original height and width, crop top and left, frame stride, number of frames."""
MASKED = -1e4
"""Additive text mask at padding."""
SAMPLE_ROWS = 3
"""Rows of the model that one sample can have: its guidance branches."""

VAE_GRAPHS = ("image_encoder", "decoder")
"""The VAE: float32 for the CPU in every bundle; engines may compute it in :data:`Reduced` types."""
FRAMES = "frames"
"""The graph that makes 8-bit frames of a decoded video; older exports have none."""
PIXEL_GRAPHS = (*VAE_GRAPHS, FRAMES)
"""Graphs of whole pictures, which are called piece by piece where these are large."""

Precision = Literal["float32", "float16", "bfloat16"]
Reduced = Literal["float16", "bfloat16"]
"""Types of 16 bits."""
Format = Literal["fp8", "int8", "nvfp4"]
"""Formats of quantized layers: E4M3, symmetric -127 to 127, and E2M1 in blocks of 16 with E4M3 scales."""
FORMATS: tuple[Format, ...] = get_args(Format)
Choice = Literal[Format, "high"]
"""What a precision plan says of a layer: its format, or the bundle's own type."""
DType = Literal[Precision, "int64", "bool", "uint8"]
Dim = int | str


class Frozen(BaseModel):
    """Base of the manifest's parts: immutable, unknown keys and numbers that are not finite refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TensorSpec(Frozen):
    """Name, element type and shape of a graph input or output; a string is a symbolic dimension."""

    name: Name
    dtype: DType
    shape: Annotated[tuple[Dim, ...], Field(max_length=8)]

    def sized(self, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape with symbols replaced by ``dims``."""
        return tuple(dims[dim] if isinstance(dim, str) else dim for dim in self.shape)


class GraphSpec(Frozen):
    """Inputs and outputs of one graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class Student(Frozen):
    """What a distilled model has in the place of guidance branches: one row, with the guidance scale as a condition.

    ``guidance`` are the least and the greatest scale that it was trained for. A ``flow_map`` also takes the time that a
    step ends at, and gives the mean velocity up to there.
    """

    guidance: tuple[Scale, Scale]
    flow_map: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.guidance[0] > self.guidance[1]:
            raise ValueError(f"want guidance from the least scale to the greatest, got {list(self.guidance)}")
        return self

    def covers(self, scale: float) -> bool:
        """Whether it was trained for ``scale``."""
        return self.guidance[0] <= scale <= self.guidance[1]

    @property
    def scales(self) -> str:
        """The scales in words."""
        least, greatest = self.guidance
        return f"{least:g}" if least == greatest else f"{least:g} to {greatest:g}"


class ModelFacts(Frozen):
    """Architecture facts that the runtime and the contract need (the fields of the reference's config)."""

    name: Name
    blocks: int = Field(ge=1, le=BLOCK_LIMIT)
    width: Size
    heads: Size
    patch: tuple[Factor, Factor]
    latent_channels: Size
    text_width: Size
    max_text_tokens: int = Field(ge=1, le=TOKEN_LIMIT)
    base_frames: Size
    base_grid: tuple[Size, Size]
    rope_theta: float = Field(gt=0)
    temporal: bool
    spatial_factor: Factor
    """Pixels per latent along height and width (the VAE's)."""
    temporal_factor: Factor
    """Frames per latent frame (the VAE's)."""
    causal_vae: bool = False
    """Whether the VAE codes the first frame alone, as latent frame 0, and no frame by a later one."""
    student: Student | None = None
    """What a distilled model has instead of guidance branches."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by {self.heads} heads")
        if self.student is not None and not self.temporal:
            raise ValueError("students are of video models, this is an image model")
        return self

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads

    @property
    def pixel_multiple(self) -> int:
        """Height and width must be multiples of this: VAE factor times patch."""
        return self.spatial_factor * self.patch[1]

    @property
    def frame_multiple(self) -> int:
        """The number of frames plus :attr:`frame_padding` must be a multiple of this."""
        return self.temporal_factor * self.patch[0]

    @property
    def frame_padding(self) -> int:
        """Frames that the first latent frame has less than the others: all but one for a causal VAE, else none."""
        return self.temporal_factor - 1 if self.causal_vae else 0

    def latent_frames(self, video_frames: int) -> int:
        """Latent frames of a video of ``video_frames`` frames (an allowed number)."""
        return (video_frames + self.frame_padding) // self.temporal_factor

    def video_frames(self, latent_frames: int) -> int:
        """Frames of the video that ``latent_frames`` latent frames make."""
        return latent_frames * self.temporal_factor - self.frame_padding


def block_names(blocks: int) -> list[str]:
    """Graph names of the blocks, in order: ``block_00``, ``block_01``, ..."""
    return [f"block_{index:02d}" for index in range(blocks)]


def is_block(graph: str) -> bool:
    """Whether ``graph`` is one of :func:`block_names`."""
    return graph.startswith("block_")


HALVES = ("spatial", "mixed")
"""What a block is cut into for several devices: attention in space, and all that follows it."""


def half_names(blocks: int) -> list[tuple[str, str]]:
    """Graph names of the halves of each block, in order: ``spatial_00`` and ``mixed_00``, ..."""
    return [(f"spatial_{index:02d}", f"mixed_{index:02d}") for index in range(blocks)]


def is_half(graph: str) -> bool:
    """Whether ``graph`` is one of :func:`half_names`."""
    return graph.partition("_")[0] in HALVES


def block_of(graph: str) -> str:
    """The block that ``graph`` is a half of; of any other graph itself."""
    return f"block_{graph.partition('_')[2]}" if is_half(graph) else graph


def has_layer(graph: str, layer: str) -> bool:
    """Whether ``layer``, by its name in a plan (``block_00.spatial.qkv``), is one of ``graph``."""
    owner, _, module = layer.partition(".")
    if owner != block_of(graph) or not is_half(graph):
        return owner == graph
    return (module.partition(".")[0] == HALVES[0]) == graph.startswith(HALVES[0])


SKIP_GRAPHS = ("residual", "extrapolate")
"""What steps take that skip the blocks, see :mod:`~stiv_deploy.runtime.sampling.skipping`; few bundles have them."""


def dimensions(
    model: ModelFacts, *, batch: int, model_batch: int, video_frames: int, height: int, width: int, text_tokens: int
) -> dict[str, int]:
    """Values of all symbols for one request size."""
    frames = model.latent_frames(video_frames)
    latent_height, latent_width = height // model.spatial_factor, width // model.spatial_factor
    pt, ps = model.patch
    return {
        "batch": batch,
        "model_batch": model_batch,
        "video_frames": video_frames,
        "height": height,
        "width": width,
        "frames": frames,
        "latent_height": latent_height,
        "latent_width": latent_width,
        "token_frames": frames // pt,
        "tokens": (latent_height // ps) * (latent_width // ps),
        "text_tokens": text_tokens,
    }


LATE = ("guidance", "target_time")
"""What ``embed`` takes of students, a number for each row: of all of them the first, of flow maps both."""


def late_inputs(student: Student | None) -> tuple[str, ...]:
    """Those of :data:`LATE` that a model takes."""
    if student is None:
        return ()
    return LATE if student.flow_map else LATE[:1]


def graph_specs(
    model: ModelFacts, precision: Precision, *, halves: bool = False, skips: bool = False
) -> dict[str, GraphSpec]:
    """The contract: every graph of a bundle of this model in this precision, blocks included, in running order.

    With ``halves`` each block is followed by its two halves, which a bundle has all or none of. They have the block's
    tensors, each those that it reads, of some of the frames (``spatial``) or some of the positions (``mixed``). With
    ``skips`` :data:`SKIP_GRAPHS` follow the blocks.
    """
    half = model.head_dim // 2
    latent_size = ("frames", model.latent_channels, "latent_height", "latent_width")
    rows, text = ("model_batch", "text_tokens"), ("text_tokens", model.head_dim)

    def host(name: str, *shape: Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    def device(name: str, *shape: Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=precision, shape=shape)

    def other(name: str, dtype: DType, *shape: Dim) -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    def graph(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> GraphSpec:
        return GraphSpec(inputs=tuple(inputs), outputs=tuple(outputs))

    states = device("text_states", *rows, model.text_width)
    pooled = device("pooled", "model_batch", model.text_width)
    tokens = ("model_batch", "token_frames", "tokens", model.width)
    model_input = host("model_input", "model_batch", *latent_size)
    condition = device("condition", "model_batch", model.width)
    modulation = device("modulation", "model_batch", 6, model.width)
    video = host("video", "batch", "video_frames", 3, "height", "width")
    spatial = [host("spatial_cos", "tokens", half), host("spatial_sin", "tokens", half)]
    temporal = [host("temporal_cos", "token_frames", half), host("temporal_sin", "token_frames", half)] * model.temporal
    student = [host(name, "model_batch") for name in late_inputs(model.student)]
    all_heads = (model.blocks, "model_batch", model.heads, *text)
    state = [device("x", *tokens), modulation]
    words = [
        device("text_k", "model_batch", model.heads, *text),
        device("text_v", "model_batch", model.heads, *text),
        host("text_mask", "model_batch", 1, 1, "text_tokens"),
    ]
    x_out = [device("x_out", *tokens)]
    block = graph([*state, *words, *spatial, *temporal], x_out)
    pair = (graph([*state, *spatial], x_out), graph([*state, *words, *temporal], x_out))
    blocks = dict.fromkeys(block_names(model.blocks), block)
    if halves:
        both = zip(block_names(model.blocks), half_names(model.blocks), strict=True)
        blocks = {name: spec for one, two in both for name, spec in zip((one, *two), (block, *pair), strict=True)}
    x, last = device("x", *tokens), device("last", *tokens)
    known = [device(f"residual_{place}", *tokens) for place in range(2)]
    skipped = [host("residual_weights", "model_batch", 2), other("skipped", "bool", "model_batch")]
    skipping = {
        "residual": graph([x, last], [device("residual", *tokens)]),
        "extrapolate": graph([x, last, *known, *skipped], x_out),
    }
    return {
        "text_encoder": graph(
            [other("token_ids", "int64", *rows), other("token_mask", "int64", *rows)], [states, pooled]
        ),
        "text_kv": graph([states], [device("text_k", *all_heads), device("text_v", *all_heads)]),
        "image_encoder": graph([video], [host("latents", "batch", *latent_size)]),
        "embed": graph(
            [
                model_input,
                host("timestep", "model_batch"),
                host("micro", "model_batch", MICRO_VALUES),
                pooled,
                *spatial,
                *temporal,
                *student,
            ],
            [x, modulation, condition],
        ),
        **blocks,
        **(skipping if skips else {}),
        "head": graph([x, condition, model_input], [host("velocity", "model_batch", *latent_size)]),
        "step": graph(
            [
                host("velocity", "model_batch", *latent_size),
                host("latents", "batch", *latent_size),
                host("clean", "batch", *latent_size),
                host("noise", "batch", *latent_size),
                other("frame_mask", "bool", "batch", "frames"),
                other("sample_rows", "int64", "batch", SAMPLE_ROWS),
                host("row_weights", "batch", SAMPLE_ROWS),
                other("row_sample", "int64", "model_batch"),
                other("row_mask", "bool", "model_batch", "frames"),
                host("previous_velocity", "batch", *latent_size),
                host("solver_weights", "batch", 2),
                host("dt", "batch"),
                host("next_timestep", "batch"),
                host("renorm", "batch"),
                other("hold", "bool", "batch"),
            ],
            [
                host("next_latents", "batch", *latent_size),
                host("guided_velocity", "batch", *latent_size),
                host("next_model_input", "model_batch", *latent_size),
            ],
        ),
        "decoder": graph([host("latents", "batch", *latent_size)], [video]),
        FRAMES: graph([video], [other("frames", "uint8", "batch", "video_frames", "height", "width", 3)]),
    }
