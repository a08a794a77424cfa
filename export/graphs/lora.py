"""LoRA files merged into a checkpoint for good.

Weights are merged in float32 before they are cast or quantized; scales stay those of the checkpoint without them.
"""

from collections.abc import Sequence

import torch
from torch import nn

from stiv_deploy.runtime.bundle.lora import Lora, check_lora, linears_of, merged
from stiv_deploy.runtime.bundle.manifest import LoraRecord
from stiv_deploy.runtime.errors import one_line
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointFolder
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv


def linear_shapes(config: StivConfig) -> dict[str, tuple[int, int]]:
    """Shapes [out, in] of all linears of a model, by name."""
    with torch.device("meta"):
        model = Stiv(config)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def check_loras(loras: Sequence[Lora], checkpoint: CheckpointFolder) -> None:
    """Raise :class:`~stiv_deploy.runtime.errors.LoraError` unless all ``loras`` are for ``checkpoint``."""
    if loras:
        shapes = linear_shapes(checkpoint.config.model)
        for lora in loras:
            check_lora(lora, shapes, checkpoint.sha256)


@torch.no_grad()
def merge_loras(checkpoint: Checkpoint, loras: Sequence[Lora]) -> None:
    """Add ``loras``, which were checked, to the float32 weights of ``checkpoint`` in memory."""
    for name in linears_of(loras):
        weight = checkpoint.model.get_parameter(f"{name}.weight")
        weight.copy_(torch.from_numpy(merged(weight.numpy(), name, loras)))


def lora_records(loras: Sequence[Lora]) -> tuple[LoraRecord, ...]:
    """The manifest's entries."""
    return tuple(LoraRecord(name=one_line(lora.path.name, 200), sha256=lora.sha256, scale=lora.scale) for lora in loras)
