"""Blocks that keep less for the backward pass, and blocks that are compiled: equal numbers in less memory or time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as recomputed

from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import Efficiency

ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""What ``scaled_dot_product_attention`` becomes, on GPUs and on CPUs."""
QKV = 3


def keep_self_attention(_context: object, operator: object, *args: object, **kwargs: object) -> CheckpointPolicy:
    """What the paper keeps (arXiv 2412.07730, appendix B): results of self-attention, the one without a mask.

    They are the dearest to compute again and the smallest to keep: as large as the tokens, in the type of the products.
    """
    tensors = sum(isinstance(value, Tensor) for value in (*args, *kwargs.values()))
    own = operator in ATTENTION and tensors == QKV
    return CheckpointPolicy.MUST_SAVE if own else CheckpointPolicy.PREFER_RECOMPUTE


def make_efficient(model: Stiv, settings: Efficiency) -> None:
    """Recompute the activations of each block in the backward pass, and compile each block, if asked for."""
    for block in model.blocks:
        block.forward = efficient(block.forward, settings)


def efficient(forward: Callable[..., Any], settings: Efficiency) -> Callable[..., Any]:
    """``forward`` of a block with the same results.

    What is recomputed whole is the compiled block: the other way round torch would compile nothing, and not say so.
    What is kept of it can be chosen inside a block only, so there the recomputation is what is compiled.
    """
    if settings.activation_checkpointing == "attention":
        keeping = partial(create_selective_checkpoint_contexts, keep_self_attention)
        forward = _recomputing(forward, context_fn=keeping)
    if settings.compile:
        forward = torch.compile(forward)
    return _recomputing(forward) if settings.activation_checkpointing == "blocks" else forward


def _recomputing(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return recomputed(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)

    return call
