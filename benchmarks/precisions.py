"""The shipped precisions, and the counter-examples, as checkpoints that the reference sampler runs.

bf16 and fp16 are PyTorch in that type. The others are the fake-quantized reference on the float16 grid of the
exported bundles, computed in float32: PyTorch's float16 kernels are five times slower on a CPU, and ONNX Runtime runs
one image-to-video clip at a time. ``stiv parity`` holds the bundles to this very model.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.plan import PrecisionPlan, default_plan, everything
from stiv_deploy.calibration.scales import Scales
from stiv_deploy.export.graphs.draws import fake_quantized_wide
from stiv_deploy.export.graphs.reference import Boundary
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

FORMATS: tuple[Format, ...] = ("fp8", "int8", "nvfp4")
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EVERYTHING = " everything"
"""Suffix of the counter-examples, in which every layer is in 8 bits."""
NAMES = ("fp32", *TYPES, *FORMATS, *(f"{name}{EVERYTHING}" for name in FORMATS[:2]))


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One precision: its name, how it is computed, and a checkpoint whose model and text encoder compute so."""

    name: str
    how: str
    checkpoint: Checkpoint


def variant(
    name: str, checkpoint: Checkpoint, scales: Mapping[Format, Scales], plans: Mapping[Format, PrecisionPlan]
) -> Variant:
    """The precision ``name`` of :data:`NAMES`; ``plans`` replace the default plans."""
    if name == "fp32":
        return Variant(name=name, how="PyTorch float32", checkpoint=checkpoint)
    if name in TYPES:
        return Variant(
            name=name, how=f"PyTorch {TYPES[name]}".replace("torch.", ""), checkpoint=cast_to(checkpoint, name)
        )
    quantization = cast(Format, name.removesuffix(EVERYTHING))
    config = checkpoint.config.model
    if name.endswith(EVERYTHING):
        plan = everything(config, quantization)
    else:
        plan = plans.get(quantization, default_plan(config, quantization))
    model = fake_quantized_wide(checkpoint.model, torch.float16, scales[quantization], plan)
    count = sum(plan.quantized(layer) for layer in plan.layers)
    how = f"fake-quantized PyTorch, float16 grid, {count} of {len(plan.layers)} layers in {quantization}"
    return Variant(name=name, how=how, checkpoint=replace(checkpoint, model=model))


def cast_to(checkpoint: Checkpoint, name: str) -> Checkpoint:
    """``checkpoint`` whose model and text encoder compute in a half precision; latents stay float32."""
    dtype = TYPES[name]
    model: Any = Boundary(copy.deepcopy(checkpoint.model).to(dtype))
    return replace(checkpoint, model=model, text_encoder=copy.deepcopy(checkpoint.text_encoder).to(dtype))


def exact(checkpoint: Checkpoint) -> Checkpoint:
    """``checkpoint`` in float64: the truth of velocities and latents."""
    model, encoder = (copy.deepcopy(part).double() for part in (checkpoint.model, checkpoint.text_encoder))
    return replace(checkpoint, model=model, text_encoder=encoder)
