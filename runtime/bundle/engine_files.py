"""Engines of a bundle: which form of which graph, bucket and GPU a record is for.

Shared by the build, which writes the records, and the runtime, which believes them after checking.
"""

import hashlib
from collections.abc import Iterable
from typing import Literal

from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts
from stiv_deploy.runtime.bundle.manifest import PORTABLE, Bucket, EngineRecord, GraphRecord, Manifest

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


def engines_hash(records: Iterable[EngineRecord]) -> str:
    """SHA-256 (hex) over the hashes of the files of ``records``, for which graph and bucket they are, in any order."""
    parts = sorted(f"{record.graph} {record.bucket} {record.file.sha256}" for record in records)
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
