"""LoRA files merged into a checkpoint for good, and found again by what a bundle says of them.

Weights are merged in float32 before they are cast or quantized; scales stay those of the checkpoint without them.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.lora import Lora, check_lora, linears_of, merged, read_lora
from stiv_deploy.runtime.bundle.manifest import LoraRecord
from stiv_deploy.runtime.errors import BundleError, one_line
from stiv_deploy.runtime.files import sha256
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


def loras_of(bundle: Bundle, named: Sequence[Path]) -> tuple[Lora, ...]:
    """What was merged into ``bundle``, from the files ``named``, or in the bundle's folder or beside it.

    Raises :class:`BundleError` for a file that is not there, or that was not merged.
    """
    wanted = {each.sha256: each for each in bundle.manifest.lora}
    folders = (bundle.folder, bundle.folder.absolute().parent)
    candidates = list(named) or [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    hashes = {path: sha256(path) if path.is_file() else "" for path in candidates} if wanted or named else {}
    if strange := [path for path in named if hashes[path] not in wanted]:
        raise BundleError(f"{strange[0]}: no LoRA that was merged into {bundle.folder}; name those that were")
    known = {digest: path for path, digest in hashes.items()}
    if missing := [each for each in wanted.values() if each.sha256 not in known]:
        raise BundleError(
            f"{bundle.folder}: the LoRA {missing[0].name} (SHA-256 {missing[0].sha256[:12]}) that was merged into it "
            "is neither in it nor beside it; name the file with --lora"
        )
    return tuple(read_lora(known[each.sha256], each.scale) for each in bundle.manifest.lora)
