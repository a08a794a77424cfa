"""ONNX files from graph modules: trace once into a template, write it with weights as often as wanted.

A template is the finished graph with parameters that have a name, type and shape but no values. The blocks of a model
differ in values only, so one trace serves them all.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import opset23
from torch import Tensor, nn
from torch.export import ExportedProgram

from stiv_deploy.export.graphs import passes, plugin_nodes
from stiv_deploy.export.graphs.lowering import rewritten_if_possible
from stiv_deploy.export.graphs.translations import read_once, translated
from stiv_deploy.runtime.bundle.contract import GraphSpec, ModelFacts, TensorSpec, dimensions
from stiv_deploy.runtime.bundle.manifest import FileRecord
from stiv_deploy.stiv_ref.quiet import quiet

OPSET = 23
"""The first opset with Attention, RMSNormalization and RotaryEmbedding."""
ALIGNMENT, PAGE, LARGE = 64, 4096, 2**20
"""Tensors start at multiples of 64 bytes, large ones (1 MiB) at page boundaries, so that they can be mapped."""

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.int8: ir.DataType.INT8,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN,
    torch.uint8: ir.DataType.FLOAT4E2M1,
}
"""ONNX types of parameters; 4-bit elements come one in each byte, and are written two in one."""


@dataclass(frozen=True, kw_only=True)
class Template:
    """A graph without weight values. ``transposed`` names the weights stored [in, out] instead of torch's [out, in]."""

    model: ir.Model
    parameters: tuple[str, ...]
    transposed: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class WrittenGraph:
    """Files of one graph, with paths as given by the writer's folder, and the hash of its topology."""

    file: FileRecord
    data: FileRecord | None
    topology: str


def parameters_of(module: nn.Module) -> dict[str, Tensor]:
    """State of a graph module by the names that the ONNX file uses."""
    return {passes.strip_prefix(name): tensor for name, tensor in module.state_dict().items()}


def trace(module: nn.Module, name: str, spec: GraphSpec, facts: ModelFacts) -> Template:
    """Export ``module`` with the contract's names and dynamic dimensions; ``name`` becomes the graph's name."""
    with (
        quiet("torch.onnx._internal.exporter._registration"),  # remarks on optional packages and deprecations
        read_once(OPSET),
        # Symbolic sizes rarely hit the cache of fake tensors: without it tracing takes a fifth less time.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
    ):
        exported = _translated(_program(module, spec, facts))
    return _finished(exported.model, name, spec, set(module.state_dict()))


def _program(module: nn.Module, spec: GraphSpec, facts: ModelFacts) -> ExportedProgram:
    sizes = _example_sizes(facts)
    example = tuple(torch.zeros(tensor.sized(sizes), dtype=getattr(torch, tensor.dtype)) for tensor in spec.inputs)
    return torch.export.export(
        module,
        example,
        dynamic_shapes=_dynamic_shapes(module, spec, facts),
        strict=False,
        # The token count of `head` is rows * columns, which no Dim can say: assert it instead of refusing.
        prefer_deferred_runtime_asserts_over_guards=True,
    )


def _translated(program: ExportedProgram) -> torch.onnx.ONNXProgram:
    own = _own_translations()
    with rewritten_if_possible(program, lambda operator: operator in own or translated(operator, OPSET)):
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=own, optimize=False, verbose=False
        )
    assert exported is not None
    return exported


def _own_translations() -> dict[Any, Callable[..., Any]]:
    """Translations in the place of the exporter's. Its reshape takes a size of 0 for the input's, its view does not."""
    from onnxscript.function_libs.torch_lib.ops.core import aten_view  # reads all translations

    aten = torch.ops.aten
    return {aten.scalar_tensor.default: _scalar, aten.reshape.default: aten_view, **plugin_nodes.translations()}


def _scalar(value: Any, dtype: int = ir.DataType.FLOAT, **_: object) -> Any:
    """A scalar constant in its own type: the exporter's translation rounds it to float32 first, float64 or not."""
    if isinstance(value, int | float):
        return opset23.Constant(value=ir.to_proto(ir.tensor(value, dtype=ir.DataType(dtype))))
    return opset23.Cast(value, to=dtype)


def _finished(model: ir.Model, name: str, spec: GraphSpec, state: set[str]) -> Template:
    """Run the passes over the exporter's raw graph and take the values out of its parameters."""
    graph = model.graph
    graph.name = name
    parameters = state & set(graph.initializers)
    transposed = passes.pretranspose(graph, parameters)
    passes.simplify(model, parameters)
    passes.apply_contract(graph, spec)
    passes.name_by_scope(graph)
    plugin_nodes.finish_plugin_nodes(model)
    names = [parameter for parameter in graph.initializers if parameter in parameters]
    for parameter in names:
        value = graph.initializers[parameter]
        value.const_value = None
        value.name = passes.strip_prefix(parameter)
    for holder in (model, graph):
        holder.metadata_props.clear()
        holder.doc_string = None
    return Template(
        model=model,
        parameters=tuple(passes.strip_prefix(parameter) for parameter in names),
        transposed=frozenset(passes.strip_prefix(parameter) for parameter in transposed),
    )


def _example_sizes(facts: ModelFacts) -> dict[str, int]:
    """Sizes to trace at: small, none 0 or 1 (which torch.export would take for constants)."""
    return dimensions(
        facts,
        batch=2,
        model_batch=6,
        video_frames=5 * facts.frame_multiple - facts.frame_padding,
        height=3 * facts.pixel_multiple,
        width=7 * facts.pixel_multiple,
        text_tokens=min(11, facts.max_text_tokens),
    )


def _dynamic_shapes(module: nn.Module, spec: GraphSpec, facts: ModelFacts) -> dict[str, dict[int, Any]]:
    """One torch.export dimension for each symbol; sizes that a patch must divide are multiples of a token dimension."""
    pt, ps = facts.patch
    units = {
        "frames": ("token_frames", pt, 0),
        "latent_height": ("token_rows", ps, 0),
        "latent_width": ("token_columns", ps, 0),
        "video_frames": ("video_units", facts.frame_multiple, facts.frame_padding),
        "height": ("height_units", facts.pixel_multiple, 0),
        "width": ("width_units", facts.pixel_multiple, 0),
    }
    roots: dict[str, Any] = {}

    def dim(symbol: str) -> Any:
        name, multiple, padding = units.get(symbol, (symbol, 1, 0))
        maximum = facts.max_text_tokens if symbol == "text_tokens" else None
        root = roots.setdefault(name, torch.export.Dim(name, min=1, max=maximum))
        whole = root if multiple == 1 else multiple * root
        return whole - padding if padding else whole

    return {
        tensor.name: {axis: dim(size) for axis, size in enumerate(tensor.shape) if isinstance(size, str)}
        for tensor in spec.inputs
    }


def write_graph(template: Template, tensors: Mapping[str, Tensor], folder: Path, name: str) -> WrittenGraph:
    """Write ``folder/<name>.onnx`` and, if the graph has parameters, ``<name>.onnx.data``.

    ``tensors`` are the parameters in torch's own layout by the template's names. Equal input gives equal bytes. The
    data file may be of any size (T5's largest encoder has 9 GiB in bfloat16).
    """
    data = _write_data(template, tensors, folder / f"{name}.onnx.data") if template.parameters else None
    return _write_model(template, folder / f"{name}.onnx", data)


def write_second_form(
    template: Template, first: Template, folder: Path, name: str, *, part: bool = False
) -> WrittenGraph:
    """Write ``folder/<name>.onnx``, another graph over the very parameters that ``first`` was just written with.

    All of them, or with ``part`` some.
    """
    written, own, some = first.model.graph.initializers, template.model.graph.initializers, set(template.parameters)
    fits = some <= set(first.parameters) if part else some == set(first.parameters)
    assert fits, f"{name}: other parameters than the first form's"
    assert template.transposed == first.transposed & some, f"{name}: weights lie otherwise than in the first form"
    for parameter in template.parameters:
        value = own[parameter]
        like = written[parameter]
        assert (value.shape, value.dtype) == (like.shape, like.dtype), f"{parameter}: other than in the first form"
        value.const_value = like.const_value
    return _write_model(template, folder / f"{name}.onnx", None)


def _write_model(template: Template, path: Path, data: FileRecord | None) -> WrittenGraph:
    """Write the graph itself, its initializers pointing at what is in the data file."""
    proto = ir.to_proto(template.model).SerializeToString(deterministic=True)
    path.write_bytes(proto)
    return WrittenGraph(
        file=FileRecord(path=path.name, sha256=hashlib.sha256(proto).hexdigest(), bytes=len(proto)),
        data=data,
        topology=topology_hash(path),
    )


def _write_data(template: Template, tensors: Mapping[str, Tensor], path: Path) -> FileRecord:
    """Write the parameters one after another and point the template's initializers at them."""
    digest = hashlib.sha256()
    offset = 0
    with path.open("wb") as file:
        for name in template.parameters:
            tensor = tensors[name].detach()
            tensor = (tensor.T if name in template.transposed else tensor).contiguous()
            raw = packed(tensor) if tensor.dtype == torch.uint8 else tensor.flatten().view(torch.uint8)
            padding = -offset % (PAGE if raw.nbytes >= LARGE else ALIGNMENT)
            for chunk in (bytes(padding), raw.numpy().data):
                digest.update(chunk)
                file.write(chunk)
            _point_at(template.model.graph.initializers[name], tensor, path, offset + padding, raw.nbytes)
            offset += padding + raw.nbytes
    return FileRecord(path=path.name, sha256=digest.hexdigest(), bytes=offset)


def packed(codes: Tensor) -> Tensor:
    """Codes of 4 bits, an even number of them, two in a byte [n / 2]: the first in the low half, as ONNX has them."""
    low, high = codes.flatten().unflatten(0, (-1, 2)).unbind(1)
    return low | high << 4


def _point_at(value: ir.Value, tensor: Tensor, path: Path, offset: int, length: int) -> None:
    assert (value.shape, value.dtype) == (ir.Shape(tensor.shape), DTYPES[tensor.dtype]), (
        f"{value.name}: other than traced"
    )
    value.const_value = ir.ExternalTensor(
        location=path.name,
        offset=offset,
        length=length,
        dtype=DTYPES[tensor.dtype],
        shape=ir.Shape(tensor.shape),
        name=value.name or "",
        base_dir=path.parent,
    )


def topology_hash(path: Path) -> str:
    """SHA-256 (hex) of an ONNX file without its external weights: equal for graphs that differ in those only."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        tensor.ClearField("external_data")
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def structure_faults(path: Path, spec: GraphSpec) -> Sequence[str]:
    """What the ONNX checker, shape inference and the contract find wrong in a written graph; empty if nothing."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [str(error).splitlines()[0]]
    model = onnx.load(path, load_external_data=False)
    faults = [*_misfits(model.graph.input, spec.inputs), *_misfits(model.graph.output, spec.outputs)]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for value, tensor in zip(inferred.graph.output, spec.outputs, strict=True):
        sizes = [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim]
        known = zip(sizes, tensor.shape, strict=False)
        if len(sizes) != len(tensor.shape) or any(
            a != b for a, b in known if isinstance(a, int) and isinstance(b, int)
        ):
            faults.append(f"{tensor.name}: inferred shape {sizes}, the contract has {tensor.shape}")
    return faults


def _misfits(values: Iterable[onnx.ValueInfoProto], tensors: Sequence[TensorSpec]) -> list[str]:
    found = [_described(value) for value in values]
    wanted = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    return [] if found == wanted else [f"the file has {found}, the contract {wanted}"]


def _described(value: onnx.ValueInfoProto) -> tuple[str, str, tuple[int | str, ...]]:
    kind = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower()
    shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
    return value.name, {"float": "float32"}.get(dtype, dtype), shape
