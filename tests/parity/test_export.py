"""Every exported graph against the reference, in ONNX Runtime, at four sizes of the default bucket."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs.check import check_graph, check_sizes
from stiv_deploy.export.graphs.modules import FLOAT32_GRAPHS, graph_modules, model_facts
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.contract import block_names
from stiv_deploy.runtime.bundle.manifest import MANIFEST, Manifest
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint

GRAPHS = ("text_encoder", "text_kv", "image_encoder", "embed", *block_names(6), "head", "step", "decoder", "frames")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def half_bundle(checkpoint: Path, once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    def make(folder: Path) -> None:
        export_bundle(ExportRequest(checkpoint=checkpoint, out=folder, precision="float16", check=False))

    return once("float16 bundle", make)


def compare(bundle: Path, reference: Checkpoint, graph: str) -> None:
    manifest = Manifest.model_validate_json((bundle / MANIFEST).read_text())
    record = manifest.graphs[graph]
    module = graph_modules(reference)[graph]
    exported = module
    if manifest.precision != "float32" and graph not in FLOAT32_GRAPHS:
        exported = copy.deepcopy(module).to(torch_dtype(manifest.precision))
    sizes = check_sizes(manifest.buckets[0], model_facts(reference.config))
    vocabulary = reference.config.text.vocabulary
    rows = list(check_graph(graph, bundle / record.file.path, record.spec, module, exported, sizes, vocabulary))
    assert [row.size for row in rows] == ["min", "typical", "max", "odd"]
    assert all(row.rel_l2 is not None and row.rel_l2 <= row.gate and row.passed for row in rows), rows


def test_the_list_of_graphs_is_complete(reference: Checkpoint) -> None:
    assert tuple(graph_modules(reference)) == GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_float32(bundle: Path, reference: Checkpoint, graph: str) -> None:
    compare(bundle, reference, graph)


@pytest.mark.slow
@pytest.mark.parametrize("graph", GRAPHS)
def test_float16(half_bundle: Path, reference: Checkpoint, graph: str) -> None:
    compare(half_bundle, reference, graph)
