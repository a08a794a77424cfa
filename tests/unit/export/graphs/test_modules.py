import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stiv_deploy.export.graphs.modules import graph_modules, model_facts, part
from stiv_deploy.runtime.bundle.contract import dimensions, graph_specs, late_inputs
from stiv_deploy.stiv_ref.block import additive_mask
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import Student

STUDENT = Student(guidance=(2.0, 6.0))
FLOW_MAP = Student(guidance=(2.0, 6.0), flow_map=True)


@pytest.mark.parametrize("student", [None, STUDENT, FLOW_MAP])
def test_forward_takes_the_contracts_inputs_in_order(
    micro: Checkpoint, make_checkpoint: Callable[..., Checkpoint], student: Student | None
) -> None:
    """Those of a graph that has more of them in other models come last, and are optional."""
    checkpoint = make_checkpoint(micro.config.model.model_copy(update={"student": student}))
    specs = graph_specs(model_facts(checkpoint.config), "float32")
    modules = graph_modules(checkpoint)
    assert list(modules) == list(specs)
    for name, module in modules.items():
        inputs = [tensor.name for tensor in specs[name].inputs]
        names = list(inspect.signature(module.forward).parameters.values())
        assert [each.name for each in names[: len(inputs)]] == inputs
        assert all(each.default is None for each in names[len(inputs) :])


def test_facts_come_from_all_three_configs(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    assert (facts.blocks, facts.width, facts.head_dim) == (2, 32, 16)
    assert (facts.max_text_tokens, facts.spatial_factor, facts.temporal_factor) == (8, 4, 1)
    assert facts.pixel_multiple == 8


def run_graphs(
    modules: dict[str, nn.Module], checkpoint: Checkpoint, latents: Tensor, ids: Tensor, mask: Tensor
) -> Tensor:
    """One model call through the graphs, as the runtime chains them."""
    micro = torch.tensor([[32.0, 32, 0, 0, 1, 3]]).repeat(len(latents), 1)
    timestep = torch.linspace(0.1, 0.9, len(latents))
    states, pooled = modules["text_encoder"](ids, mask)
    text_k, text_v = modules["text_kv"](states)
    rope = checkpoint.model.rope_tables(latents.shape)
    tables = rope if checkpoint.config.model.temporal else rope[:2]
    x, modulation, condition = modules["embed"](
        latents, timestep, micro, pooled, *tables, *late_of(checkpoint).values()
    )
    for index in range(checkpoint.config.model.blocks):
        block = modules[f"block_{index:02d}"]
        x = block(x, modulation, text_k[index], text_v[index], additive_mask(mask), *tables)
    return modules["head"](x, condition, latents)


def run_reference(checkpoint: Checkpoint, latents: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    micro = torch.tensor([[32.0, 32, 0, 0, 1, 3]]).repeat(len(latents), 1)
    timestep = torch.linspace(0.1, 0.9, len(latents))
    return checkpoint.model(latents, timestep, micro, *checkpoint.text_encoder(ids, mask), **late_of(checkpoint))


def late_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """What a student takes besides."""
    known = {"guidance": torch.tensor([2.0, 3.5, 6.0]), "target_time": torch.tensor([0.5, 0.7, 1.0])}
    return {name: known[name] for name in late_inputs(model_facts(checkpoint.config).student)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temporal": False},
        {"patch": (2, 1)},
        {"cross_qk_norm": False},
        {"student": STUDENT},
        {"student": FLOW_MAP},
    ],
)
def test_chained_graphs_are_the_model(
    micro: Checkpoint, make_checkpoint: Callable[..., Checkpoint], changes: dict[str, object]
) -> None:
    checkpoint = make_checkpoint(micro.config.model.model_copy(update=changes))
    frames = 1 if changes.get("temporal") is False else 2
    latents = torch.randn(3, frames, 4, 6, 10, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 5, 2, 0], [3, 4, 5, 2], [2, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    found = run_graphs(dict(graph_modules(checkpoint)), checkpoint, latents, ids, mask)
    wanted = run_reference(checkpoint, latents, ids, mask)
    assert wanted.std() > 0.1
    assert torch.equal(found, wanted)


def test_vae_graphs_are_the_vae(micro: Checkpoint) -> None:
    modules = graph_modules(micro)
    video = torch.rand(2, 3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = modules["image_encoder"](video)
    assert torch.equal(latents, micro.vae.encode(video))
    assert torch.equal(modules["decoder"](latents), micro.vae.decode(latents))


def test_half_precision_keeps_the_contracts_types(micro: Checkpoint) -> None:
    facts = model_facts(micro.config)
    specs = graph_specs(facts, "bfloat16")
    dims = dimensions(facts, batch=2, model_batch=2, video_frames=2, height=16, width=24, text_tokens=4)
    for name in ("text_encoder", "text_kv", "embed", "block_00", "head"):
        module = copy.deepcopy(graph_modules(micro)[name]).to(torch.bfloat16)
        inputs = [torch.ones(t.sized(dims), dtype=getattr(torch, t.dtype)) for t in specs[name].inputs]
        outputs = module(*inputs)
        for output, tensor in zip(
            outputs if isinstance(outputs, tuple) else (outputs,), specs[name].outputs, strict=True
        ):
            assert output.dtype == getattr(torch, tensor.dtype), f"{name}.{tensor.name}"
            assert output.shape == tensor.sized(dims), f"{name}.{tensor.name}"


def test_a_part_shares_weights_and_leaves_the_whole_alone(micro: Checkpoint) -> None:
    view = part(micro.model, "head")
    assert set(view.state_dict()) == {name for name in micro.model.state_dict() if name.startswith("head.")}
    assert view.head.table is micro.model.head.table
    assert "blocks" in micro.model._modules


def test_text_kv_holds_only_what_it_needs(micro: Checkpoint) -> None:
    names = set(graph_modules(micro)["text_kv"].state_dict())
    assert names == {
        f"source.{layer}.{kind}"
        for layer in ("text_in", "text_out", "blocks.0.cross.kv", "blocks.1.cross.kv")
        for kind in ("weight", "bias")
    } | {f"source.blocks.{index}.cross.k_norm.weight" for index in (0, 1)}
