"""A block of the small checkpoint as its export writes it, with what its modules are measured by."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from stiv_deploy.export.graphs.check import draw_inputs
from stiv_deploy.export.graphs.modules import graph_modules, model_facts
from stiv_deploy.export.graphs.onnx_from_module import Template, write_graph
from stiv_deploy.export.graphs.quantization import Quantization, StoredTensors, graph_scheme
from stiv_deploy.export.graphs.quantized_graph import quantized_template
from stiv_deploy.export.graphs.writer import GraphWriter
from stiv_deploy.export.parity.cuts import CutGraph
from stiv_deploy.export.parity.ladder import Sides, Subject, sides_of
from stiv_deploy.export.parity.modules import Measured, Modules
from stiv_deploy.export.parity.oracle import Tensors
from stiv_deploy.export.parity.pieces import Pieces
from stiv_deploy.runtime.bundle.contract import Format, Precision, dimensions, graph_specs
from stiv_deploy.stiv_ref.checkpoint import Checkpoint

GRAPH = "block_00"


class Block(NamedTuple):
    """The file of a block, the inputs of its graph, and what is right there."""

    path: Path
    given: Tensors
    sides: Sides
    precision: Precision
    quantization: Format | None

    def modules(self) -> Modules:
        """Its modules."""
        cut = CutGraph(self.path, {name: value.shape for name, value in self.given.items()})
        return Modules(cut, GRAPH, self.given, self.sides, self.precision)

    def measured(self) -> list[Measured]:
        """All its pieces, run in ONNX Runtime."""
        return list(self.modules().measure(self.pieces()))

    def pieces(self) -> Pieces:
        """What runs them."""
        return Pieces("onnxruntime", self.quantization, self.precision)

    def edited(self, folder: Path, edit: Callable[[onnx.ModelProto, np.ndarray], None]) -> "Block":
        """A copy in ``folder`` whose graph, or whose data in bytes, ``edit`` has changed."""
        for end in ("onnx", "onnx.data"):
            shutil.copy(self.path.with_name(f"{GRAPH}.{end}"), folder)
        path = folder / self.path.name
        model, data = onnx.load(path, load_external_data=False), np.fromfile(f"{path}.data", np.uint8)
        edit(model, data)
        onnx.save(model, path)
        data.tofile(f"{path}.data")
        return self._replace(path=path)


MakeBlock = Callable[..., Block]


def template_of(path: Path) -> Template:
    """The template that a block's file was written from."""
    model = ir.load(path)
    stored = [value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]
    for value in stored:
        value.const_value = None
    names = [value.name or "" for value in stored]
    matrices = (node.inputs[1] for node in model.graph if node.op_type in ("MatMul", "Gemm"))
    transposed = frozenset(value.name or "" for value in matrices if value is not None) & {*names}
    return Template(model=model, parameters=tuple(names), transposed=transposed)


@pytest.fixture(scope="session")
def block(
    micro: Checkpoint,
    micro_bundle: Path,
    once: Callable[[str, Callable[[Path], object]], Path],
    quantize: Callable[[Format], Quantization],
) -> MakeBlock:
    """``block(quantization, precision)``: the first block, float32 with 8 bits or another type; do not write into it.

    It takes the seconds of an export, in half precision also those of a trace: for slow tests.
    """
    facts, config = model_facts(micro.config), micro.config.model
    written = micro_bundle / "onnx" / f"{GRAPH}.onnx"

    def quantized(chosen: Quantization, folder: Path) -> None:
        folder.mkdir()
        scheme = graph_scheme(chosen, config, GRAPH)
        tensors = StoredTensors(graph_modules(micro)[GRAPH], GRAPH, torch.float32, scheme, chosen.scales.amax)
        write_graph(quantized_template(template_of(written), scheme, config.head_dim), tensors, folder, GRAPH)

    def half(precision: Precision, folder: Path) -> None:
        folder.mkdir()
        GraphWriter(micro, folder, precision).write(GRAPH)

    def file(chosen: Quantization | None, precision: Precision) -> Path:
        if precision != "float32":
            return once(f"block in {precision}", partial(half, precision)) / written.name
        return (
            written if chosen is None else once(f"block in {chosen.format}", partial(quantized, chosen)) / written.name
        )

    def make(quantization: Format | None = None, precision: Precision = "float32") -> Block:
        chosen = None if quantization is None else quantize(quantization)
        record, scales = (None, None) if chosen is None else (chosen.record(), chosen.scales)
        manifest: Any = SimpleNamespace(precision=precision, model=facts, quantization=record)
        bundle: Any = SimpleNamespace(manifest=manifest)
        sides = sides_of(Subject(bundle=bundle, checkpoint=micro, scales=scales), lean=True)
        dims = dimensions(facts, batch=1, model_batch=2, video_frames=4, height=16, width=24, text_tokens=5)
        given = draw_inputs(graph_specs(facts, precision)[GRAPH], dims, micro.config.text.vocabulary)
        return Block(file(chosen, precision), given, sides, precision, quantization)

    return make
