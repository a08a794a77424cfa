"""Engines of halves of blocks: their profiles, and which graphs need an engine."""

from pathlib import Path

import pytest
from toys import BUCKET, FACTS

from stiv_deploy.runtime.bundle.bundle import read_manifest
from stiv_deploy.runtime.bundle.contract import graph_specs
from stiv_deploy.runtime.bundle.engine_files import buckets_holding, graph_profile, profile, unbuilt
from stiv_deploy.runtime.bundle.manifest import GraphRecord, Manifest, Range


@pytest.fixture
def plain(bundle_path: Path) -> Manifest:
    return read_manifest(bundle_path)


@pytest.fixture
def halved(plain: Manifest) -> Manifest:
    """The toy bundle's manifest as if there were halves, for 4 to 6 frames."""
    some = plain.graphs["step"]
    specs = graph_specs(FACTS, "float32", halves=True)
    graphs = {name: GraphRecord(file=some.file, data=None, topology="", spec=spec) for name, spec in specs.items()}
    bucket = BUCKET.model_copy(update={"frames": Range(min=4, typical=5, max=6)})
    return plain.model_copy(update={"graphs": graphs, "buckets": (bucket,)})


def test_profiles_of_shards_go_from_one_frame_and_one_position_to_all(halved: Manifest) -> None:
    (bucket,) = halved.buckets
    shapes = {name: graph_profile(halved, name, bucket) for name in halved.graphs}
    assert [shape[1:3] for shape in shapes["spatial_00"]["x"]] == [(1, 4), (2, 16), (6, 36)]
    assert [shape[1:3] for shape in shapes["mixed_00"]["x"]] == [(4, 1), (5, 4), (6, 36)]
    assert [shape[1:3] for shape in shapes["block_00"]["x"]] == [(4, 4), (5, 16), (6, 36)]
    assert [shape[1] for shape in shapes["embed"]["model_input"]] == [1, 5, 6]
    assert [shape[0] for shape in shapes["embed"]["temporal_cos"]] == [1, 5, 6]
    assert [shape[1] for shape in shapes["head"]["model_input"]] == [1, 5, 6]
    assert shapes["step"] == profile(halved.graphs["step"].spec, FACTS, bucket)


def test_a_bundle_without_halves_has_the_profiles_that_it_had(plain: Manifest) -> None:
    for name, record in plain.graphs.items():
        assert graph_profile(plain, name, BUCKET) == profile(record.spec, FACTS, BUCKET)


def test_a_shard_lies_in_the_bucket(halved: Manifest) -> None:
    shapes = {"x": (2, 1, 16, 4), "modulation": (2, 6, 4), "spatial_cos": (16, 2), "spatial_sin": (16, 2)}
    assert buckets_holding(halved, "spatial_00", shapes) == ["small"]
    assert buckets_holding(halved, "block_00", {"x": (2, 1, 16, 4)}) == []


def test_blocks_or_halves_need_engines(halved: Manifest, plain: Manifest) -> None:
    names = set(halved.graphs)
    blocks = {name for name in names if name.startswith("block")}
    halves = {name for name in names if name.startswith(("spatial", "mixed"))}
    assert unbuilt(halved, names) == unbuilt(halved, names - blocks) == unbuilt(halved, names - halves) == []
    assert unbuilt(halved, names - {"block_01"}) == unbuilt(halved, names - {"mixed_01"}) == []
    assert unbuilt(halved, names - {"block_01", "mixed_00"}) == ["block_01"]
    assert unbuilt(halved, names - {"head", *halves}) == ["head"]
    assert unbuilt(plain, plain.graphs.keys() - {"block_01"}) == ["block_01"]
