"""What passes between modules of the reference, and that forcing it keeps an error where it is made."""

import torch

from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.parity.oracle import Oracle
from stiv_deploy.export.parity.traffic import Forced, leaves_of, root_of, traffic
from stiv_deploy.stiv_ref.checkpoint import Checkpoint


def head_inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    generator, width = torch.Generator().manual_seed(0), model_facts(checkpoint.config).width
    sizes = {"x": (1, 2, 4, width), "condition": (1, width), "model_input": (1, 2, 4, 4, 4)}
    return {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}


def test_leaves_are_the_modules_without_children_by_their_names_in_the_graph(micro: Checkpoint) -> None:
    oracle = Oracle(micro, torch.float64)
    leaves = leaves_of(root_of(oracle, "block_01"))
    assert {"spatial.qkv", "spatial.q_norm", "ffn.down"} <= set(leaves)
    assert "spatial" not in leaves
    assert "head.out" in leaves_of(root_of(oracle, "head"))
    assert leaves_of(root_of(oracle, "step")) == []


def test_traffic_is_what_a_module_gets_and_gives(micro: Checkpoint) -> None:
    oracle, given = Oracle(micro, torch.float64), head_inputs(micro)
    seen = traffic(oracle, "head", given, ["head.out"])
    linear = oracle.model.head.out
    assert torch.equal(seen.leaving["head.out"], linear(seen.entering["head.out"]))
    assert seen.calls["head.out"] == 1
    assert torch.equal(seen.outputs["velocity"], oracle.run("head", given)["velocity"])
    assert not linear._forward_hooks
    assert not linear._forward_pre_hooks


def test_forced_values_stop_an_error_and_what_a_module_gives_itself_is_seen(micro: Checkpoint) -> None:
    oracle, given = Oracle(micro, torch.float64), head_inputs(micro)
    right = traffic(oracle, "head", given, ["head.out"])
    forced = {"head.out": Forced(right.entering["head.out"], right.leaving["head.out"])}
    with torch.no_grad():
        oracle.model.head.table.mul_(2)  # an error before the linear
    wrong = traffic(oracle, "head", given, ["head.out"], forced)
    assert not torch.allclose(wrong.entering["head.out"], right.entering["head.out"])
    assert torch.equal(wrong.leaving["head.out"], right.leaving["head.out"])
    with torch.no_grad():
        oracle.model.head.out.weight.mul_(2)  # and one in it
    wrong = traffic(oracle, "head", given, ["head.out"], forced)
    assert not torch.allclose(wrong.leaving["head.out"], right.leaving["head.out"])
    assert torch.equal(wrong.outputs["velocity"], right.outputs["velocity"])
