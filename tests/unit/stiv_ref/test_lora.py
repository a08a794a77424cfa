"""Factors beside a frozen linear."""

import torch
from torch import nn

from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.lora import LoraLinear, LoraSettings, attach, is_factor, target_names
from stiv_deploy.stiv_ref.model import Stiv


def test_a_linear_with_factors() -> None:
    """Against the formula in float64; at first it is the linear itself."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 3).double()
    adapted = LoraLinear(linear, LoraSettings(rank=2, alpha=6.0))
    adapted.initialize(generator)
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(adapted(x), linear(x))
    assert 0 < adapted.lora_A.weight.abs().max() <= 5**-0.5
    adapted.lora_B.weight.data.normal_(generator=generator)
    weight = linear.weight + 6 / 2 * adapted.lora_B.weight @ adapted.lora_A.weight
    torch.testing.assert_close(adapted(x), x @ weight.T + linear.bias, rtol=1e-13, atol=1e-13)
    adapted(x).sum().backward()
    assert {name: each.grad is not None for name, each in adapted.named_parameters()} == {
        "weight": False, "bias": False, "lora_A.weight": True, "lora_B.weight": True
    }  # fmt: skip


def test_targets_are_named_by_their_ends() -> None:
    with torch.device("meta"):
        model = Stiv(StivConfig(name="s", blocks=2, width=32, heads=2, text_width=24))
    per_block = ("spatial.qkv", "spatial.out", "temporal.qkv", "temporal.out", "cross.q", "cross.kv", "cross.out")
    every = {f"blocks.{number}.{name}" for number in (0, 1) for name in (*per_block, "ffn.up", "ffn.down")}
    assert set(target_names(model, LoraSettings())) == every
    some = target_names(model, LoraSettings(targets=("cross.q", "blocks.1.ffn.up", "head.out")))
    assert some == ["blocks.0.cross.q", "blocks.1.cross.q", "blocks.1.ffn.up", "head.out"]
    names = dict(attach(model, LoraSettings(rank=3, targets=("qkv",))).named_parameters())
    trained = {name for name, each in names.items() if each.requires_grad}
    assert trained == {name for name in names if is_factor(name)}
    assert len(trained) == 2 * 2 * 2
