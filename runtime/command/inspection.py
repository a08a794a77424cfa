"""What ``stiv inspect`` reports about a bundle, an ONNX graph or an engine, read without running any of them."""

import re
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest
from stiv_deploy.runtime.bundle.card import NEVER_RUN
from stiv_deploy.runtime.bundle.engine_files import Attention, attention_form
from stiv_deploy.runtime.bundle.manifest import MANIFEST, EngineRecord, Manifest, QuantizationRecord
from stiv_deploy.runtime.errors import BundleError, EngineError, RequestError, StivError, one_line
from stiv_deploy.runtime.files import exists, sha256
from stiv_deploy.runtime.plugins.tensorrt_plugins import SHORT

BLOCK, ANY_BLOCK = re.compile(r"block_\d+\.|blocks\.\d+\."), "block_*."
ENGINE_NOTE = "tensors and layers can be listed only on a GPU of the engine's architecture, by loading it"


class BundleReport(BaseModel):
    """A bundle: its manifest and its size on disk."""

    kind: Literal["bundle"] = "bundle"
    path: str
    bytes: int
    manifest: Manifest


class TensorReport(BaseModel):
    """An input or output of an ONNX graph; symbolic dimensions are strings, unknown ones '?'."""

    name: str
    dtype: str
    shape: list[int | str]


class OnnxReport(BaseModel):
    """An ONNX graph. ``weight_bytes`` counts external weights too, by their shapes; ``functions`` their nodes."""

    kind: Literal["onnx"] = "onnx"
    path: str
    opsets: dict[str, int]
    producer: str
    nodes: int
    operators: dict[str, int]
    functions: dict[str, int]
    initializers: int
    weight_bytes: int
    inputs: list[TensorReport]
    outputs: list[TensorReport]


class EngineReport(BaseModel):
    """A compiled engine; ``record`` is its entry in the manifest of the bundle that it lies in, found by its hash.

    ``attention`` is the form of the graph that it was built from, None if the graph is another one by now. ``graphs``
    are all that run in it: more than one where weights are inputs.
    """

    kind: Literal["engine"] = "engine"
    path: str
    bytes: int
    sha256: str
    bundle: str | None
    record: EngineRecord | None
    attention: Attention | None
    graphs: list[str]
    note: str


Report = BundleReport | OnnxReport | EngineReport


def inspect_path(path: str | Path) -> Report:
    """Report on whatever ``path`` is; raises a :class:`StivError` if it is nothing of ours, missing or damaged."""
    path = Path(path)
    if not exists(path):
        raise RequestError(f"{path}: no such file or folder; give a bundle folder, an .onnx or an .engine file")
    if path.is_dir() or path.name == MANIFEST:
        return inspect_bundle(path if path.is_dir() else path.parent)
    if not path.is_file():
        raise RequestError(f"{path}: neither a folder nor a file; give a bundle folder, an .onnx or an .engine file")
    if path.suffix == ".onnx":
        return inspect_onnx(path)
    if path.suffix == ".engine":
        return inspect_engine(path)
    raise RequestError(f"{path}: unknown kind of file; give a bundle folder, an .onnx or an .engine file")


def inspect_bundle(folder: Path) -> BundleReport:
    """Report on a bundle; raises :class:`BundleError` if it is damaged."""
    bundle = Bundle.open(folder)
    files = (file for file in folder.rglob("*") if file.is_file())
    return BundleReport(path=str(folder), bytes=sum(file.stat().st_size for file in files), manifest=bundle.manifest)


def precision_text(manifest: Manifest) -> str:
    """``float16``, or ``float16, fp8 in 48 of 76 layers, VAE bfloat16 in engines``."""
    record, vae = manifest.quantization, manifest.vae_precision
    parts: list[str] = [manifest.precision]
    if record is not None:
        quantized = sum(choice != "high" for choice in record.layers.values())
        label = f" ({NEVER_RUN})" if record.format == "nvfp4" else ""
        parts.append(f"{record.format} in {quantized} of {len(record.layers)} layers{label}")
    if vae != "float32":
        parts.append(f"VAE {vae} in engines")
    return ", ".join(parts)


def plan_rows(record: QuantizationRecord) -> list[tuple[str, str, str]]:
    """The plan for people: layer, number of layers with its choice, choice. What blocks have in common is one row."""
    counts = Counter((BLOCK.sub(ANY_BLOCK, layer), choice) for layer, choice in record.layers.items())
    return [(layer, str(count), choice) for (layer, choice), count in counts.items()]


def plugin_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """Plugins that forms of graphs are made of, and the graphs that have such a form."""
    graphs: dict[str, list[str]] = {}
    for name, graph in manifest.graphs.items():
        if graph.plugin is not None:
            graphs.setdefault(", ".join(graph.plugin.plugins), []).append(name)
    return [(plugins, ", ".join(names)) for plugins, names in graphs.items()]


def attention_text(record: EngineRecord, attention: Attention | None) -> str:
    """How an engine does attention: ``native``, ``plugin (library 0123456789ab)``, ``quick``, or ``outdated``."""
    if attention == "plugin":
        return "quick" if record.plugins is None else f"plugin (library {record.plugins[:SHORT]})"
    return attention or "outdated"


def weights_text(record: EngineRecord) -> str:
    """Where the weights of an engine's graph are: in the ``plan``, or given as ``inputs``."""
    return "inputs" if record.weights else "plan"


def _tensor(value: Any, dtype_name: Any) -> TensorReport:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value if dim.WhichOneof("value") else "?" for dim in tensor.shape.dim]
    return TensorReport(name=value.name, dtype=dtype_name(tensor.elem_type).lower(), shape=shape)


def inspect_onnx(path: Path) -> OnnxReport:
    """Report on an ONNX graph without its weights; needs the package onnx. Raises :class:`BundleError` on damage."""
    try:
        import onnx
    except ImportError:
        raise RequestError(f"{path}: reading ONNX files needs onnx; run: pip install 'stiv-deploy[export]'") from None
    try:
        report = _onnx_report(path, onnx.load(path, load_external_data=False))
    except Exception as error:  # protobuf's own kinds of DecodeError, and types that there are not
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        raise BundleError(f"{path}: not a readable ONNX file ({reason}); export it again with 'stiv export'") from None
    if not report.nodes:
        raise BundleError(f"{path}: not an ONNX graph (it has no nodes); export it again with 'stiv export'")
    return report


def _onnx_report(path: Path, model: Any) -> OnnxReport:
    import onnx

    graph = model.graph
    sizes = (
        prod(each.dims) * onnx.helper.tensor_dtype_to_np_dtype(each.data_type).itemsize for each in graph.initializer
    )
    return OnnxReport(
        path=str(path),
        opsets={opset.domain or "ai.onnx": opset.version for opset in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        nodes=len(graph.node),
        operators=dict(Counter(node.op_type for node in graph.node).most_common()),
        functions={f"{each.domain}.{each.name}": len(each.node) for each in model.functions},
        initializers=len(graph.initializer),
        weight_bytes=sum(sizes),
        inputs=[_tensor(value, onnx.TensorProto.DataType.Name) for value in graph.input],
        outputs=[_tensor(value, onnx.TensorProto.DataType.Name) for value in graph.output],
    )


def _bundle_around(path: Path) -> Path | None:
    return next((folder for folder in path.resolve().parents if (folder / MANIFEST).is_file()), None)


def inspect_engine(path: Path) -> EngineReport:
    """Report on an engine file; raises :class:`EngineError` if it is empty."""
    size = path.stat().st_size
    if size == 0:
        raise EngineError(f"{path}: an empty file, no engine; build it again with 'stiv build'")
    digest, folder = sha256(path), _bundle_around(path)
    record, attention, graphs, note = None, None, [], f"not inside a bundle; {ENGINE_NOTE}"
    if folder is not None:
        try:
            manifest = read_manifest(folder)
            mine = [engine for engine in manifest.engines if engine.file.sha256 == digest]
            record, graphs = next(iter(mine), None), list(dict.fromkeys(engine.graph for engine in mine))
            attention = None if record is None else attention_form(record, manifest)
            note = ENGINE_NOTE if record else f"no engine of {folder / MANIFEST} has this hash; build it again"
        except StivError as error:
            note = str(error)
    return EngineReport(
        path=str(path),
        bytes=size,
        sha256=digest,
        bundle=str(folder) if folder else None,
        record=record,
        attention=attention,
        graphs=graphs,
        note=note,
    )
