"""Optimizers, their learning rate, and their moments by name."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stiv_deploy.stiv_ref.recipe import Optimizer, Stage
from stiv_deploy.stiv_ref.training.parallel import keep_part, whole

Parameters = Mapping[str, nn.Parameter]


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over ``stage.warmup`` steps, then constant, or a cosine from the full rate to a tenth of it."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    progress = 0.0 if stage.schedule == "constant" else step / max(1, stage.steps)
    return stage.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def make_optimizer(settings: Optimizer, stage: Stage, parameters: Parameters) -> torch.optim.Optimizer:
    """The optimizer of a stage, with all its moments allocated and zero.

    Adafactor (arXiv 1804.04235, the paper's) is torch's, not that of transformers: it is kept with the library that
    also keeps the checkpoints, decouples weight decay, and reads a learning rate as every other optimizer does (that of
    transformers wants four flags set together for it). Both scale the rate by the size of each parameter.
    """
    optimizer: torch.optim.Optimizer
    if settings.name == "adafactor":
        sharded = any(isinstance(parameter, DTensor) for parameter in parameters.values())
        kind = GatheredAdafactor if sharded else torch.optim.Adafactor
        optimizer = kind(list(parameters.values()), lr=stage.learning_rate, weight_decay=stage.weight_decay)
    else:
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=stage.learning_rate,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=stage.weight_decay,
            fused=True,
        )
    allocate(optimizer, parameters)
    return optimizer


class GatheredAdafactor(torch.optim.Optimizer):
    """torch's Adafactor for sharded parameters: it sums rows and columns of whole matrices, so they are gathered.

    One parameter and its gradient at a time, in every process, which keeps its own part of the new value. The moments
    are whole everywhere; they are small, that is what Adafactor is for. All processes must step together.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})
        self._stand_ins = {parameter: nn.Parameter(torch.empty(0)) for parameter in parameters}
        self._adafactor = torch.optim.Adafactor(self._stand_ins.values(), lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        self._adafactor.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        for parameter, stand_in in self._stand_ins.items():
            if parameter.grad is None:
                continue
            stand_in.data = whole(parameter.detach(), parameter.device)
            stand_in.grad = whole(parameter.grad, parameter.device)
            self._adafactor.step()  # the other stand-ins have no gradient
            self.state[parameter] = self._adafactor.state[stand_in]
            keep_part(parameter, stand_in.data)
            stand_in.grad, stand_in.data = None, torch.empty(0)


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
