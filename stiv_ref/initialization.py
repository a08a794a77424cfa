"""Progressive initialization: a model that starts from others of the recipe (arXiv 2412.07730, section 3.3).

A high-resolution video model takes its spatial weights from the high-resolution image model and its temporal weights
from the low-resolution video model. Grids and lengths need no new weights, RoPE positions are interpolated. When the
temporal patch grows, the patch embedding is *inflated* so that a still clip gives what the image gave.
"""

import torch
from torch import Tensor

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.model import Stiv

SAME = (
    "width",
    "heads",
    "latent_channels",
    "text_width",
    "mlp_ratio",
    "frequency_width",
    "rope_theta",
    "cross_qk_norm",
)
"""What models must have in common to take weights from each other."""


def is_temporal(name: str) -> bool:
    """Whether the parameter ``name`` belongs to temporal attention or the places of frames."""
    return ".temporal" in name or name.startswith("frame_position.")


def reads_text(name: str) -> bool:
    """Whether the parameter ``name`` belongs to cross-attention or to what the text goes through before it."""
    return ".cross." in name or name.startswith(("text_in.", "text_out.", "singleton.pooled."))


def _patch_frames(weight: Tensor, old: int, new: int) -> Tensor:
    """Inputs (or outputs) of one patch [pt * n, D] for another number of frames: each new frame is the mean of all."""
    frames = weight.unflatten(0, (old, -1))
    return frames.mean(0, keepdim=True).repeat(new, *[1] * (frames.dim() - 1)).flatten(0, 1)


def inflate(name: str, weight: Tensor, source: StivConfig, target: StivConfig) -> Tensor:
    """``weight`` of the parameter ``name`` for the temporal patch of ``target``.

    The patch embedding is spread over the frames of the new patch, each with its share, so that equal frames give the
    sum that they gave before; the head gives every frame what the (mean) frame had.
    """
    old, new = source.patch[0], target.patch[0]
    if old == new or name not in ("patch.weight", "head.out.weight", "head.out.bias"):
        return weight
    if name == "patch.weight":
        return _patch_frames(weight.T * (old / new), old, new).T.contiguous()
    return _patch_frames(weight, old, new)


def check_fits(source: StivConfig, target: StivConfig, what: str) -> None:
    """:class:`CheckpointError` unless a model of ``target`` can take the weights of one of ``source``."""
    for field in SAME:
        theirs, ours = getattr(source, field), getattr(target, field)
        if theirs != ours:
            raise CheckpointError(
                f"{what}: its {field} is {theirs}, the stage's model has {ours}; choose another origin"
            )
    _check_student(source, target, what)
    if source.patch[1] != target.patch[1]:
        raise CheckpointError(
            f"{what}: its spatial patch is {source.patch[1]}, the stage's model has {target.patch[1]}"
        )
    if source.blocks - source.full_blocks != target.blocks - target.full_blocks or source.blocks > target.blocks:
        raise CheckpointError(
            f"{what}: it has {source.blocks} blocks ({source.full_blocks} of them full_blocks), the stage's model "
            f"{target.blocks} ({target.full_blocks}); main blocks must be equal in number"
        )


def _check_student(source: StivConfig, target: StivConfig, what: str) -> None:
    """:class:`CheckpointError` unless ``source`` is what a model of ``target`` is to learn from."""
    there, wanted = source.student, target.teacher.student
    if there == wanted:
        return
    if wanted is None or (there is not None and there.flow_map):
        kind = "a flow map" if there is not None and there.flow_map else "a student, its guidance is distilled"
        raise CheckpointError(f"{what}: it is {kind} already; name what it was made from")
    if there is None:
        raise CheckpointError(f'{what}: its guidance takes rows of its own; distill it first (distill = "guidance")')
    raise CheckpointError(f"{what}: its guidance scales are {there.scales}, the stage has {wanted.scales}")


@torch.no_grad()
def initialize_from(
    target: Stiv, spatial: Stiv, temporal: Stiv | None = None, *, text_with_temporal: bool = False
) -> list[str]:
    """Fill the initialized ``target`` with the spatial weights of ``spatial`` and the temporal ones of ``temporal``.

    What reads the text counts as spatial, unless ``text_with_temporal``: where the image model's captions lack the
    words of motion, only the video model's cross-attention has read them (benchmarks/results/studies). Without
    ``temporal``, ``spatial`` gives its temporal weights too, if it has any. What none of them has stays as it is: new
    temporal attention has a zero gate, so that the video model begins as the image model. Returns the names of the
    parameters that were filled. Raises :class:`CheckpointError` if the architectures differ.
    """
    origins = ((spatial, "the origin of spatial weights"), (temporal or spatial, "the origin of temporal weights"))
    for origin, what in origins:
        check_fits(origin.config, target.config, what)
    own, filled = target.state_dict(), []
    for (origin, _), wanted in zip(origins, (False, True), strict=True):
        for name, weight in origin.state_dict().items():
            late = is_temporal(name) or (text_with_temporal and reads_text(name))
            if late == wanted and name in own:
                own[name].copy_(inflate(name, weight, origin.config, target.config))
                filled.append(name)
    return filled
