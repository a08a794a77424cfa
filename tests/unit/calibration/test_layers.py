import pytest
import torch
from torch import nn

from stiv_deploy.calibration.layers import LARGEST, Layer, block_layers, model_layers
from stiv_deploy.stiv_ref.block import SelfAttention
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import CONFIGS
from stiv_deploy.stiv_ref.model import Stiv

UNNAMED = ("token_position", "frame_position")
"""Linears of constants: their outputs are the same in every call."""


@pytest.mark.parametrize("name", ["micro", "image_checkpoint"])
def test_every_linear_is_one_layer(name: str, request: pytest.FixtureRequest) -> None:
    checkpoint: Checkpoint = request.getfixturevalue(name)
    model: Stiv = checkpoint.model
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    named = [layer.module for layer in model_layers(model.config) if layer.kind == "linear"]
    assert len(set(named)) == len(named)
    assert set(named) == {path for path in linears if path not in UNNAMED}
    attentions = [layer for layer in model_layers(model.config) if layer.kind == "attention"]
    assert [layer.module for layer in attentions] == ["blocks.0.spatial", "blocks.1.spatial"]
    assert all(isinstance(model.get_submodule(layer.module), SelfAttention) for layer in attentions)


def test_names_are_graph_and_module() -> None:
    config = CONFIGS["XL"]
    layers = model_layers(config)
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(layer.name.startswith(f"{layer.graph}.") for layer in layers)
    assert block_layers(config, 7)[0] == Layer(
        name="block_07.spatial.qkv", graph="block_07", module="blocks.7.spatial.qkv", kind="linear", group="block"
    )
    assert {layer.graph for layer in layers if layer.group == "edge"} == {"embed", "text_kv", "head"}


def test_largest_magnitudes_are_those_of_the_formats() -> None:
    e4m3, e2m1 = torch.finfo(torch.float8_e4m3fn).max, 6.0
    assert {"fp8": e4m3, "int8": torch.iinfo(torch.int8).max, "nvfp4": e2m1 * e4m3} == LARGEST
