"""The precision plan: which layer runs in 8 or 4 bits. A JSON file that people read and edit."""

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.calibration.layers import BLOCK, Format, Layer, model_layers, quantizable_layers, takes
from stiv_deploy.stiv_ref.config import FrozenConfig, StivConfig, faults_of
from stiv_deploy.stiv_ref.files import read_text, write_text

Choice = Literal[Format, "high"]
LEAST_TOKENS = 32
"""TensorRT has an FP8 attention kernel if the smallest request has at least so many tokens a frame (measured with
TensorRT-RTX 1.7, docs/quantization.md; head sizes 8 to 256)."""


class PrecisionPlan(FrozenConfig):
    """Contents of a plan file. ``layers`` names every layer of the model; ``high`` is the 16 or 32-bit type."""

    format: Literal["stiv-precision-plan"] = "stiv-precision-plan"
    format_version: Literal[1] = 1
    quantization: Format
    model: str
    layers: dict[str, Choice]

    def quantized(self, layer: str) -> bool:
        """Whether ``layer`` runs in fewer bits."""
        return self.layers.get(layer, "high") != "high"


def default_plan(config: StivConfig, quantization: Format) -> PrecisionPlan:
    """All linears of the blocks in 8 or 4 bits, spatial attention where a fused FP8 kernel exists, the edges high.

    Buckets go down to half of the model's base grid in each direction: to a quarter of its tokens. INT8 attention
    stays high, as its kernels end at 512 tokens. Temporal attention has too few tokens for an 8-bit kernel and is no
    layer of a plan. In NVFP4 linears stay high whose inputs are no whole number of blocks.
    """
    rows, columns = config.base_grid
    fused = quantization == "fp8" and rows * columns // 4 >= LEAST_TOKENS

    def choice(layer: Layer) -> Choice:
        if layer.group == "edge" or not takes(config, layer, quantization):
            return "high"
        if layer.kind == "linear":
            return quantization
        return quantization if fused else "high"

    layers = {layer.name: choice(layer) for layer in model_layers(config)}
    return PrecisionPlan(quantization=quantization, model=config.name, layers=layers)


def everything(config: StivConfig, quantization: Format) -> PrecisionPlan:
    """Every layer that can be in the format, edges too: the counter-example that shows what the default spares."""
    layers: dict[str, Choice] = {
        layer.name: quantization if takes(config, layer, quantization) else "high" for layer in model_layers(config)
    }
    return PrecisionPlan(quantization=quantization, model=config.name, layers=layers)


def save_plan(path: Path, plan: PrecisionPlan) -> None:
    """Write ``plan`` as JSON, one layer a line, whole or not at all."""
    write_text(path, plan.model_dump_json(indent=1) + "\n")


def load_plan(path: Path, config: StivConfig, quantization: Format) -> PrecisionPlan:
    """Read a plan and check it against the model; :class:`CalibrationError` with one line if it does not fit."""
    try:
        plan = PrecisionPlan.model_validate_json(read_text(path))
    except ValidationError as error:
        raise CalibrationError(f"{path}: {faults_of(error)}; see 'stiv calibrate --help' for plans") from None
    except ValueError as error:
        raise CalibrationError(f"{path}: cannot be read ({error}); give a plan written by 'stiv calibrate'") from None
    return checked_plan(plan, config, quantization, str(path))


def checked_plan(plan: PrecisionPlan, config: StivConfig, quantization: Format, where: str) -> PrecisionPlan:
    """``plan`` itself if it fits model and format, else :class:`CalibrationError`."""
    known = {layer.name for layer in model_layers(config)}
    if plan.model != config.name:
        raise CalibrationError(f"{where}: this plan is for model {plan.model}, the checkpoint is {config.name}")
    if plan.quantization != quantization:
        raise CalibrationError(f"{where}: this plan is for {plan.quantization}, asked was {quantization}")
    if missing := sorted(known - plan.layers.keys()):
        raise CalibrationError(f"{where}: layer {missing[0]} is missing; give it {quantization} or high")
    if unknown := sorted(plan.layers.keys() - known):
        raise CalibrationError(f"{where}: the model has no layer {unknown[0]}; remove it")
    if wrong := [name for name, choice in plan.layers.items() if choice not in (quantization, "high")]:
        raise CalibrationError(
            f"{where}: layer {wrong[0]} is {plan.layers[wrong[0]]}; a {quantization} plan has {quantization} and high"
        )
    able = {layer.name for layer in quantizable_layers(config, quantization)}
    if unable := [name for name in plan.layers if plan.quantized(name) and name not in able]:
        raise CalibrationError(
            f"{where}: layer {unable[0]} cannot be {quantization}, which is for linears of the blocks with a multiple "
            f"of {BLOCK} inputs; make it high"
        )
    return plan
