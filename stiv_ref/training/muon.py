"""Muon: steps of the blocks' matrices are turned to be orthogonal; everything else takes AdamW's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from stiv_deploy.stiv_ref.training.parallel import local, whole

MOMENTUM = 0.95
ITERATIONS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the odd polynomial of degree 5 that pulls singular values to about 1, from small ones fast."""
ADAM_SIZE = 0.2
"""Root mean square of a usual step of AdamW, by which one learning rate serves both (arXiv 2502.16982, section 2.2)."""
SMALLEST = 1e-7
"""Added to the norm of a gradient, so that one of zeros stays zero."""


def orthogonal(matrix: Tensor) -> Tensor:
    """``matrix`` fp32 [n, m] with its singular values pulled to 0.7 .. 1.2, by Newton-Schulz iterations in fp32."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (x.norm() + SMALLEST)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for ``matrices``, scaled to the size of AdamW's steps, and AdamW for ``others``.

    Weight decay is decoupled. Matrices may be sharded (FSDP2): each process gathers a step whole and takes its part.
    torch has a ``torch.optim.Muon``, for matrices alone and in bf16, which takes ten times longer on a CPU without it.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ) -> None:
        groups = [{"params": list(matrices), "turned": True}, {"params": list(others), "turned": False}]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    local(parameter.detach()).mul_(1 - group["lr"] * group["weight_decay"])
                    (self._turned_step if group["turned"] else self._adam_step)(parameter, parameter.grad, group)

    def _turned_step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
        update = orthogonal(whole(gradient + MOMENTUM * momentum, gradient.device))
        size = group["lr"] * ADAM_SIZE * max(update.shape) ** 0.5  # an orthogonal matrix has a mean square of 1 / max
        local(parameter.detach()).sub_(_part(update, parameter), alpha=size)

    def _adam_step(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=gradient.device)
            state["momentum"], state["variance"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        first, second = (1 - beta ** state["step"].item() for beta in group["betas"])
        momentum, variance, gradient = (local(each) for each in (state["momentum"], state["variance"], gradient))
        momentum.lerp_(gradient, 1 - group["betas"][0])
        variance.lerp_(gradient.square(), 1 - group["betas"][1])
        root = (variance / second).sqrt_().add_(group["eps"])
        local(parameter.detach()).addcdiv_(momentum, root, value=-group["lr"] / first)


def _part(update: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of ``update``, which all processes hold whole."""
    if not isinstance(parameter, DTensor):
        return update
    replicated = DTensor.from_local(update, parameter.device_mesh, [Replicate()])
    return local(replicated.redistribute(placements=parameter.placements))
