"""One block of a large model with random weights, and everything around it: a checkpoint like any other."""

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointConfig, SamplingDefaults
from stiv_deploy.stiv_ref.config import model_config
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, load_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

Module = TypeVar("Module", bound=nn.Module)
TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "tiny" / "tokenizer.json"
SPREAD = 0.02
"""Standard deviation of what is added to every parameter: some start at zero and have no range to calibrate."""


def one_block_checkpoint(name: str, frames: int, size: int, seed: int = 0) -> Checkpoint:
    """The model called ``name`` cut to one block, for square clips of ``frames`` frames, ``size`` pixels wide.

    Text encoder and VAE (8 pixels a latent) are small stand-ins. Raises :class:`ConfigError` for an unknown name.
    """
    model = model_config(name).model_copy(update={"blocks": 1})
    tokenizer = load_tokenizer(TOKENIZER)
    heads = max(1, model.text_width // (64 if model.text_width % 64 == 0 else 32))  # engines have kernels for these
    text = TextConfig(vocabulary=tokenizer.get_vocab_size(), width=model.text_width, heads=heads, layers=1)
    vae = VaeConfig(latent_channels=model.latent_channels, channels=(8, 16, 16))
    sampling = SamplingDefaults(frames=frames, height=size, width=size, steps=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        parts = (Stiv(model).initialize(generator), TextEncoder(text).initialize(generator), Vae(vae))
    return Checkpoint(
        config=CheckpointConfig(model=model, text=text, vae=vae, sampling=sampling),
        model=shaken(parts[0], generator),
        text_encoder=shaken(parts[1], generator),
        vae=shaken(parts[2], generator),
        tokenizer=tokenizer,
    )


@torch.no_grad()
def shaken(module: Module, generator: torch.Generator) -> Module:
    """``module`` in evaluation mode, every parameter moved a little."""
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=SPREAD)
    return module.eval().requires_grad_(False)
