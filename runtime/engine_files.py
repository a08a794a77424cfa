"""Engines of a bundle: which graph, bucket and GPU a record is for, and whether it still fits.

Shared by the build, which writes the records, and the runtime, which believes them after checking.
"""

import hashlib

from stiv_deploy.runtime.contract import GraphSpec, ModelFacts
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.runtime.manifest import PORTABLE, Bucket, EngineRecord, GraphRecord, Manifest
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour

Shape = tuple[int, ...]


def graph_hash(record: GraphRecord) -> str:
    """SHA-256 (hex) over the hashes of a graph's ONNX file and external weights: ``EngineRecord.onnx``."""
    parts = [record.file.sha256, "" if record.data is None else record.data.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


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


def build_command(flavour: Flavour, sm: str) -> str:
    """The command that makes the engines anew."""
    return f"run: stiv build BUNDLE --backend {flavour} --sm {sm}"


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
    graph = manifest.graphs.get(record.graph)
    remedy = build_command(record.backend, record.sm)
    if graph is None or graph_hash(graph) != record.onnx:
        raise EngineError(f"engine {record.file.path} was built from another version of graph {record.graph}; {remedy}")
    if record.backend_version != version:
        raise EngineError(
            f"engine {record.file.path} was built by {TITLES[record.backend]} {record.backend_version}, "
            f"{version} is installed here; {remedy}"
        )
