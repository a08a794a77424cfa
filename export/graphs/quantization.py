"""What a quantized bundle is made from: scales and plan, checked against their checkpoint, and the stored values.

Numbers are here, the graphs that use them are in :mod:`~stiv_deploy.export.graphs.quantized_graph` and
:mod:`~stiv_deploy.export.graphs.nvfp4_graph`; all go by the same names: in a graph, a layer has
``<module>.input_scale`` [], ``<module>.weight_scale`` [] or [out], its 8-bit ``<module>.weight`` and, with SmoothQuant,
``<module>.inverse_smooth`` [in]; attention has ``<module>.q_scale``, ``.k_scale`` and ``.v_scale`` []. In NVFP4 the
form for engines also has ``<module>.weight_block_scale`` [out, in / 16].
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from stiv_deploy.calibration.layers import LARGEST, OPERANDS, Layer, model_layers
from stiv_deploy.calibration.nvfp4 import fake_quantized_nvfp4, to_blocks
from stiv_deploy.calibration.plan import PrecisionPlan, default_plan, load_plan
from stiv_deploy.calibration.scales import Scales, check_fits, load_scales, scale_of
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.onnx_from_module import parameters_of
from stiv_deploy.runtime.bundle.contract import Format, has_layer
from stiv_deploy.runtime.bundle.manifest import QuantizationRecord
from stiv_deploy.runtime.files import sha256
from stiv_deploy.stiv_ref.checkpoint import CheckpointFolder
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv

STORED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""Torch types of the 8-bit formats."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What to export in 8 or 4 bits: ranges, the plan, and the SHA-256 (hex) of the scale file."""

    scales: Scales
    plan: PrecisionPlan
    sha256: str

    @property
    def format(self) -> Format:
        """The format of what is quantized."""
        return self.plan.quantization

    def record(self) -> QuantizationRecord:
        """The manifest's entry."""
        return QuantizationRecord(format=self.format, scales=self.sha256, layers=dict(self.plan.layers))


@dataclass(frozen=True, kw_only=True)
class LayerScheme:
    """How one layer is written into its graph, all but the values: graphs with equal schemes share a template.

    ``module`` is the layer's name inside the graph (``spatial.qkv``). ``input_like`` is the first layer of the graph
    with the same input range: where both read the same tensor, unsmoothed, they share one quantize.
    """

    module: str
    kind: Literal["linear", "attention"]
    format: Format
    per_channel: bool = False
    smooth: bool = False
    input_like: str = ""


def load_quantization(
    checkpoint: CheckpointFolder, quantization: Format, scales: Path, plan: Path | None
) -> Quantization:
    """Read a scale file and a plan (None: the default) and check both against the checkpoint.

    Raises :class:`~stiv_deploy.calibration.errors.CalibrationError` or
    :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`, one line.
    """
    config = checkpoint.config.model
    loaded = load_scales(scales)
    chosen = default_plan(config, quantization) if plan is None else load_plan(plan, config, quantization)
    check_fits(loaded, checkpoint.sha256, quantization, str(scales))
    return Quantization(scales=loaded, plan=chosen, sha256=sha256(scales))


def check_shapes(scales: Scales, model: Stiv) -> None:
    """Raise :class:`ExportError` if a range of ``scales`` has another shape than its layer of ``model`` wants."""
    for layer in model_layers(model.config):
        if layer.kind == "linear":
            _check_shapes(scales.amax, layer, model.get_parameter(f"{layer.module}.weight"))
        for part in OPERANDS if layer.kind == "attention" else ("input",):
            _check_shape(scales.amax, f"{layer.name}.{part}", [()])


def _check_shapes(amax: Mapping[str, Tensor], layer: Layer, weight: Tensor) -> None:
    _check_shape(amax, f"{layer.name}.weight", [(), (weight.shape[0],)])
    _check_shape(amax, f"{layer.name}.smooth", [(weight.shape[1],)])


def _check_shape(amax: Mapping[str, Tensor], name: str, wanted: list[tuple[int, ...]]) -> None:
    shape = tuple(amax[name].shape) if name in amax else wanted[0]
    if shape not in wanted:
        allowed = " or ".join(str(list(each)) for each in wanted)
        raise ExportError(
            f"the scales: {name} has shape {list(shape)}, the model wants {allowed}; run 'stiv calibrate' again"
        )


def graph_scheme(quantization: Quantization, config: StivConfig, graph: str) -> tuple[LayerScheme, ...]:
    """Schemes of the layers of ``graph`` that run in 8 or 4 bits, in running order; empty for a graph without any."""
    amax = quantization.scales.amax
    first: dict[float, str] = {}
    schemes = []
    for layer in model_layers(config):
        if not has_layer(graph, layer.name) or not quantization.plan.quantized(layer.name):
            continue
        scheme = LayerScheme(module=module_of(layer), kind=layer.kind, format=quantization.format)
        if layer.kind == "linear":
            scheme = replace(
                scheme,
                per_channel=amax[f"{layer.name}.weight"].dim() == 1,
                smooth=f"{layer.name}.smooth" in amax,
                input_like=first.setdefault(amax[f"{layer.name}.input"].item(), scheme.module),
            )
        schemes.append(scheme)
    return tuple(schemes)


def module_of(layer: Layer) -> str:
    """The layer's name inside its graph: ``block_00.spatial.qkv`` -> ``spatial.qkv``."""
    return layer.name.removeprefix(f"{layer.graph}.")


class StoredTensors(Mapping[str, Tensor]):
    """Parameters of a graph as they are stored, in torch's layout, each made when asked for and kept by nobody.

    ``module`` is the graph module in float32; weights of the layers in ``scheme`` become 8 bits, or ``dtype`` rounded
    to NVFP4, everything else that floats becomes ``dtype``. A block's weights are thus in memory once, plus one tensor.
    ``amax`` are all ranges.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: str,
        dtype: torch.dtype,
        scheme: tuple[LayerScheme, ...] = (),
        amax: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._dtype = dtype
        self._parameters = parameters_of(module)
        self._makers: dict[str, Callable[[], Tensor]] = {
            name: partial(_cast, f"{graph}.{name}", tensor, dtype) for name, tensor in self._parameters.items()
        }
        for layer in scheme:
            prefix = f"{graph}.{layer.module}."
            ranges = {
                name.removeprefix(prefix): value for name, value in (amax or {}).items() if name.startswith(prefix)
            }
            made = self._attention(layer, ranges) if layer.kind == "attention" else self._linear(layer, ranges)
            self._makers |= {f"{layer.module}.{name}": maker for name, maker in made.items()}

    def _attention(self, layer: LayerScheme, ranges: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        """Scales of the operands; that of the queries is for queries times the softmax scale."""
        head_dim = self._parameters[f"{layer.module.rpartition('.')[0]}.q_norm.weight"].numel()
        ranges = {**ranges, "q": ranges["q"] * head_dim**-0.5}
        return {f"{part}_scale": partial(scale_of, ranges[part], layer.format, self._dtype) for part in OPERANDS}

    def _linear(self, layer: LayerScheme, ranges: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
        if layer.format == "nvfp4":
            weight = self._parameters[f"{layer.module}.weight"]
            scales = {part: scale_of(ranges[part], layer.format, self._dtype) for part in ("input", "weight")}
            return {"input_scale": scales["input"].clone, **self._nvfp4(weight, scales["weight"])}
        weight_scale = scale_of(ranges["weight"], layer.format, self._dtype)
        inverse = (1 / ranges["smooth"].double()).to(self._dtype) if layer.smooth else None
        weight = self._parameters[f"{layer.module}.weight"]
        makers: dict[str, Callable[[], Tensor]] = {
            "input_scale": partial(scale_of, ranges["input"], layer.format, self._dtype),
            "weight_scale": weight_scale.clone,
            "weight": partial(quantized_weight, weight, weight_scale, layer.format, inverse),
        }
        return makers if inverse is None else makers | {"inverse_smooth": inverse.clone}

    def _nvfp4(self, weight: Tensor, scale: Tensor) -> dict[str, Callable[[], Tensor]]:
        """What the twin has of a weight [out, in]: its rounded values."""
        return {"weight": lambda: fake_quantized_nvfp4(weight.float(), scale).to(self._dtype)}

    def __getitem__(self, name: str) -> Tensor:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class EngineTensors(StoredTensors):
    """The same for the form for engines of a graph in NVFP4: 4-bit elements, one in each byte, and block scales."""

    def _nvfp4(self, weight: Tensor, scale: Tensor) -> dict[str, Callable[[], Tensor]]:
        return {
            "weight": lambda: to_blocks(weight.float(), scale).codes,
            "weight_block_scale": lambda: to_blocks(weight.float(), scale).scales.squeeze(-1),
            "weight_scale": scale.clone,
        }


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` as it is stored; :class:`ExportError` if a value is not finite in ``dtype``."""
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise ExportError(f"{name}: NaN, or too large for {kind}; export with --precision bfloat16 or float32")
    return cast


def quantized_weight(weight: Tensor, scale: Tensor, quantization: Format, inverse_smooth: Tensor | None) -> Tensor:
    """``weight`` [out, in] in 8 bits with ``scale`` [] or [out], already rounded to the activations' type.

    Symmetric and to nearest even. With SmoothQuant the weight is first divided by ``inverse_smooth`` [in] as stored,
    so that the product with the smoothed input is that of the original layer.
    """
    wide = weight.float() if inverse_smooth is None else weight.float() / inverse_smooth.float()
    largest = LARGEST[quantization]
    scaled = (wide / scale.float().reshape(-1, 1)).clamp(-largest, largest)
    return (scaled.round() if quantization == "int8" else scaled).to(STORED[quantization])
