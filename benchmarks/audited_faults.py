"""Graphs with planted faults before the fusion audit: TensorRT-RTX builds them, without a GPU."""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from stiv_deploy.export.audit.audit import default_graphs
from stiv_deploy.export.audit.fusion_audit import audit_graph, expectation
from stiv_deploy.export.audit.layer_report import read_report
from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.engine_files import profile
from stiv_deploy.runtime.tensorrt_library import import_tensorrt

SM = "89"
"""Compute capability that is built for."""
UNBUILT = "does not build"


class Audited:
    """The audit of a bundle's graphs, at its first bucket.

    Raises :class:`~stiv_deploy.runtime.errors.BackendError` where TensorRT-RTX is not installed.
    """

    def __init__(self, bundle: Bundle) -> None:
        import_tensorrt("tensorrt-rtx")
        self._bundle, self._builders = bundle, BuilderProcesses()
        self._graphs = default_graphs(bundle.manifest)
        self._right: dict[str, set[str]] = {}

    def catches(self, model: onnx.ModelProto, graph: str) -> bool | None:
        """Whether a check fails of ``model`` that does not fail of the ``graph``; None of what is not audited."""
        if graph not in self._graphs:
            return None
        if graph not in self._right:
            self._right[graph] = self._failed(onnx.load(self._bundle.graph_file(graph)), graph)
        return bool(self._failed(model, graph) - self._right[graph])

    def _failed(self, model: onnx.ModelProto, graph: str) -> set[str]:
        """Names of the checks that fail."""
        manifest = self._bundle.manifest
        with TemporaryDirectory(prefix="stiv-audit-") as folder:
            path = Path(folder) / f"{graph}.onnx"
            onnx.save(model, path)
            job = EngineJob(
                graph=graph,
                onnx=str(path),
                plan=f"{path}.plan",
                backend="tensorrt-rtx",
                sm=SM,
                profiles=(profile(manifest.graphs[graph].spec, manifest.model, manifest.buckets[0]),),
                report=f"{path}.txt",
            )
            if self._builders.run(job).error is not None:
                return {UNBUILT}
            layers = read_report(Path(f"{path}.txt"))
        return {row.name for row in audit_graph(layers, expectation(manifest, graph), SM, "") if not row.passed}
