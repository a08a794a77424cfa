"""Exponential moving averages of the trained parameters (the paper's EMA): the weights that a stage results in."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from stiv_deploy.stiv_ref.training.parallel import local

Averages = dict[str, Tensor]


def start_averages(parameters: Mapping[str, nn.Parameter], where: Literal["model", "cpu"]) -> Averages:
    """Averages that begin at the parameters; sharded as they are, beside them or in CPU memory."""
    copies = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    return {name: copy.cpu() for name, copy in copies.items()} if where == "cpu" else copies


@torch.no_grad()
def update_averages(averages: Averages, parameters: Mapping[str, nn.Parameter], decay: float, step: int) -> None:
    """Move ``averages`` toward the parameters after ``step`` (from 0).

    The decay ramps up to ``decay``, so that a short run is not stuck at its start.
    """
    ramped = min(decay, (1 + step) / (10 + step))
    own = [local(average) for average in averages.values()]
    new = [local(parameters[name].detach()).to(own[index].device) for index, name in enumerate(averages)]
    torch._foreach_lerp_(own, new, 1 - ramped)
