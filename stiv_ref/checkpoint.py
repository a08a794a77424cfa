"""Checkpoints: a folder of safetensors and JSON, one file per component, written whole or not at all.

``config.json`` (architectures, sampling defaults), ``model.safetensors``, ``text_encoder.safetensors``,
``vae.safetensors`` and ``tokenizer.json``.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from stiv_deploy.stiv_ref.config import FrozenConfig, StivConfig, read_config
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, load_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

CHECKPOINT_FILES = ("config.json", "model.safetensors", "text_encoder.safetensors", "vae.safetensors", "tokenizer.json")


class SamplingDefaults(FrozenConfig):
    """What this checkpoint was trained for, and the sampling settings that suit it best."""

    frames: int = Field(default=8, gt=0)
    height: int = Field(default=32, gt=0)
    width: int = Field(default=32, gt=0)
    frames_per_second: int = Field(default=8, gt=0)
    steps: int = Field(default=30, gt=0)
    guidance_scale: float = 4.0
    image_scale: float = 1.5
    time_shift: float = Field(default=1.0, gt=0)


class CheckpointConfig(FrozenConfig):
    """Contents of ``config.json``."""

    format: Literal["stiv-checkpoint"] = "stiv-checkpoint"
    format_version: Literal[1] = 1
    model: StivConfig
    text: TextConfig
    vae: VaeConfig
    sampling: SamplingDefaults


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A trained STIV with everything needed to run it."""

    config: CheckpointConfig
    model: Stiv
    text_encoder: TextEncoder
    vae: Vae
    tokenizer: Tokenizer


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``target`` on success and vanishes on any failure."""
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stored(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """State dict of ``module`` with floating tensors in ``dtype``, contiguous, detached."""
    return {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).detach().contiguous()
        for name, tensor in module.state_dict().items()
    }


def save_checkpoint(path: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Write ``checkpoint`` to the folder ``path``, replacing it; ``dtype`` is the stored type of the weights."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_folder(path) as folder:
        text = json.dumps(checkpoint.config.model_dump(mode="json"), indent=2)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        save_file(stored(checkpoint.model, dtype), folder / "model.safetensors")
        save_file(stored(checkpoint.text_encoder, dtype), folder / "text_encoder.safetensors")
        save_file(stored(checkpoint.vae, dtype), folder / "vae.safetensors")
        checkpoint.tokenizer.save(str(folder / "tokenizer.json"))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise :class:`CheckpointError` if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load ``tensors`` into ``module``; raise :class:`CheckpointError` naming the first misfits."""
    wanted = module.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensor.shape)}, the config wants {tuple(wanted[name].shape)}"
        for name, tensor in tensors.items()
        if name in wanted and tensor.shape != wanted[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{source} does not fit its config.json: {'; '.join(faults[:3])}{more}")
    module.load_state_dict(dict(tensors))


def load_checkpoint(path: Path) -> Checkpoint:
    """Load a checkpoint folder in fp32, in evaluation mode; raise :class:`CheckpointError` on any misfit."""
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: no checkpoint here (config.json is missing); train one with 'stiv train'")
    config = read_config(CheckpointConfig, path / "config.json")
    if config.model.text_width != config.text.width or config.model.latent_channels != config.vae.latent_channels:
        raise CheckpointError(f"{path}: the model's text width or latent channels differ from its text encoder or VAE")
    with torch.device("meta"):
        modules = (Stiv(config.model), TextEncoder(config.text), Vae(config.vae))
    for module, name in zip(modules, ("model", "text_encoder", "vae"), strict=True):
        source = path / f"{name}.safetensors"
        tensors = {key: tensor.float() for key, tensor in load_tensors(source).items()}
        module.to_empty(device="cpu")
        fill(module, tensors, source)
        module.eval().requires_grad_(False)
    model, text_encoder, vae = modules
    tokenizer = load_tokenizer(path / "tokenizer.json")
    return Checkpoint(config=config, model=model, text_encoder=text_encoder, vae=vae, tokenizer=tokenizer)


def checkpoint_hash(path: Path) -> str:
    """SHA-256 (hex) over the lines ``<sha256> <name>`` of the checkpoint's files."""
    digest = hashlib.sha256()
    for name in CHECKPOINT_FILES:
        with (path / name).open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {name}\n".encode())
    return digest.hexdigest()
