"""Muon: its turned steps against singular value decompositions in fp64, the rest against AdamW, whole and sharded."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import Optimizer, Recipe
from stiv_deploy.stiv_ref.training.muon import Muon, orthogonal
from stiv_deploy.stiv_ref.training.optimizer import is_inner, make_optimizer

Array = NDArray[np.float64]


def normal(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pulled(values: Array) -> Array:
    """Singular values after five iterations of the polynomial, from those of a matrix of norm 1."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def by_formula(value: Array, gradients: list[Array], lr: float, weight_decay: float) -> Array:
    momentum = np.zeros_like(value)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        u, s, v = np.linalg.svd(gradient + 0.95 * momentum, full_matrices=False)
        update = (u * pulled(s / np.linalg.norm(s))) @ v
        value = value * (1 - lr * weight_decay) - lr * 0.2 * max(value.shape) ** 0.5 * update
    return value


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_singular_values_are_pulled_to_one_and_nothing_is_turned_otherwise(rows: int, columns: int, seed: int) -> None:
    matrix = normal((rows, columns), seed)
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    found = orthogonal(matrix).double().numpy()
    np.testing.assert_allclose(found, (u * pulled(s / np.linalg.norm(s))) @ v, atol=2e-4)
    assert found.shape == (rows, columns)


def test_a_usual_matrix_becomes_nearly_orthogonal_and_zero_stays() -> None:
    values = torch.linalg.svdvals(orthogonal(normal((32, 128), 0)))
    assert 0.6 < values.min() < values.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(5, 3), (3, 7), (4, 4)])
def test_steps_are_those_of_the_formula(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(normal(shape, 0))
    begun = parameter.detach().double().numpy().copy()
    optimizer = Muon([parameter], [], 0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.2)
    gradients = [normal(shape, seed) for seed in range(1, 5)]
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    wanted = by_formula(begun, [each.double().numpy() for each in gradients], 0.1, 0.2)
    np.testing.assert_allclose(parameter.detach().numpy(), wanted, atol=2e-4)


def test_a_step_has_the_size_of_adamws() -> None:
    parameter = nn.Parameter(torch.zeros(48, 96))
    parameter.grad = normal((48, 96), 1) * 1e-3
    Muon([parameter], [], 0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_all_else_takes_the_steps_of_adamw() -> None:
    ours, theirs = (nn.Parameter(normal((3, 4), 0)) for _ in range(2))
    settings = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}
    optimizers = Muon([], [ours], 0.3, **settings), torch.optim.AdamW([theirs], 0.3, **settings)  # type: ignore[arg-type]
    for seed in range(1, 4):
        ours.grad, theirs.grad = normal((3, 4), seed), normal((3, 4), seed)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_stay() -> None:
    still, also = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = Muon([still], [also], 0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(also, torch.ones(2))
    assert not optimizer.state


def test_it_turns_the_matrices_of_the_blocks(recipe: Recipe) -> None:
    config = StivConfig(name="x", blocks=1, width=16, heads=2, text_width=4, frequency_width=4)
    parameters = {f"model.{name}": each for name, each in Stiv(config).initialize().named_parameters()}
    turned = {name.removeprefix("model.blocks.0.") for name, each in parameters.items() if is_inner(name, each)}
    assert turned == {
        "spatial.qkv.weight", "spatial.out.weight", "temporal.qkv.weight", "temporal.out.weight",
        "cross.q.weight", "cross.kv.weight", "cross.out.weight", "ffn.up.weight", "ffn.down.weight",
    }  # fmt: skip
    optimizer = make_optimizer(Optimizer(name="muon"), recipe.stages[0], parameters)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(turned), len(parameters) - len(turned)]


@pytest.mark.parametrize("turned", [True, False])
def test_sharded_parameters_have_sharded_moments_and_take_the_same_steps(mesh: DeviceMesh, turned: bool) -> None:
    whole = nn.Parameter(normal((5, 3), 0))
    sharded = nn.Parameter(distribute_tensor(whole.detach().clone(), mesh, [Shard(0)]))
    lists = [([each], []) if turned else ([], [each]) for each in (whole, sharded)]
    optimizers = [Muon(*each, 0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1) for each in lists]
    for seed in range(1, 4):
        whole.grad = normal((5, 3), seed)
        sharded.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(sharded.full_tensor(), whole)
    state = optimizers[1].state[sharded]
    assert {name for name, value in state.items() if isinstance(value, DTensor)} == set(state) - {"step"}
