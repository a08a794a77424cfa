"""Engines of a bundle as models that other ONNX Runtime applications load: one EPContext node in each.

The operator is ``com.microsoft.EPContext`` of ONNX Runtime ("EP context design" in its documentation). Its attributes
are those that the TensorRT-RTX execution provider writes of itself, and looks at when it loads such a model: in ONNX
Runtime (``onnx_ctx_model_helper.cc`` of nv_tensorrt_rtx), and as NVIDIA's plugin (TensorRT-RTX-EP-ABI, same name).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from stiv_deploy.export.engines.install import linked_or_copied
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import FRAMES, SKIP_GRAPHS, VAE_GRAPHS, TensorSpec, is_half
from stiv_deploy.runtime.bundle.engine_files import attention_form, buckets_of_engine, sm_folder, unbuilt
from stiv_deploy.runtime.bundle.manifest import PORTABLE, EngineRecord, Manifest
from stiv_deploy.runtime.errors import BackendError, EngineError, OutputError, few
from stiv_deploy.runtime.files import check_folder, check_no_bundle, exists, replaced_folder, write_text

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

PROVIDER = "NvTensorRTRTXExecutionProvider"
"""The provider's name in ONNX Runtime."""
ANY = "any"
"""Stands for whatever provider takes such nodes: the models then name none."""
INDEX = "graphs.json"
ANOTHER = "choose another --out"
EMBED_LIMIT = 2**31 - 2**20
"""Most bytes of an engine in a model: a protobuf message ends at 2 GiB."""
IR_VERSION, OPSET = 10, 21
"""Of the models: what ONNX Runtime 1.23, the first with this provider's plugins, has read for long."""


@dataclass(frozen=True, kw_only=True)
class EpContextRequest:
    """Models of the engines of ``bundle`` for the GPU ``sm``, to be written to the new folder ``out``.

    ``sm`` may be None where the bundle has engines of TensorRT-RTX for one target only. ``provider`` is the name by
    which an application knows its provider, or :data:`ANY`; with ``embed`` the engines are in the models.
    """

    bundle: Path
    out: Path
    sm: str | None = None
    provider: str = PROVIDER
    embed: bool = False


@dataclass(frozen=True, kw_only=True)
class EpContextReport:
    """What was written: the names of the models in running order, and the target of their engines.

    ``unreached`` are the bundle's other buckets: no engine has its first profile for these.
    """

    out: Path
    sm: str
    models: tuple[str, ...]
    unreached: tuple[str, ...]


def export_epcontext(request: EpContextRequest) -> EpContextReport:
    """Write the models, their engines beside them as hard links or copies, and :data:`INDEX`; all or nothing.

    Raises what opening a bundle does, :class:`BackendError` without the package onnx, :class:`EngineError` where
    engines for the target are missing or of other graphs, and :class:`OutputError` where the folder is there already.
    """
    if find_spec("onnx") is None:
        raise BackendError("writing these models needs onnx; run: pip install 'stiv-deploy[export]'")
    check_target(request.out)
    bundle = Bundle.open(request.bundle)
    records = chosen_engines(bundle, request.sm)
    check_files(records, request.embed)
    with replaced_folder(request.out, ANOTHER) as folder:
        for record in records:
            write_model(folder, bundle, record, request)
        write_text(folder / INDEX, index_text(bundle, records, request))
    reached = {first_bucket(record, bundle.manifest) for record in records}
    return EpContextReport(
        out=request.out,
        sm=records[0].sm,
        models=tuple(model_name(record) for record in records),
        unreached=tuple(each.name for each in bundle.manifest.buckets if each.name not in reached),
    )


def check_target(out: Path) -> None:
    """:class:`OutputError` if ``out`` is no place for a new folder."""
    check_folder(out, ANOTHER)
    check_no_bundle(out)
    if exists(out):
        raise OutputError(f"{out}: is there already, a new folder is wanted; {ANOTHER}, or remove it")


def chosen_engines(bundle: Bundle, sm: str | None) -> tuple[EngineRecord, ...]:
    """Engines of TensorRT-RTX for ``sm`` in running order, one record of each.

    Raises :class:`EngineError` if some lack, are of other graphs, or take weights as inputs.
    """
    manifest = bundle.manifest
    ours = [record for record in manifest.engines if record.backend == "tensorrt-rtx"]
    target = chosen_target(bundle, sorted({record.sm for record in ours}), sm)
    found = {record.file.path: record for record in ours if record.sm == target}
    again = f"build them with: stiv build {bundle.folder} --sm {target}"
    if shared := list(dict.fromkeys(each.graph for each in ours if each.sm == target and each.weights)):
        raise EngineError(
            f"{bundle.folder}: {sm_folder(target)} engines of {few(shared)} take their weights as inputs, which nobody "
            f"gives to such a model; {again}, without --shared-plan"
        )
    if lacking := unbuilt(manifest, {record.graph for record in found.values()}):
        raise EngineError(f"{bundle.folder}: no {sm_folder(target)} engines of {few(lacking)}; {again}")
    if stale := [record.graph for record in found.values() if attention_form(record, manifest) is None]:
        raise EngineError(f"{bundle.folder}: engines of {few(stale)} are not of the graphs here; {again}")
    order = list(manifest.graphs)
    return tuple(sorted(found.values(), key=lambda record: (order.index(record.graph), record.file.path)))


def chosen_target(bundle: Bundle, built: Sequence[str], sm: str | None) -> str:
    """``sm``, or the only one of ``built``; :class:`EngineError` if there are no such engines, or several kinds."""
    if not built:
        raise EngineError(
            f"{bundle.folder}: has no engines of TensorRT-RTX; build them with: stiv build {bundle.folder} --sm "
            f"{sm or PORTABLE}"
        )
    if sm is None and len(built) > 1:
        raise EngineError(f"{bundle.folder}: has engines for SM {few(built, 9)}; give one of them with --sm")
    if sm is not None and sm not in built:
        raise EngineError(
            f"{bundle.folder}: has engines of TensorRT-RTX for SM {few(built, 9)}, not for {sm}; give --sm {built[0]}, "
            f"or build them with: stiv build {bundle.folder} --sm {sm}"
        )
    return sm or built[0]


def check_files(records: Sequence[EngineRecord], embed: bool) -> None:
    """:class:`EngineError` for an engine that is too large to be in its model, or not called as the build calls it."""
    names = list(map(engine_name, records))
    odd = [name for name in names if not name.endswith(".engine") or names.count(name) > 1]
    if odd:
        raise EngineError(f"engines called {few(odd)} are not by 'stiv build', whose names differ and end in .engine")
    large = [record.graph for record in records if embed and record.file.bytes > EMBED_LIMIT]
    if large:
        raise EngineError(f"--embed: engines of {few(large)} have more than 2 GiB, which no model holds; leave it out")


def engine_name(record: EngineRecord) -> str:
    """The engine's file in the folder of the models."""
    return PurePosixPath(record.file.path).name


def model_name(record: EngineRecord) -> str:
    """The model's file, called as ONNX Runtime calls such files."""
    return f"{engine_name(record).removesuffix('.engine')}_ctx.onnx"


def write_model(folder: Path, bundle: Bundle, record: EngineRecord, request: EpContextRequest) -> None:
    """Write the model of one engine, whose hash is checked, and, unless it is in the model, the engine."""
    engine = bundle.verified(record.file)
    content = engine.read_bytes() if request.embed else engine_name(record).encode()
    if not request.embed:
        linked_or_copied(engine, folder / engine_name(record))
    model = context_model(bundle.manifest, record, content, request)
    (folder / model_name(record)).write_bytes(model.SerializeToString())


def context_model(manifest: Manifest, record: EngineRecord, content: bytes, request: EpContextRequest) -> "ModelProto":
    """The model of one engine; ``content`` is the engine, or its path from the model's folder.

    Tensors have the names, types and symbolic shapes of the graph. ``partition_name`` tells one engine from all others:
    the provider keeps what it compiles at run time under this name.
    """
    from onnx import helper

    graph = manifest.graphs[record.graph]
    inputs, outputs = [list(map(value_info, tensors)) for tensors in (graph.spec.inputs, graph.spec.outputs)]
    attributes: dict[str, int | str | bytes] = {
        "embed_mode": int(request.embed),
        "ep_cache_context": content,
        "main_context": 0,  # the provider's word for: a node of its own engine
        "ep_sdk_version": record.backend_version,
        "hardware_architecture": "80+" if record.sm == PORTABLE else record.sm,
        "partition_name": f"{engine_name(record)}_{record.file.sha256[:16]}",
        "onnx_model_filename": PurePosixPath(graph.file.path).name,
    }
    if request.provider != ANY:
        attributes["source"] = request.provider
    taken, given = ([value.name for value in values] for values in (inputs, outputs))
    node = helper.make_node("EPContext", taken, given, name=record.graph, domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    whole = helper.make_graph([node], record.graph, inputs, outputs)
    return helper.make_model(whole, opset_imports=opsets, ir_version=IR_VERSION, producer_name="stiv-deploy")


def value_info(tensor: TensorSpec) -> "ValueInfoProto":
    """``tensor`` as ONNX has it."""
    from onnx import TensorProto, helper

    kind = TensorProto.DataType.Value("FLOAT" if tensor.dtype == "float32" else tensor.dtype.upper())
    return helper.make_tensor_value_info(tensor.name, kind, tensor.shape)


def index_text(bundle: Bundle, records: Sequence[EngineRecord], request: EpContextRequest) -> str:
    """JSON: what the models are of, and each of them in running order."""
    values = {
        "bundle": bundle.manifest.bundle_hash,
        "provider": request.provider,
        "target": sm_folder(records[0].sm),
        "graphs": list(index_rows(bundle.manifest, records)),
    }
    return json.dumps(values, indent=1) + "\n"


def index_rows(manifest: Manifest, records: Sequence[EngineRecord]) -> Iterator[dict[str, object]]:
    """Of each model its graph, file, when it runs, and the bucket whose sizes it takes."""
    for record in records:
        bucket = first_bucket(record, manifest)
        yield {"graph": record.graph, "file": model_name(record), "runs": runs(record.graph), "bucket": bucket}


def first_bucket(record: EngineRecord, manifest: Manifest) -> str:
    """The bucket that an engine's first profile is for: the provider takes no other one of such a model."""
    return buckets_of_engine(record, manifest)[0]


def runs(graph: str) -> str:
    """How often ``graph`` runs, in words."""
    if graph.startswith("text_"):
        return "once for a prompt"
    if graph == VAE_GRAPHS[0]:
        return "once for given frames"
    if graph in (*VAE_GRAPHS, FRAMES):
        return "once for a clip, last"
    if graph in SKIP_GRAPHS:
        return "in evaluations of clips that skip the blocks in some"
    return "in every evaluation" + ", in the place of its block where several devices share it" * is_half(graph)
