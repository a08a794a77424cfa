"""The graph contract's names."""

import pytest
from toys import FACTS

from stiv_deploy.runtime.bundle.contract import (
    block_names,
    block_of,
    graph_specs,
    half_names,
    has_layer,
    is_block,
    is_half,
)


def test_blocks_are_told_by_their_names() -> None:
    assert all(is_block(name) for name in block_names(128))
    assert not any(is_block(name) for name in ("text_encoder", "embed", "head", "step", "decoder", "blocks", "block"))


def test_halves_are_told_by_their_names() -> None:
    names = [name for pair in half_names(12) for name in pair]
    assert names[-2:] == ["spatial_11", "mixed_11"]
    assert all(is_half(name) and not is_block(name) for name in names)
    assert {block_of(name) for name in names} == set(block_names(12))
    plain = [name for name in graph_specs(FACTS, "float32") if name not in block_names(2)]
    assert not any(map(is_half, [*plain, *block_names(12)]))
    assert [block_of(name) for name in plain] == plain


@pytest.mark.parametrize(
    ("layer", "graphs"),
    [
        ("block_01.spatial.qkv", {"block_01", "spatial_01"}),
        ("block_01.spatial.attention", {"block_01", "spatial_01"}),
        ("block_01.temporal.out", {"block_01", "mixed_01"}),
        ("block_01.cross.q", {"block_01", "mixed_01"}),
        ("block_01.ffn.down", {"block_01", "mixed_01"}),
        ("embed.singleton.pooled", {"embed"}),
    ],
)
def test_layers_belong_to_a_block_and_to_one_of_its_halves(layer: str, graphs: set[str]) -> None:
    assert {name for name in graph_specs(FACTS, "float32", halves=True) if has_layer(name, layer)} == graphs


def test_both_halves_have_the_tensors_of_the_block() -> None:
    specs = graph_specs(FACTS, "float16", halves=True)
    whole, spatial, mixed = (set(specs[name].inputs) for name in ("block_00", "spatial_00", "mixed_00"))
    assert spatial | mixed == whole
    assert {tensor.name for tensor in spatial & mixed} == {"x", "modulation"}
    assert specs["spatial_00"].outputs == specs["mixed_00"].outputs == specs["block_00"].outputs
