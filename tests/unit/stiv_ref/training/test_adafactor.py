"""Adafactor as the paper has it: its formula, and that it moves what starts at zero, also where it is sharded."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.training.adafactor import Adafactor

Array = NDArray[np.float64]
SHAPES = {"matrix": (5, 3), "vector": (4,), "tensor": (2, 3, 4), "tall": (16, 2), "wide": (2, 16), "row": (1, 7)}


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_formula(
    value: Array, gradients: list[Array], lr: float, betas: tuple[float, float], weight_decay: float
) -> Array:
    row = column = variance = momentum = 0.0
    for step, gradient in enumerate(gradients, 1):
        first, second = ((1 - beta) / (1 - beta**step) for beta in betas)
        square = gradient**2 + 1e-30
        if gradient.ndim > 1:
            flat = square.reshape(-1, square.shape[-1])
            row = row + second * (flat.mean(1, keepdims=True) - row)
            column = column + second * (flat.mean(0, keepdims=True) - column)
            variance = (row @ column / row.mean()).reshape(square.shape)
        else:
            variance = variance + second * (square - variance)
        update = gradient / np.sqrt(variance)
        update = lr * update / max(1.0, float(np.sqrt((update**2).mean())))
        momentum = momentum + first * (update - momentum)
        value = value * (1 - lr * weight_decay) - momentum
    return value


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.5)])
def test_steps_are_those_of_the_formula(shape: tuple[int, ...], betas: tuple[float, float]) -> None:
    parameter = nn.Parameter(normal(shape, 0))
    begun = parameter.detach().double().numpy().copy()
    optimizer = Adafactor([parameter], 0.1, betas, 0.2)
    gradients = [normal(shape, seed) * 10.0**seed for seed in range(1, 5)]
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    wanted = by_formula(begun, [each.double().numpy() for each in gradients], 0.1, betas, 0.2)
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, rtol=1e-5, atol=1e-5)


def test_a_step_is_at_most_the_learning_rate_large() -> None:
    """By the clipping of the update, however much larger than all before the gradient is."""
    parameter = nn.Parameter(torch.zeros(8, 8))
    optimizer = Adafactor([parameter], 0.01, (0.0, 0.999), 0.0)
    for factor in (1.0, 1.0, 1e6):
        before = parameter.detach().clone()
        parameter.grad = factor * normal((8, 8), 3)
        optimizer.step()
    assert (parameter.detach() - before).square().mean().sqrt().item() == pytest.approx(0.01, rel=1e-4)


def test_parameters_without_a_gradient_stay() -> None:
    still, moved = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Adafactor([still, moved], 0.1, (0.9, 0.999), 0.5)
    moved.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(still, torch.ones(2))
    assert (moved < 1).all()
    assert list(optimizer.state) == [moved]


def gate_after(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int) -> float:
    """Mean gate of a block after it was trained toward itself with its temporal branch open; it starts closed."""
    config = StivConfig(name="x", blocks=1, width=16, heads=2, text_width=4, frequency_width=4)
    torch.manual_seed(0)
    model = Stiv(config).initialize(torch.Generator().manual_seed(0))
    block, rope = model.blocks[0], model.rope_tables((2, 3, 4, 4, 4))
    text, mask = model.text_kv(normal((2, 3, 4), 1)), torch.zeros(2, 1, 1, 3)
    given = (normal((2, 3, 4, 16), 2), normal((2, 6, 16), 3), text.k[0].detach(), text.v[0].detach(), mask, rope)
    teacher = copy.deepcopy(block)
    nn.init.ones_(teacher.temporal_gate)
    wanted, optimizer = teacher(*given).detach(), make(list(block.parameters()))
    for _ in range(steps):
        optimizer.zero_grad()
        (block(*given) - wanted).square().mean().backward()
        optimizer.step()
    return block.temporal_gate.mean().item()


def test_gates_that_start_at_zero_learn_and_starve_where_steps_are_scaled_by_size() -> None:
    """torch's Adafactor scales every step by the parameter's size, at least 1e-3: a closed gate stays closed."""
    steps, lr = 40, 0.01
    ours = gate_after(lambda parameters: Adafactor(parameters, lr, (0.9, 0.999), 0.0), steps)
    adamw = gate_after(lambda parameters: torch.optim.AdamW(parameters, lr, (0.9, 0.999), weight_decay=0.0), steps)
    scaled = gate_after(lambda parameters: torch.optim.Adafactor(parameters, lr), steps)
    assert ours > 0.5 * adamw > 0.1
    assert abs(scaled) < 2 * steps * lr * 1e-3 < 0.01 * ours


@pytest.mark.parametrize("shape", [(5, 3), (4,)])
def test_sharded_parameters_have_sharded_moments_and_take_the_same_steps(
    mesh: DeviceMesh, shape: tuple[int, ...]
) -> None:
    whole = nn.Parameter(normal(shape, 0))
    sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    optimizers = [Adafactor([each], 0.1, (0.9, 0.999), 0.1) for each in (whole, sharded)]
    for seed in range(1, 4):
        whole.grad = normal(shape, seed)
        sharded.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(sharded.full_tensor(), whole)
    state = optimizers[1].state[sharded]
    assert {name for name, value in state.items() if isinstance(value, DTensor)} == {
        "momentum",
        *(["row"] if len(shape) > 1 else ["variance"]),
    }
    assert all(value.placements == (Shard(0),) for value in state.values() if isinstance(value, DTensor))
