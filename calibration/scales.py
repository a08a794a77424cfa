"""The scale file: calibrated ranges of every layer, bound to the checkpoint and the settings that they came from.

A safetensors file. Tensors, all fp32: ``<layer>.input`` [] and ``<layer>.weight`` ([] or [out]) of linears, optionally
``<layer>.smooth`` [in] (SmoothQuant divides the input and multiplies the weight by it; ranges are those after it);
``<layer>.q``, ``.k``, ``.v`` [] of attention, after QK-norm and RoPE, before the softmax scale. All are amax, largest
magnitudes: scale = amax / 448 (E4M3), / 127 (INT8) or / 2688 (NVFP4: the scale of the whole tensor). The header holds
:class:`Provenance` as JSON.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import LARGEST, OPERANDS, Format, Layer, model_layers
from stiv_deploy.stiv_ref.config import FrozenConfig, StivConfig
from stiv_deploy.stiv_ref.files import parse_json, replaced_file
from stiv_deploy.stiv_ref.weights import save_tensors

HEADER = "stiv-scales"


class Provenance(FrozenConfig):
    """Where scales came from: enough to refuse them for anything else and to make them again."""

    format_version: int = 1
    quantization: Format
    checkpoint: str
    """:func:`stiv_ref.checkpoint.checkpoint_hash` of the calibrated checkpoint."""
    model: StivConfig
    recipe: dict[str, str | int | float | bool]
    """Settings of the calibration run, all of them."""
    prompts: str
    """SHA-256 (hex) of the prompts."""
    tools: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Ranges by tensor name and their provenance."""

    provenance: Provenance
    amax: Mapping[str, Tensor]

    @property
    def quantization(self) -> Format:
        """The format that these ranges were calibrated for."""
        return self.provenance.quantization


def tensor_names(layer: Layer) -> tuple[str, ...]:
    """Names of the ranges that ``layer`` must have."""
    parts = ("input", "weight") if layer.kind == "linear" else OPERANDS
    return tuple(f"{layer.name}.{part}" for part in parts)


def scale_of(amax: Tensor, quantization: Format, dtype: torch.dtype) -> Tensor:
    """The scale of a range, rounded to ``dtype`` (that of the activations) *before* anything is quantized with it.

    Never below the smallest normal number of ``dtype``: a subnormal scale loses the bits that make it one. Those of
    NVFP4 are float32 beside activations of every type.
    """
    dtype = torch.float32 if quantization == "nvfp4" else dtype
    return (amax.double() / LARGEST[quantization]).clamp_min(torch.finfo(dtype).tiny).to(dtype)


def save_scales(path: Path, scales: Scales) -> None:
    """Write ``scales`` under a temporary name, then rename."""
    header = {HEADER: scales.provenance.model_dump_json()}
    with replaced_file(path) as temporary:
        save_tensors({name: value.float().contiguous() for name, value in scales.amax.items()}, temporary, header)


def load_scales(path: Path) -> Scales:
    """Read a scale file and check that it is whole: every layer there, every range finite and positive.

    Raises :class:`CalibrationError` with one line.
    """
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            amax = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header is None:
            raise CalibrationError(f"{path}: not a scale file; give one that 'stiv calibrate' wrote")
        provenance = Provenance.model_validate(parse_json(header))
    except (OSError, SafetensorError, ValidationError, ValueError) as error:
        if isinstance(error, CalibrationError):
            raise
        reason = str(error).splitlines()[0]
        raise CalibrationError(f"{path}: cannot be read as scales ({reason}); run 'stiv calibrate' again") from None
    scales = Scales(provenance=provenance, amax=amax)
    check_ranges(scales, str(path))
    return scales


def check_ranges(scales: Scales, where: str) -> None:
    """:class:`CalibrationError` at the first layer without a range, or with one that is not finite and positive."""
    for layer in model_layers(scales.provenance.model):
        for name in tensor_names(layer):
            if name not in scales.amax:
                raise CalibrationError(f"{where}: layer {layer.name} has no range {name}; run 'stiv calibrate' again")
    for name, value in scales.amax.items():
        if not (torch.isfinite(value).all() and (value > 0).all()):
            raise CalibrationError(
                f"{where}: range {name} is not finite and positive ({value.flatten()[0].item():g}...); a layer that "
                "is always zero or overflows cannot be quantized: check the checkpoint, run 'stiv calibrate' again"
            )


def check_fits(scales: Scales, checkpoint: str, quantization: Format, where: str) -> None:
    """:class:`CalibrationError` if ``scales`` are for another checkpoint (its hash) or format."""
    if scales.quantization != quantization:
        raise CalibrationError(
            f"{where}: scales for {scales.quantization}, asked was {quantization}; "
            f"run 'stiv calibrate --precision {quantization}'"
        )
    if scales.provenance.checkpoint != checkpoint:
        raise CalibrationError(
            f"{where}: scales of another checkpoint ({scales.provenance.checkpoint[:12]}, this one is "
            f"{checkpoint[:12]}); run 'stiv calibrate' on this one"
        )
