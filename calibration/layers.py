"""Which layers of a model can run in 8 or 4 bits, and by which names scales, plans, graphs and reports know them.

A layer's name is ``<graph>.<module>``: the graph of the bundle that holds it (``block_00``, ``embed``, ...) and the
module inside, ``block_00.spatial.qkv``. The matrix products of spatial attention are one layer, ``spatial.attention``.
"""

from dataclasses import dataclass
from typing import Literal

from stiv_deploy.stiv_ref.config import StivConfig

Format = Literal["fp8", "int8", "nvfp4"]
"""``fp8``: E4M3; ``int8``: symmetric, -127 to 127 (W8A8); ``nvfp4``: E2M1 in blocks of 16 with E4M3 scales (W4A4)."""
Kind = Literal["linear", "attention"]
Group = Literal["block", "edge"]

LARGEST = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6.0 * 448.0}
"""Largest magnitude of each format; scale = amax / largest. That of NVFP4 is its largest element times block scale."""
BLOCK = 16
"""Elements, neighbours along the inputs of a linear, that have an NVFP4 block scale in common."""
SPATIAL = ("spatial.qkv", "spatial.out")
TEMPORAL = ("temporal.qkv", "temporal.out")
REST = ("cross.q", "cross.out", "ffn.up", "ffn.down")
ATTENTION = "spatial.attention"
OPERANDS = ("q", "k", "v")
"""Operands of an attention layer with a calibrated range; the softmax's output lies in [0, 1] by definition."""
MICRO = ("resolution", "crop", "stride", "frames")


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: its name, its graph, and its module in :class:`~stiv_deploy.stiv_ref.model.Stiv` (dotted path).

    ``group`` is ``block`` for the layers of blocks, ``edge`` for what the default plan never quantizes: patch
    embedding, conditions and AdaLN, text projections (run once a request) and the head. The module of an attention
    layer is its :class:`~stiv_deploy.stiv_ref.block.SelfAttention`.
    """

    name: str
    graph: str
    module: str
    kind: Kind
    group: Group


def block_layers(config: StivConfig, index: int) -> tuple[Layer, ...]:
    """Layers of block ``index`` in running order."""
    graph = f"block_{index:02d}"
    linears = (*SPATIAL, *(TEMPORAL if config.temporal else ()), *REST)
    found = [
        Layer(name=f"{graph}.{name}", graph=graph, module=f"blocks.{index}.{name}", kind="linear", group="block")
        for name in linears
    ]
    attention = Layer(
        name=f"{graph}.{ATTENTION}", graph=graph, module=f"blocks.{index}.spatial", kind="attention", group="block"
    )
    return (found[0], attention, *found[1:])


def edge_layers(config: StivConfig) -> tuple[Layer, ...]:
    """Linears outside the blocks: only the everything-quantized counter-example touches them."""
    singleton = [f"timestep.{part}" for part in ("inner", "outer")]
    singleton += [f"micro.{name}.{part}" for name in MICRO for part in ("inner", "outer")]
    embed = ["patch", *(f"singleton.{name}" for name in singleton), "singleton.pooled", "modulation"]
    text = ["text_in", "text_out", *(f"blocks.{index}.cross.kv" for index in range(config.blocks))]
    places = (("embed", embed), ("text_kv", text), ("head", ["head.out"]))
    return tuple(
        Layer(name=f"{graph}.{name}", graph=graph, module=name, kind="linear", group="edge")
        for graph, names in places
        for name in names
    )


def model_layers(config: StivConfig) -> tuple[Layer, ...]:
    """All layers of a model: those of its blocks in running order, then the edges."""
    blocks = [layer for index in range(config.blocks) for layer in block_layers(config, index)]
    return (*blocks, *edge_layers(config))


def takes(config: StivConfig, layer: Layer, quantization: Format) -> bool:
    """Whether ``layer`` can run in a format: in NVFP4 linears of blocks with whole blocks of inputs, else all."""
    if quantization != "nvfp4":
        return True
    inputs = config.width * (config.mlp_ratio if layer.name.endswith("ffn.down") else 1)
    return layer.kind == "linear" and layer.group == "block" and inputs % BLOCK == 0


def quantizable_layers(config: StivConfig, quantization: Format) -> tuple[Layer, ...]:
    """Those of :func:`model_layers` that can run in a format."""
    return tuple(layer for layer in model_layers(config) if takes(config, layer, quantization))
