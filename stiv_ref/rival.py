"""The reference as a baseline of measurements: prompts and seeds in, frames out, eager or by ``torch.compile``.

``stiv bench against`` runs it in a process of its own, by its name: the runtime imports nothing of this.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointFolder, load_checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.guidance import GuidanceMode, Unseen
from stiv_deploy.stiv_ref.sampler import SamplingSettings, Solver, sample

Clips = Callable[[Sequence[str], Sequence[int]], np.ndarray]
"""Makes a clip for each prompt and seed: frames uint8 [B, F, H, W, 3]."""


def rival(order: Mapping[str, Any]) -> Clips:
    """The reference in the way that ``order`` says.

    ``checkpoint`` is a folder, or None for the one in the folder ``checkpoints`` with the hash ``sha256``, which it has
    to have; ``device`` is torch's name; ``precision`` the type of transformer and text encoder (the VAE's is fp32);
    ``threads`` of the CPU; ``compile``, whether ``torch.compile`` gets the transformer and the decoder, whole;
    ``settings`` are fields of :class:`SamplingSettings`; ``frames`` of a clip. Raises :class:`CheckpointError`.
    """
    torch.set_num_threads(order["threads"])
    folder = _found(order)
    if folder.sha256 != order["sha256"]:
        raise CheckpointError(f"{folder.path} is not what the bundle was exported from; give its --checkpoint")
    checkpoint, device = load_checkpoint(folder.path), torch.device(order["device"])
    checkpoint.model.to(device, getattr(torch, order["precision"]))
    checkpoint.text_encoder.to(device, getattr(torch, order["precision"]))
    checkpoint.vae.to(device)
    decode = torch.compile(checkpoint.vae.decode) if order["compile"] else checkpoint.vae.decode
    if order["compile"]:
        checkpoint.model.compile()
    return _clips(checkpoint, settings_of(order["settings"]), order["frames"], decode)


def settings_of(values: Mapping[str, Any]) -> SamplingSettings:
    """Settings from plain values by name, of all fields."""
    chosen: dict[str, Any] = {
        **values,
        "guidance_mode": GuidanceMode(values["guidance_mode"]),
        "solver": Solver(values["solver"]),
        "unseen": Unseen(values["unseen"]),
    }
    return SamplingSettings(**chosen)


def _found(order: Mapping[str, Any]) -> CheckpointFolder:
    if order["checkpoint"] is not None:
        return open_checkpoint(Path(order["checkpoint"]))
    for path in sorted(Path(order["checkpoints"]).glob("*/config.json")):
        folder = open_checkpoint(path.parent)
        if folder.sha256 == order["sha256"]:
            return folder
    raise CheckpointError(
        f"no folder in {order['checkpoints']} is the checkpoint that the bundle was exported from; give --checkpoint"
    )


def _clips(checkpoint: Checkpoint, settings: SamplingSettings, frames: int, decode: Callable[..., Any]) -> Clips:
    @torch.inference_mode()
    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        inputs = sampling_inputs(checkpoint, prompts, seeds, None, frames=frames)
        video = decode(sample(checkpoint.model, inputs, settings))
        pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return pixels.permute(0, 1, 3, 4, 2).cpu().numpy()

    return make
