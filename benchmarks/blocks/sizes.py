"""The blocks that are measured: sizes, random weights of one block, and sets of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import MASKED, MODULATIONS, RopeTables, StivBlock
from stiv_deploy.stiv_ref.config import StivConfig, model_config
from stiv_deploy.stiv_ref.rope import spatial_table, temporal_table

LATENT = 8
"""Pixels of a latent, along each side."""
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, RopeTables]
"""What :class:`StivBlock` takes: x, modulation, text_k, text_v, text_mask, rope."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One block of the config ``model`` on ``batch`` square clips with ``text`` text tokens."""

    model: str
    frames: int = 20
    pixels: int = 256
    batch: int = 2
    text: int = 128

    @property
    def config(self) -> StivConfig:
        """The architecture; raises :class:`ConfigError` for an unknown name."""
        return model_config(self.model)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens of a frame."""
        side = self.pixels // (LATENT * self.config.patch[1])
        return side, side

    @property
    def token_frames(self) -> int:
        """T: frames of tokens."""
        return self.frames // self.config.patch[0]

    @property
    def positions(self) -> int:
        """S: tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """N = B * T * S."""
        return self.batch * self.token_frames * self.positions

    def __str__(self) -> str:
        return f"{self.model}, {self.frames} frames of {self.pixels} pixels, batch {self.batch}"


CASES = tuple(Case(model=model, pixels=pixels) for model in ("XL", "M") for pixels in (256, 512))
QUICK = (Case(model="XL"),)
DRY = (Case(model="tiny", frames=4, pixels=64, text=16),)
"""What a CPU runs: does the script work?"""


def new_block(config: StivConfig, device: torch.device, seed: int = 0) -> StivBlock:
    """A bf16 block with random weights in which every branch counts: no gate is near zero."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        block = StivBlock(config)
    block = block.to_empty(device=device).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if name == "temporal_gate" or "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.0, generator=generator)
        elif name.endswith("weight"):
            nn.init.xavier_uniform_(parameter, generator=generator)
        else:  # biases and the table of modulation
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return block.to(torch.bfloat16).eval()


def new_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Random bf16 inputs of ``case``; the last quarter of the text is padding."""
    config, generator = case.config, torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(torch.bfloat16)

    text = (case.batch, config.heads, case.text, config.head_dim)
    mask = torch.zeros(case.batch, 1, 1, case.text, dtype=torch.bfloat16, device=device)
    mask[..., -(case.text // 4) :] = MASKED
    tables = (
        *spatial_table(case.grid, config.head_dim, config.base_grid, config.rope_theta),
        *temporal_table(case.token_frames, config.head_dim, config.base_frames, config.rope_theta),
    )
    return (
        normal(case.batch, case.token_frames, case.positions, config.width),
        normal(case.batch, MODULATIONS, config.width),
        normal(*text),
        normal(*text),
        mask,
        RopeTables(*(table.to(device, torch.bfloat16) for table in tables)),
    )


def inputs_as(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The same numbers in ``dtype``."""
    x, modulation, text_k, text_v, mask, rope = inputs
    tensors = [each.to(dtype) for each in (x, modulation, text_k, text_v, mask)]
    return (*tensors, RopeTables(*(table.to(dtype) for table in rope)))  # type: ignore[return-value]
