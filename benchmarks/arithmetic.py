"""Floating-point operations of a model's evaluation, as PyTorch counts them: matrix products and attention."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import MICRO_VALUES, Stiv


class Operations(NamedTuple):
    """Of one evaluation: in all blocks, and at both ends (``embed`` and ``head``)."""

    blocks: int
    ends: int

    @property
    def total(self) -> int:
        """All."""
        return self.blocks + self.ends


def flops(work: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products in ``work``; a multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@torch.no_grad()
def stiv_operations(config: StivConfig, latents_shape: tuple[int, ...], text_tokens: int) -> Operations:
    """Operations of one row of STIV: latents [T, C, h, w]; keys and values of the text are there already."""
    with torch.device("meta"):
        model = Stiv(config)
        latents, row = torch.empty(1, *latents_shape), torch.empty(1)
        states, pooled = torch.empty(1, text_tokens, config.text_width), torch.empty(1, config.text_width)
        micro, mask = torch.empty(1, MICRO_VALUES), torch.empty(1, 1, 1, text_tokens)
    rope, text = model.rope_tables(tuple(latents.shape)), model.text_kv(states)
    x, modulation, condition = model.embed(latents, row, micro, pooled, rope)
    ends = flops(lambda: model.embed(latents, row, micro, pooled, rope)) + flops(lambda: model.head(x, condition))
    block = flops(lambda: model.blocks[0](x, modulation, text.k[0], text.v[0], mask, rope))
    return Operations(blocks=config.blocks * block, ends=ends)
