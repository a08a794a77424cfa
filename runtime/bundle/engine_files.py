"""Engines of a bundle: which graph, bucket and GPU a record is for, and whether it still fits.

Shared by the build, which writes the records, and the runtime, which believes them after checking.
"""

import hashlib
from typing import Literal

from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts
from stiv_deploy.runtime.bundle.manifest import PORTABLE, Bucket, EngineRecord, GraphRecord, Manifest
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.runtime.plugins.tensorrt_plugins import SHORT, PluginLibrary
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour

Shape = tuple[int, ...]
Attention = Literal["native", "plugin"]
"""The two forms of a graph: attention of standard operators, or of plugin nodes."""


def graph_hash(record: GraphRecord, plugin: bool = False) -> str:
    """SHA-256 (hex) over the hashes of a graph's ONNX file and external weights: ``EngineRecord.onnx``.

    With ``plugin`` that of its form with plugin nodes, where it has one; both read the same weights.
    """
    file = record.plugin.file if plugin and record.plugin is not None else record.file
    parts = [file.sha256, "" if record.data is None else record.data.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def attention_form(record: EngineRecord, manifest: Manifest) -> Attention | None:
    """Which form of its graph, as it is now, an engine was built from; None if from neither."""
    graph = manifest.graphs.get(record.graph)
    if graph is not None and record.onnx == graph_hash(graph):
        return "native"
    if graph is not None and graph.plugin is not None and record.onnx == graph_hash(graph, plugin=True):
        return "plugin"
    return None


def sm_folder(sm: str) -> str:
    """Folder name of engines for ``sm``: ``sm89``, or ``portable``."""
    return sm if sm == PORTABLE else f"sm{sm}"


def profile(spec: GraphSpec, model: ModelFacts, bucket: Bucket) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, typical and largest shape of every input of a graph in ``bucket``."""
    low, typical, high = (bucket.dims(model, which) for which in ("min", "typical", "max"))
    return {tensor.name: (tensor.sized(low), tensor.sized(typical), tensor.sized(high)) for tensor in spec.inputs}


def buckets_holding(manifest: Manifest, graph: str, shapes: dict[str, Shape]) -> list[str]:
    """Names of the buckets whose profile of ``graph`` allows these input shapes."""

    def holds(bucket: Bucket) -> bool:
        limits = profile(manifest.graphs[graph].spec, manifest.model, bucket)
        return all(
            len(shape) == len(limits[name][0])
            and all(
                low <= size <= high for low, size, high in zip(limits[name][0], shape, limits[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    return [bucket.name for bucket in manifest.buckets if holds(bucket)]


def build_command(flavour: Flavour, sm: str, attention: str = "native") -> str:
    """The command that makes the engines anew."""
    form = "" if attention == "native" else f" --attention {attention}"
    return f"run: stiv build BUNDLE --backend {flavour} --sm {sm}{form}"


def same_again(record: EngineRecord, manifest: Manifest, sm: str | None = None) -> str:
    """The command that makes the engine of ``record`` anew, with plugins if it has some and its graph still can.

    ``sm`` is what to build for, by default what it was built for.
    """
    graph, attention = manifest.graphs.get(record.graph), "native"
    if record.plugins is not None and graph is not None and graph.plugin is not None:
        attention = "plugin"
    elif record.plugins is None and attention_form(record, manifest) == "plugin":
        attention = "quick"  # its plugins lie in the engine
    return build_command(record.backend, sm or record.sm, attention)


def engine_records(manifest: Manifest, flavour: Flavour, sm: str) -> list[EngineRecord]:
    """The engine records of ``flavour`` that a GPU of compute capability ``sm`` should use.

    Its own if there are any, else portable ones. :class:`EngineError` says for what the bundle has engines.
    """
    mine = [record for record in manifest.engines if record.backend == flavour]
    for wanted in (sm, PORTABLE):
        found = [record for record in mine if record.sm == wanted]
        if found:
            return found
    have = ", ".join(sorted({sm_folder(record.sm) for record in mine})) or "none"
    what = f"no {TITLES[flavour]} engines for this GPU (SM {sm}) in the bundle, it has {have}"
    raise EngineError(f"{what}; {build_command(flavour, sm)}")


def check_engine(record: EngineRecord, manifest: Manifest, version: str) -> None:
    """Compare a record with the graph as it is now and with the library's ``version``; raises :class:`EngineError`."""
    remedy = same_again(record, manifest)
    if attention_form(record, manifest) is None:
        raise EngineError(f"engine {record.file.path} was built from another version of graph {record.graph}; {remedy}")
    if record.backend_version != version:
        raise EngineError(
            f"engine {record.file.path} was built by {TITLES[record.backend]} {record.backend_version}, "
            f"{version} is installed here; {remedy}"
        )


def check_plugin_library(record: EngineRecord, manifest: Manifest, library: PluginLibrary) -> None:
    """:class:`EngineError` if the engine of ``record`` was built with another plugin library than ``library``.

    Parameters of a plugin lie in the engine as its library wrote them, and kernels may differ between two builds.
    """
    if record.plugins is not None and record.plugins != library.sha256:
        raise EngineError(
            f"engine {record.file.path} was built with the plugin library {record.plugins[:SHORT]}, here is {library}; "
            f"put that library there, or {same_again(record, manifest)}"
        )
