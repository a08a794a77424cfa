"""Weights at every door, of checkpoints and of states: safetensors, floating, finite."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stiv_deploy.stiv_ref.errors import CheckpointError

NAMED = 3
"""So many misfits are named."""
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that weights are read from."""


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise :class:`CheckpointError` if it is missing or damaged."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; ``OSError`` if that fails, for whatever reason."""
    try:
        save_file(dict(tensors), path, metadata)
    except SafetensorError as error:
        raise _os_error(str(error)) from None


def _os_error(said: str) -> OSError:
    """What safetensors ``said``, with the number of the system's error if it names one."""
    number = re.search(r"os error (\d+)", said)
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(said)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those of ``tensors`` that hold NaN or infinity."""
    return [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]


def check_finite(tensors: Mapping[str, Tensor], where: object, remedy: str = "give another checkpoint") -> None:
    """:class:`CheckpointError` naming ``where`` and the first of ``tensors`` that hold NaN or infinity."""
    if bad := not_finite(tensors):
        raise CheckpointError(f"{where}: NaN or infinity in {_some(bad, ', ')}; {remedy}")


def fill(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Load ``tensors``, of any type in :data:`FLOATING`, into ``module``.

    Raises :class:`CheckpointError` naming the first misfits, or the first that are not finite.
    """
    check_fit(module, tensors, source)
    check_finite(tensors, source)
    module.load_state_dict(dict(tensors))


def check_fit(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """:class:`CheckpointError` naming the first misfits of ``tensors`` and ``module``, which may be on meta."""
    wanted = module.state_dict()
    faults = [f"missing {name}" for name in wanted if name not in tensors]
    faults += [f"unexpected {name}" for name in tensors if name not in wanted]
    faults += [
        _misfit(name, tensor, wanted[name])
        for name, tensor in tensors.items()
        if name in wanted and (tensor.shape != wanted[name].shape or not _floats(tensor, wanted[name]))
    ]
    if faults:
        raise CheckpointError(f"{source} does not fit its config.json: {_some(faults, '; ')}")


def _floats(tensor: Tensor, wanted: Tensor) -> bool:
    """Whether ``tensor`` floats if ``wanted`` does."""
    return tensor.dtype in FLOATING or not wanted.is_floating_point()


def _misfit(name: str, tensor: Tensor, wanted: Tensor) -> str:
    if tensor.shape != wanted.shape:
        return f"{name} is {tuple(tensor.shape)}, the config wants {tuple(wanted.shape)}"
    types = ", ".join(str(each).removeprefix("torch.") for each in FLOATING)
    return f"{name} is of type {str(tensor.dtype).removeprefix('torch.')}, weights are of one of {types}"


def _some(names: list[str], between: str) -> str:
    return between.join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
