"""Self-attention by the fused operators: what :func:`fuse` puts into a model or a block in place of the plain form.

Parameters and results are the same in both. The fused form is for inference: it has no backward pass, and takes no
masked training.
"""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import RopeTables, SelfAttention, StivBlock, stateless_norm
from stiv_deploy.stiv_ref.errors import AttentionError
from stiv_deploy.stiv_ref.fused import operators
from stiv_deploy.stiv_ref.fused.launch import check_kernels, cuda_library

Module = TypeVar("Module", bound=nn.Module)


class FusedSpatial(SelfAttention):
    """Self-attention whose bias, QK-norm, RoPE and layout are one operator."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend within each row of ``x`` [N, S, D]; tables [S, Dh/2]; returns [N, S, D]."""
        if cos.dim() != 2:
            given = "x".join(str(size) for size in cos.shape)
            raise AttentionError(
                f"fused attention has one RoPE table for all rows, got a table for each ({given}): masked training "
                "needs a model without fuse()"
            )
        parameters = (None, self.q_norm.weight, self.k_norm.weight, cos, sin)
        q, k, v = operators.spatial_qkv(self.qkv(x), *parameters, self.heads)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, H, S, Dh)
        return self.out(y.transpose(1, 2).flatten(2))


class FusedTemporal(SelfAttention):
    """Self-attention over frames that is one operator, in the layout that a block has anyway."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over the frames of each position of ``x`` [B, T, S, D]; tables [T, Dh/2]; returns [B, T, S, D]."""
        parameters = (None, self.q_norm.weight, self.k_norm.weight, cos, sin)
        return self.out(operators.temporal_attention(self.qkv(x), *parameters, self.heads))


class FusedBlock(StivBlock):
    """A block with :class:`FusedTemporal`, which needs no transposition."""

    def over_frames(self, x: Tensor, rope: RopeTables) -> Tensor:
        """As :meth:`StivBlock.over_frames`."""
        return stateless_norm(self.temporal(x, rope.temporal_cos, rope.temporal_sin))


def fuse(module: Module) -> Module:
    """Put fused attention into every block of ``module`` (a model, or a block), in place, and return ``module``.

    Attention with an arithmetic of its own (quantized, causal) stays as it is. Raises :class:`AttentionError` or the
    library's ``KernelError`` if ``module`` is on a GPU and there are no kernels for it there; it is then as it was.
    Elsewhere fused attention computes with standard operators, and needs nothing.
    """
    blocks = [each for each in module.modules() if isinstance(each, StivBlock)]
    for block in blocks:
        _check(block)
    for block in blocks:
        _swap(block)
    return module


def _swap(block: StivBlock) -> None:
    if type(block.spatial) is SelfAttention:
        block.spatial.__class__ = FusedSpatial
    if type(block) is StivBlock and block.has_temporal and type(block.temporal) is SelfAttention:
        block.temporal.__class__, block.__class__ = FusedTemporal, FusedBlock


def _check(block: StivBlock) -> None:
    weight = block.spatial.qkv.weight
    if weight.is_cuda:
        check_kernels(block.spatial.q_norm.weight.numel(), weight.dtype)
        cuda_library()
