"""Optimizers, their learning rate, and their moments by name."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from stiv_deploy.stiv_ref.recipe import Optimizer, Stage
from stiv_deploy.stiv_ref.training.adafactor import Adafactor
from stiv_deploy.stiv_ref.training.muon import Muon

Parameters = Mapping[str, nn.Parameter]


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over ``stage.warmup`` steps, then constant, or a cosine from the full rate to a tenth of it."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    progress = 0.0 if stage.schedule == "constant" else step / max(1, stage.steps)
    return stage.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def is_inner(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon turns the steps of ``parameter``: of matrices of the blocks, not of their tables."""
    return ".blocks." in name and name.endswith(".weight") and parameter.dim() == 2


def make_optimizer(settings: Optimizer, stage: Stage, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer of a stage, with all its moments allocated and zero."""
    optimizer: torch.optim.Optimizer
    if settings.name == "adafactor":
        optimizer = Adafactor(parameters.values(), stage.learning_rate, settings.decays, stage.weight_decay)
    elif settings.name == "muon":
        inner = {name: each for name, each in parameters.items() if is_inner(name, each)}
        optimizer = Muon(
            inner.values(),
            [each for name, each in parameters.items() if name not in inner],
            stage.learning_rate,
            betas=settings.decays,
            eps=settings.eps,
            weight_decay=stage.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=stage.learning_rate,
            betas=settings.decays,
            eps=settings.eps,
            weight_decay=stage.weight_decay,
            fused=True,
        )
    allocate(optimizer, parameters)
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use the learning rate ``rate`` from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def allocate(optimizer: torch.optim.Optimizer, parameters: Parameters) -> None:
    """Let the optimizer make its moments now, by a step of size zero, so that a state can be read into them."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    set_rate(optimizer, 0.0)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for moments in optimizer.state.values():
        for value in moments.values():
            value.zero_()


def moments(optimizer: torch.optim.Optimizer, parameters: Parameters) -> dict[str, Tensor]:
    """The optimizer's tensors as ``<moment>.<parameter>``; writing to them changes the optimizer."""
    return {
        f"{moment}.{name}": value
        for name, parameter in parameters.items()
        for moment, value in optimizer.state[parameter].items()
    }
