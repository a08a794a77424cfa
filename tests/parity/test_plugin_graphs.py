"""Graphs with plugin nodes, executed in ONNX Runtime by their function bodies, against torch and the native graphs."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from stiv_deploy.calibration.collect import CalibrationSettings
from stiv_deploy.calibration.layers import Format
from stiv_deploy.calibration.request import CalibrationRequest
from stiv_deploy.calibration.stage import calibrate
from stiv_deploy.export.audit.audit import kernel_count
from stiv_deploy.export.audit.layer_report import EngineLayer, read_report
from stiv_deploy.export.bundle_from_checkpoint import default_bucket
from stiv_deploy.export.engines.engine_from_onnx import build_engine
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs.check import FLOAT32_GATE, CheckRow, check_graph, check_sizes
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.quantization import Quantization, load_quantization
from stiv_deploy.export.graphs.writer import GRAPH_FOLDER, GraphWriter, in_precision
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import block_names, dimensions
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.bundle.manifest import Bucket, GraphRecord, Range
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS
from stiv_deploy.runtime.tensorrt_library import missing_library
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint, open_checkpoint

pytestmark = pytest.mark.slow

COMMAND = "import typer; from stiv_deploy.export.cli import export; typer.run(export)"
BLOCKS = block_names(6)
NATIVE = "its native form"


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Checkpoint:
    return load_checkpoint(checkpoint)


@pytest.fixture(scope="module")
def command_line(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The bundle of a run of the command at small sizes, the comparison included, and its two outputs."""
    folder = tmp_path_factory.mktemp("plugin")
    arguments = [checkpoint, "--out", folder / "bundle", "--attention", "plugin", "--frames", "1:2:4", "--batch", "1"]
    arguments += ["--height", "16:16:24", "--width", "16:24:24"]
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)
    return folder / "bundle", done.stdout, done.stderr


@pytest.fixture(scope="module")
def plugin_bundle(command_line: tuple[Path, str, str]) -> Bundle:
    return Bundle.open(command_line[0])


@pytest.fixture(scope="module")
def half_writer(reference: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> GraphWriter:
    return GraphWriter(reference, tmp_path_factory.mktemp("half"), "float16", attention="plugin", halves=True)


def quantized_writer(writer: GraphWriter, quantization: Quantization, folder: Path) -> GraphWriter:
    """A writer of 8-bit graphs that shares the traces of ``writer``."""
    other = GraphWriter(writer.checkpoint, folder, "float16", quantization, "plugin", halves=True)
    other._templates = writer._templates
    return other


def odd_sizes(reference: Checkpoint) -> dict[str, dict[str, int]]:
    """One frame, tokens and frames in odd numbers, three requests."""
    facts = model_facts(reference.config)
    pixels = facts.pixel_multiple
    shapes = {"one frame": (3, 1, 3, 5), "odd": (3, 7, 5, 3), "one token": (1, 5, 1, 1)}
    return {
        name: dimensions(
            facts,
            batch=batch,
            model_batch=batch,
            video_frames=frames,
            height=h * pixels,
            width=w * pixels,
            text_tokens=5,
        )
        for name, (batch, frames, h, w) in shapes.items()
    }


def compared(native: Path, plugin: Path, writer: GraphWriter, graph: str) -> list[CheckRow]:
    """Rows of a plugin graph at the default bucket's sizes and at odd ones, two each."""
    checkpoint, module = writer.checkpoint, writer.modules[graph]
    bucket = default_bucket(checkpoint.config.sampling, writer.facts)
    sizes = check_sizes(bucket, writer.facts) | odd_sizes(checkpoint)
    exported = in_precision(module, writer.dtype)
    vocabulary = checkpoint.config.text.vocabulary
    rows = list(check_graph(graph, plugin, writer.specs[graph], module, exported, sizes, vocabulary, native=native))
    assert [row.size for row in rows] == [size for size in sizes for _ in range(2)]
    assert [row.against for row in rows] == ["the reference", NATIVE] * len(sizes)
    return rows


@pytest.mark.parametrize("graph", BLOCKS)
def test_float32_blocks(plugin_bundle: Bundle, reference: Checkpoint, tmp_path: Path, graph: str) -> None:
    native, plugin = plugin_bundle.graph_file(graph), plugin_bundle.plugin_file(graph)
    for row in compared(native, plugin, GraphWriter(reference, tmp_path, "float32"), graph):
        assert row.passed, row
        assert row.gate == FLOAT32_GATE
        assert row.rel_l2 is not None
        assert row.rel_l2 <= FLOAT32_GATE


@pytest.mark.parametrize("graph", [BLOCKS[0], BLOCKS[-1]])
def test_float16_blocks(half_writer: GraphWriter, graph: str) -> None:
    half_writer.write(graph)
    native, plugin = (half_writer.folder / f"{graph}{form}.onnx" for form in ("", ".plugin"))
    for row in compared(native, plugin, half_writer, graph):
        assert row.passed, row
        assert row.gate < 1e-2


def test_the_bundle_is_the_native_one_and_plugin_files(plugin_bundle: Bundle, bundle: Path) -> None:
    """Every file of the native bundle is there, byte by byte; the new ones hold no weights."""
    native, manifest = Bundle.open(bundle).manifest, plugin_bundle.manifest
    assert all(record.plugin is None for record in native.graphs.values())
    stripped = {name: record.model_copy(update={"plugin": None}) for name, record in manifest.graphs.items()}
    assert stripped == native.graphs
    assert [name for name, record in manifest.graphs.items() if record.plugin] == list(BLOCKS)
    same = {name: getattr(native, name) for name in ("graphs", "buckets", "sampling", "golden")}
    assert manifest.model_copy(update=same) == native
    before, after = (
        {path.name for path in (folder / GRAPH_FOLDER).iterdir()} for folder in (bundle, plugin_bundle.folder)
    )
    assert after - before == {f"{name}.plugin.onnx" for name in BLOCKS}
    assert before <= after
    topologies = set()
    for name in BLOCKS:
        form, data = manifest.graphs[name].plugin, manifest.graphs[name].data
        assert form is not None
        assert data is not None
        content = (plugin_bundle.folder / form.file.path).read_bytes()
        assert (form.file.bytes, form.file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
        assert len(content) < 50_000
        assert form.plugins == ("StivSpatialQkv/1", "StivTemporalAttention/1")
        topologies.add(form.topology)
        model = onnx.load_from_string(content)
        entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
        places = {entry.value for entry in entries if entry.key == "location"}
        assert places == {Path(data.path).name}
    assert len(topologies) == 1
    assert topologies.isdisjoint({record.topology for record in native.graphs.values()})


def test_the_command(command_line: tuple[Path, str, str]) -> None:
    out, output, errors = command_line
    assert output.startswith(f"{out}: 14 graphs (6 also with plugin nodes), ")
    assert "all checked against the reference" in output
    assert [line for line in errors.splitlines() if not re.match(r"export \d+/14 after \d+ s ", line)] == []


@pytest.fixture
def block(reference: Checkpoint, plugin_bundle: Bundle, tmp_path: Path) -> tuple[GraphWriter, Path, GraphRecord]:
    """A writer whose folder holds a copy of one block of the bundle, the file of its plugin form, and its record."""
    writer = GraphWriter(reference, tmp_path, "float32", attention="plugin")
    record = plugin_bundle.manifest.graphs["block_00"]
    for path in (plugin_bundle.folder / GRAPH_FOLDER).glob("block_00.*"):
        shutil.copy(path, tmp_path)
    return writer, tmp_path / "block_00.plugin.onnx", record


def test_the_export_finds_a_wrong_function_body(block: tuple[GraphWriter, Path, GraphRecord]) -> None:
    """The native graph is right, so only the plugin form's own comparison can tell."""
    writer, path, record = block
    buckets = [default_bucket(writer.checkpoint.config.sampling, writer.facts)]
    model = onnx.load(path, load_external_data=False)
    (node,) = [node for function in model.functions for node in function.node if node.op_type == "Attention"]
    assert node.input[0] == "q_rotated"
    node.input[0] = "q_normed"
    path.write_bytes(model.SerializeToString())
    writer.check("block_00", record.topology, buckets)
    with pytest.raises(CheckError, match=r"graph block_00\.plugin differs from the reference at the \w+ of bucket"):
        writer.check_plugin("block_00", record, buckets)


def test_the_export_compares_with_the_native_form(
    block: tuple[GraphWriter, Path, GraphRecord],
) -> None:
    """A native file that was made wrong after its own comparison is what the plugin form then differs from."""
    writer, path, record = block
    buckets = [default_bucket(writer.checkpoint.config.sampling, writer.facts)]
    native = path.with_name("block_00.onnx")
    model = onnx.load(native, load_external_data=False)
    (node,) = [node for node in model.graph.node if node.name == "temporal.q_norm.RMSNormalization"]
    next(each for each in node.attribute if each.name == "epsilon").f = 0.1
    native.write_bytes(model.SerializeToString())
    with pytest.raises(CheckError, match=r"graph block_00\.plugin differs from its native form at the \w+ of bucket"):
        writer.check_plugin("block_00", record, buckets)


# 8 bits


@pytest.fixture(scope="module")
def quantizations(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Format], Quantization]:
    """Makes quantizations by scales of a short run; all layers of the blocks are in 8 bits."""
    folder = tmp_path_factory.mktemp("scales")

    @functools.cache
    def make(quantization: Format) -> Quantization:
        out = folder / f"{quantization}.safetensors"
        settings = CalibrationSettings(samples=2, steps=12, batch=2)
        run = CalibrationRequest(checkpoint=checkpoint, quantization=quantization, out=out, settings=settings)
        calibrate(run)
        loaded = load_quantization(open_checkpoint(checkpoint), quantization, out, None)
        layers = {name: quantization if name.startswith("block_") else "high" for name in loaded.plan.layers}
        return replace(loaded, plan=loaded.plan.model_copy(update={"layers": layers}))

    return make


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_8_bit_blocks(
    quantizations: Callable[[Format], Quantization], half_writer: GraphWriter, tmp_path: Path, quantization: Format
) -> None:
    """By the gates of the native form: the error of the fake-quantized reference and a tenth."""
    pytest.importorskip("modelopt")
    writer = quantized_writer(half_writer, quantizations(quantization), tmp_path)
    buckets = [default_bucket(writer.checkpoint.config.sampling, writer.facts)]
    for name in (BLOCKS[0], BLOCKS[-1]):
        writer.check_plugin(name, writer.write(name), buckets)
    model = onnx.load(tmp_path / f"{BLOCKS[0]}.plugin.onnx", load_external_data=False)
    nodes = {node.op_type: node for node in model.graph.node if node.domain == DOMAIN}
    absorbed = {spec.name: len(nodes[spec.name].input) == len(spec.inputs) for spec in PLUGINS}
    assert set(absorbed.values()) == {quantization == "fp8"}


# TensorRT-RTX, which has no plugins and builds the function bodies


def built(writer: GraphWriter, graph: str, bucket: Bucket) -> tuple[list[EngineLayer], ...]:
    """Layers of the engines of both forms for SM 89."""
    found = []
    for form in (graph, f"{graph}.plugin"):
        report = writer.folder / f"{form}.txt"
        job = EngineJob(
            graph=graph,
            onnx=str(writer.folder / f"{form}.onnx"),
            plan=str(writer.folder / "plan"),
            backend="tensorrt-rtx",
            sm="89",
            profiles=(profile(writer.specs[graph], writer.facts, bucket),),
            report=str(report),
        )
        build_engine(job)
        found.append(read_report(report))
    return tuple(found)


def attention_types(layers: list[EngineLayer]) -> list[set[str]]:
    return [{tensor.dtype for tensor in layer.inputs} for layer in layers if layer.is_attention]


@pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx")))
@pytest.mark.parametrize("eight_bits", [False, True])
def test_bodies_fuse_as_the_native_form_does(
    half_writer: GraphWriter, quantizations: Callable[[Format], Quantization], tmp_path: Path, eight_bits: bool
) -> None:
    """One kernel for each attention, of FP8 inputs where the plan says so, and no more kernels than the native form.

    Of a block and of its halves.
    """
    one = Range(min=1, typical=1, max=2)
    pixels = Range(min=48, typical=64, max=64)  # 36 tokens a frame and more: FP8 attention has a kernel from 32 on
    bucket = Bucket(name="b", batch=one, frames=Range(min=1, typical=8, max=8), height=pixels, width=pixels)
    writer = quantized_writer(half_writer, quantizations("fp8"), tmp_path) if eight_bits else half_writer
    wanted = [{"FP8"} if eight_bits else {"Half"}, {"Half"}, {"Half"}]
    for graph, types in (("block_00", wanted), ("spatial_00", wanted[:1]), ("mixed_00", wanted[1:])):
        writer.write(graph)
        native, plugin = built(writer, graph, bucket)
        assert attention_types(native) == attention_types(plugin) == types
        assert kernel_count(plugin) <= kernel_count(native)
