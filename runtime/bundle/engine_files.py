"""Engines of a bundle: which form of which graph, bucket and GPU a record is for.

Shared by the build, which writes the records, and the runtime, which believes them after checking.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Literal

from stiv_deploy.runtime.bundle.contract import HALVES, VAE_GRAPHS, GraphSpec, ModelFacts, is_block, is_half
from stiv_deploy.runtime.bundle.manifest import (
    PORTABLE,
    Bucket,
    EngineRecord,
    Fp4Form,
    GraphRecord,
    Manifest,
    ReducedForm,
)

Shape = tuple[int, ...]
Attention = Literal["native", "plugin"]
"""The two forms of a graph: attention of standard operators, or of plugin nodes."""
BFLOAT16_SM = 80
"""The first compute capability whose tensor cores take bfloat16 and TF32 (Ampere)."""


def graph_hash(record: GraphRecord, plugin: bool = False, reduced: bool = False, fp4: bool = False) -> str:
    """SHA-256 (hex) over the hashes of a graph's ONNX file and external weights: ``EngineRecord.onnx``.

    With ``plugin`` that of its form with plugin nodes, with ``reduced`` that of its form in 16 bits, where it has one;
    they read the same weights. With ``fp4`` that of its form in NVFP4, where it has one, which has its own.
    """
    second = record.plugin if plugin else record.reduced if reduced else record.fp4 if fp4 else None
    file = record.file if second is None else second.file
    data = second.data if isinstance(second, Fp4Form) else record.data
    parts = [file.sha256, "" if data is None else data.sha256]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def reduced_for(record: GraphRecord, sm: str) -> ReducedForm | None:
    """The form in 16 bits that engines of a graph are built from for ``sm``; None where it has none that fits."""
    form = record.reduced
    takes_it = form is not None and (form.precision == "float16" or sm == PORTABLE or int(sm) >= BFLOAT16_SM)
    return form if takes_it else None


def takes_tf32(manifest: Manifest, graph: str) -> bool:
    """Whether engines may round float32 products of ``graph`` to TF32: the VAE's, where a bundle is not float32."""
    return graph in VAE_GRAPHS and manifest.precision != "float32"


def engines_hash(records: Iterable[EngineRecord]) -> str:
    """SHA-256 (hex) over the hashes of the files of ``records``, for which graph and bucket they are, in any order."""
    parts = sorted(f"{record.graph} {record.bucket} {record.file.sha256}" for record in records)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def attention_form(record: EngineRecord, manifest: Manifest) -> Attention | None:
    """Which form of its graph, as it is now, an engine was built from; None if from neither.

    A form in 16 bits has the attention of the native one, as has one in NVFP4, whose twin is none to build from.
    """
    graph = manifest.graphs.get(record.graph)
    if graph is not None and graph.fp4 is not None:
        return "native" if record.onnx == graph_hash(graph, fp4=True) else None
    if graph is not None and record.onnx in (graph_hash(graph), graph_hash(graph, reduced=True)):
        return "native"
    if graph is not None and graph.plugin is not None and record.onnx == graph_hash(graph, plugin=True):
        return "plugin"
    return None


def sm_folder(sm: str) -> str:
    """Folder name of engines for ``sm``: ``sm89``, or ``portable``."""
    return sm if sm == PORTABLE else f"sm{sm}"


def engine_path(backend: str, sm: str, graph: str, buckets: Sequence[str]) -> str:
    """Where an engine lies in a bundle; one that was built for chosen ``buckets`` only has a file of its own."""
    suffix = "." + "+".join(buckets) if buckets else ""
    return f"engines/{backend}/{sm_folder(sm)}/{graph}{suffix}.engine"


def shared_name(first: str, sha256: str) -> str:
    """What :func:`engine_path` calls an engine of this hash that the graph ``first`` and others of its form share."""
    return f"shared_{first}_{sha256[:8]}"


def buckets_of_engine(record: EngineRecord, manifest: Manifest) -> list[str]:
    """Names of the buckets that an engine has profiles for, in the order of these, by its file's name."""
    _, _, chosen = PurePosixPath(record.file.path).name.removesuffix(".engine").partition(".")
    return chosen.split("+") if chosen else [bucket.name for bucket in manifest.buckets]


def profile(spec: GraphSpec, model: ModelFacts, bucket: Bucket) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, typical and largest shape of every input of a graph in ``bucket``."""
    low, typical, high = (bucket.dims(model, which) for which in ("min", "typical", "max"))
    return {tensor.name: (tensor.sized(low), tensor.sized(typical), tensor.sized(high)) for tensor in spec.inputs}


def unbuilt(manifest: Manifest, built: Collection[str]) -> list[str]:
    """Graphs that lack an engine where ``built`` have one: of blocks and halves one kind is enough."""
    lacking = [name for name in sorted(manifest.graphs) if name not in built]
    blocks, halves = list(filter(is_block, lacking)), list(filter(is_half, lacking))
    spare = {*blocks, *halves} if not (blocks and halves) and manifest.halves else set(halves)
    return [name for name in lacking if name not in spare]


TYPICAL_SHARDS = 4
"""Shards that engines of halves are tuned for: those of eight devices where guidance is split first, or of four."""
SHARED = {"embed": "token_frames", HALVES[0]: "token_frames", HALVES[1]: "tokens", "head": "token_frames"}
"""Which tokens are shared out among devices, by what a graph's name begins with."""


def graph_profile(manifest: Manifest, graph: str, bucket: Bucket) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Smallest, typical and largest shape of every input of ``graph`` in ``bucket``.

    Where blocks are there as halves, what devices share the tokens of goes down to the smallest shard, one frame or one
    position; halves are tuned for :data:`TYPICAL_SHARDS` shards.
    """
    spec, model = manifest.graphs[graph].spec, manifest.model
    kind = graph.partition("_")[0]
    if not manifest.halves or kind not in SHARED:
        return profile(spec, model, bucket)
    low, typical, high = (bucket.dims(model, which) for which in ("min", "typical", "max"))
    low |= shard(model, SHARED[kind], 1)
    if kind in HALVES:
        typical |= shard(model, SHARED[kind], -(-typical[SHARED[kind]] // TYPICAL_SHARDS))
    return {tensor.name: (tensor.sized(low), tensor.sized(typical), tensor.sized(high)) for tensor in spec.inputs}


def shard(model: ModelFacts, symbol: str, size: int) -> dict[str, int]:
    """Values of the symbols that a shard of so many ``token_frames`` or ``tokens`` changes."""
    return {symbol: size, "frames": size * model.patch[0]} if symbol == "token_frames" else {symbol: size}


def buckets_holding(manifest: Manifest, graph: str, shapes: dict[str, Shape]) -> list[str]:
    """Names of the buckets whose profile of ``graph`` allows these input shapes."""

    def holds(bucket: Bucket) -> bool:
        limits = graph_profile(manifest, graph, bucket)
        return all(
            len(shape) == len(limits[name][0])
            and all(
                low <= size <= high for low, size, high in zip(limits[name][0], shape, limits[name][2], strict=True)
            )
            for name, shape in shapes.items()
        )

    return [bucket.name for bucket in manifest.buckets if holds(bucket)]
