"""Adafactor as STIV is trained with it: a first moment, and steps that do not look at the size of what they change."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from stiv_deploy.stiv_ref.training.parallel import local

EPSILON = 1e-30
"""Added to squared gradients, as in arXiv 1804.04235, so that what had none so far can be divided by."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor (arXiv 1804.04235) by the choices of STIV (arXiv 2412.07730, appendix B) and of axlearn, its library.

    The second moment of a matrix is kept as means of its rows and columns; a step's root mean square is at most the
    learning rate; ``betas`` are the decays of both moments, corrected for their start at zero (whether the paper does
    so is not said; after its warm-up it makes no difference). The step is *not* scaled by the size of the parameter:
    with that scaling, which :class:`torch.optim.Adafactor` always has, everything that starts at zero, gates and head,
    starves (``benchmarks/optimizers.py``). Weight decay is decoupled.

    Parameters may be sharded along their first axis (FSDP2): rows and first moment are then sharded as they are, sums
    go over all processes, which must step together. That is why it is here: timm's ``AdafactorBigVision`` and
    pytorch-optimizer's ``AdaFactor`` have the same choices, but put whole tensors beside sharded ones.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["betas"], group["weight_decay"])

    def _move(self, parameter: nn.Parameter, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_moments(parameter.detach()))
        state["step"] += 1
        first, second = ((1 - beta) / (1 - beta ** state["step"]) for beta in betas)
        assert parameter.grad is not None
        gradient = local(parameter.grad)
        update = gradient * _inverse_root(state, gradient.square() + EPSILON, second, parameter)
        mean_square = _total(update.square().sum(), parameter) / parameter.numel()
        momentum = local(state["momentum"])
        momentum.lerp_(update * (lr / mean_square.sqrt().clamp_min(1)), first)
        local(parameter.detach()).mul_(1 - lr * weight_decay).sub_(momentum)


def _moments(value: Tensor) -> dict[str, Tensor]:
    """All moments of the parameter ``value`` [..., m] at zero: ``row`` [..., 1], ``column`` [1, m], ``momentum``."""
    begun = {"step": torch.zeros((), device=value.device), "momentum": torch.zeros_like(value)}
    if value.dim() < 2:
        return begun | {"variance": torch.zeros_like(value)}
    column = torch.zeros(1, value.shape[-1], device=value.device)
    return begun | {"row": torch.zeros_like(value.sum(-1, keepdim=True)), "column": column}


def _inverse_root(state: dict[str, Tensor], square: Tensor, weight: Tensor, parameter: nn.Parameter) -> Tensor:
    """1 / root of the second moment after ``square``, this process's part of the squared gradient, went into it."""
    if "variance" in state:
        return local(state["variance"]).lerp_(square, weight).rsqrt()
    rows = parameter.numel() // parameter.shape[-1]
    row = local(state["row"]).lerp_(square.mean(-1, keepdim=True), weight)
    sums = _total(torch.cat((square.flatten(0, -2).sum(0), row.sum()[None])), parameter)
    column = state["column"].lerp_(sums[None, :-1] / rows, weight)
    return (row / (sums[-1] / rows)).rsqrt() * column.rsqrt()


def _total(values: Tensor, parameter: nn.Parameter) -> Tensor:
    """The sum of ``values`` over all processes that ``parameter`` is sharded over."""
    if isinstance(parameter, DTensor):
        dist.all_reduce(values, group=parameter.device_mesh.get_group())
    return values
