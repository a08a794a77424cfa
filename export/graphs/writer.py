"""Every graph of a bundle: traced, written with its values, and checked, one after another."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs.check import CheckRow, check_graph, draw_inputs, executable, graph_sizes
from stiv_deploy.export.graphs.modules import FLOAT32_GRAPHS, Module, graph_modules, model_facts
from stiv_deploy.export.graphs.nvfp4_graph import engine_template, twin_template
from stiv_deploy.export.graphs.onnx_from_module import (
    Template,
    structure_faults,
    trace,
    write_graph,
    write_second_form,
)
from stiv_deploy.export.graphs.plugin_nodes import plugin_names
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.graphs.quantization import (
    EngineTensors,
    LayerScheme,
    Quantization,
    StoredTensors,
    graph_scheme,
)
from stiv_deploy.export.graphs.quantized_graph import quantized_template
from stiv_deploy.export.graphs.reduced_check import check_reduced
from stiv_deploy.export.graphs.reduced_form import reduced_template
from stiv_deploy.runtime.bundle.contract import (
    VAE_GRAPHS,
    GraphSpec,
    ModelFacts,
    Precision,
    Reduced,
    block_of,
    graph_specs,
    is_block,
    is_half,
)
from stiv_deploy.runtime.bundle.engine_files import Attention
from stiv_deploy.runtime.bundle.manifest import (
    Bucket,
    FileRecord,
    Fp4Form,
    GraphRecord,
    PluginForm,
    ReducedForm,
)
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.fused.modules import fuse
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.text import text_dtype

GRAPH_FOLDER = "onnx"


class GraphWriter:
    """Writes graphs of ``checkpoint`` into ``folder``, in ``precision`` and 8 or 4 bits where ``quantization`` says so.

    The blocks share one trace, and blocks with equal plans one quantized template. With ``attention`` ``plugin`` each
    block has a second file with plugin nodes, with a ``vae_precision`` of 16 bits each graph of the VAE one in it, in
    NVFP4 each quantized graph one for engines. With ``halves`` each block has graphs of its halves, which are written
    after it and read its weights. With ``skips`` there are the graphs of steps that skip the blocks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        precision: Precision,
        quantization: Quantization | None = None,
        attention: Attention = "native",
        vae_precision: Precision = "float32",
        *,
        halves: bool = False,
        skips: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.folder = folder
        self.dtype = torch_dtype(precision)
        self.quantization = quantization
        self.attention = attention
        self.vae_precision = vae_precision
        self.facts = model_facts(checkpoint.config)
        self.halves, self.skips = halves, skips
        self.specs = graph_specs(self.facts, precision, halves=halves, skips=skips)
        self.modules = self.modules_of(checkpoint)
        self._weights: dict[str, FileRecord | None] = {}
        self._templates: dict[tuple[str, tuple[LayerScheme, ...], Attention], Template] = {}
        self._checked: set[str] = set()

    def modules_of(self, checkpoint: Checkpoint) -> Mapping[str, nn.Module]:
        """All graphs that it writes, as modules of ``checkpoint``."""
        return graph_modules(checkpoint, halves=self.halves, skips=self.skips)

    def write_all(self, buckets: Sequence[Bucket], check: bool, progress: Progress) -> dict[str, GraphRecord]:
        """Write every graph and, with ``check``, compare it with the reference at the sizes of ``buckets``."""
        records: dict[str, GraphRecord] = {}
        for done, name in enumerate(self.modules):
            progress(name, done, len(self.modules))
            records[name] = self.write(name)
            if check:
                progress(f"{name}, compared with the reference", done, len(self.modules))
                self.check(name, records[name].topology, buckets)
                self.check_plugin(name, records[name], buckets)
                self.check_reduced(name, records[name], buckets)
        progress("manifest", len(self.modules), len(self.modules))
        return records

    def write(self, name: str) -> GraphRecord:
        """Write one graph, check its structure, and return its record, paths relative to the bundle.

        A half is written after its block, before the next one.
        """
        if is_half(name):
            return self._write_half(name)
        scheme = self._scheme(name)
        amax = None if self.quantization is None else self.quantization.scales.amax
        tensors = StoredTensors(self.modules[name], name, self._dtype(name), scheme, amax)
        native = self._template(name, scheme, "native")
        record = write_checked(native, tensors, self.folder, name, self.specs[name])
        self._weights = {name: record.data}
        if name in VAE_GRAPHS and self.vae_precision != "float32":
            return record.model_copy(update={"reduced": self._reduced_form(native, name, self.vae_precision)})
        if any(layer.format == "nvfp4" for layer in scheme):
            return record.model_copy(update={"fp4": self._fp4_form(name, scheme)})
        if self.attention == "native" or not is_block(name):
            return record
        plugin = self._plugin_form(native, self._template(name, scheme, "plugin"), name)
        return record.model_copy(update={"plugin": plugin})

    def _write_half(self, name: str) -> GraphRecord:
        """Write the graph of a half, over the data file that its block was just written with."""
        block, scheme = block_of(name), self._scheme(name)
        first = self._template(block, self._scheme(block), "native")
        written = write_second_form(self._template(name, scheme, "native"), first, self.folder, name, part=True)
        check_structure(self.folder, name, self.specs[name])
        record = GraphRecord(
            file=_inside(written.file), data=self._weights[block], topology=written.topology, spec=self.specs[name]
        )
        if self.attention == "native":
            return record
        return record.model_copy(
            update={"plugin": self._plugin_form(first, self._template(name, scheme, "plugin"), name)}
        )

    def _plugin_form(self, native: Template, template: Template, name: str) -> PluginForm:
        """Write the second file of a graph, over the data file that ``native`` was just written with."""
        form = plugin_file(name)
        written = write_second_form(template, native, self.folder, form, part=is_half(name))
        check_structure(self.folder, form, self.specs[name])
        return PluginForm(
            file=_inside(written.file), topology=written.topology, plugins=plugin_names(template.model.graph)
        )

    def _fp4_form(self, name: str, scheme: tuple[LayerScheme, ...]) -> Fp4Form:
        """Write the form for engines of a graph in NVFP4, with a data file of its own."""
        assert self.quantization is not None
        form = f"{name}.nvfp4"
        tensors = EngineTensors(self.modules[name], name, self._dtype(name), scheme, self.quantization.scales.amax)
        template = engine_template(self._template(name, (), "native"), scheme)
        record = write_checked(template, tensors, self.folder, form, self.specs[name])
        assert record.data is not None
        return Fp4Form(file=record.file, data=record.data, topology=record.topology)

    def _reduced_form(self, native: Template, name: str, precision: Reduced) -> ReducedForm:
        """Write the form in 16 bits of a graph, over the data file that ``native`` was just written with."""
        form = f"{name}.{precision}"
        written = write_second_form(reduced_template(native, precision), native, self.folder, form)
        check_structure(self.folder, form, self.specs[name])
        return ReducedForm(file=_inside(written.file), topology=written.topology, precision=precision)

    def check_reduced(self, name: str, record: GraphRecord, buckets: Sequence[Bucket]) -> None:
        """Compare the form in 16 bits of a graph, if it has one, with the reference at one size.

        Raises :class:`CheckError` where it differs by more than its type does, or a decoded video by more than
        :data:`~stiv_deploy.export.graphs.reduced_check.LEAST_PSNR` allows.
        """
        if record.reduced is not None:
            (dims,) = _sizes(name, buckets, self.facts, everywhere=False).values()
            inputs = draw_inputs(self.specs[name], dims, self.checkpoint.config.text.vocabulary)
            precision, module = record.reduced.precision, self.modules[name]
            plain = in_precision(module, torch_dtype(precision))
            check_reduced(name, self.folder / f"{name}.{precision}.onnx", precision, module, plain, inputs)

    def check(self, name: str, topology: str, buckets: Sequence[Bucket]) -> None:
        """Compare a written graph with the reference; raises :class:`CheckError` where it differs.

        Bfloat16 graphs are not executed: ONNX Runtime has no such kernels on CPUs.
        """
        self._check(name, name, topology, buckets)

    def check_plugin(self, name: str, record: GraphRecord, buckets: Sequence[Bucket]) -> None:
        """The same for the plugin form of a graph, if it has one, which is compared with its native form too."""
        if record.plugin is not None:
            self._check(name, plugin_file(name), record.plugin.topology, buckets)

    def _check(self, name: str, file: str, topology: str, buckets: Sequence[Bucket]) -> None:
        if not executable(self.specs[name]):
            return
        sizes = _sizes(name, buckets, self.facts, everywhere=topology not in self._checked)
        quantization = self.quantization.format if self.quantization and self.quantizes(name) else None
        rows = check_graph(
            file,
            self.folder / f"{file}.onnx",
            self.specs[name],
            self.modules[name],
            self.simulated(name) if quantization else self.plain(name),
            sizes,
            self.checkpoint.config.text.vocabulary,
            quantization,
            None if file == name else self.folder / f"{name}.onnx",
        )
        require_passed(rows)
        self._checked.add(topology)

    def _scheme(self, name: str) -> tuple[LayerScheme, ...]:
        if self.quantization is None:
            return ()
        return graph_scheme(self.quantization, self.checkpoint.config.model, name)

    def _dtype(self, name: str) -> torch.dtype:
        if name == "text_encoder":
            return text_dtype(self.checkpoint.config.text, self.dtype)
        return torch.float32 if name in FLOAT32_GRAPHS else self.dtype

    def _template(self, name: str, scheme: tuple[LayerScheme, ...], attention: Attention) -> Template:
        """The template of a graph, made when first asked for; blocks are one kind of graph, as are halves of each."""
        kind = name.partition("_")[0] if is_block(name) or is_half(name) else name
        plain, wanted = (kind, (), attention), (kind, scheme, attention)
        if plain not in self._templates:
            module = self.plain(name)
            module = fused_view(module) if attention == "plugin" else module
            self._templates[plain] = trace(module, kind, self.specs[name], self.facts)
        if wanted not in self._templates:
            head_dim = self.checkpoint.config.model.head_dim
            if any(layer.format == "nvfp4" for layer in scheme):
                self._templates[wanted] = twin_template(self._templates[plain], scheme)
            else:
                self._templates[wanted] = quantized_template(self._templates[plain], scheme, head_dim)
        return self._templates[wanted]

    def plain(self, name: str) -> nn.Module:
        """The graph's module itself where it is float32, else a copy in the bundle's precision."""
        return in_precision(self.modules[name], self._dtype(name))

    def quantizes(self, name: str) -> bool:
        """Whether the graph has layers in 8 or 4 bits."""
        return bool(self._scheme(name))

    @cached_property
    def simulated_model(self) -> Stiv:
        """The fake-quantized model, in the bundle's precision."""
        from stiv_deploy.calibration.quantize import fake_quantized

        assert self.quantization is not None
        model = in_precision(self.checkpoint.model, self.dtype)
        return fake_quantized(model, self.quantization.scales, self.quantization.plan)

    def simulated(self, name: str) -> nn.Module:
        """The graph's module of the fake-quantized model, in the bundle's precision."""
        return self._simulated[name]

    @cached_property
    def _simulated(self) -> Mapping[str, nn.Module]:
        return self.modules_of(replace(self.checkpoint, model=self.simulated_model))


def in_precision(module: Module, dtype: torch.dtype) -> Module:
    """``module`` itself if it is of type ``dtype``, else a copy; the copy's parameters are never in float32 twice."""
    state: list[Tensor] = [*module.parameters(), *module.buffers()]
    if all(tensor.dtype == dtype or not tensor.is_floating_point() for tensor in state):
        return module
    cast = {
        id(tensor): nn.Parameter(tensor.to(dtype), requires_grad=False)
        if isinstance(tensor, nn.Parameter)
        else tensor.to(dtype)
        for tensor in state
        if tensor.is_floating_point()
    }
    return copy.deepcopy(module, cast)  # what deepcopy finds in its memo it does not copy


def fused_view(module: Module) -> Module:
    """A copy of a block's graph module with fused attention; it shares the parameters."""
    state: list[Tensor] = [*module.parameters(), *module.buffers()]
    view = copy.deepcopy(module, {id(tensor): tensor for tensor in state})
    return fuse(view)


def plugin_file(name: str) -> str:
    """Name of the file of a graph's plugin form, without its suffix."""
    return f"{name}.plugin"


def write_checked(
    template: Template, tensors: Mapping[str, Tensor], folder: Path, name: str, spec: GraphSpec
) -> GraphRecord:
    """Write one graph into ``folder``, check its structure, and return its record, paths relative to the bundle."""
    written = write_graph(template, tensors, folder, name)
    check_structure(folder, name, spec)
    data = _inside(written.data) if written.data else None
    return GraphRecord(file=_inside(written.file), data=data, topology=written.topology, spec=spec)


def check_structure(folder: Path, name: str, spec: GraphSpec) -> None:
    """Raise :class:`CheckError` if a written graph is not one, or not that of ``spec``."""
    faults = structure_faults(folder / f"{name}.onnx", spec)
    if faults:
        raise CheckError(f"graph {name} is not what the contract says: {faults[0]}; please report this")


def _inside(record: FileRecord) -> FileRecord:
    """``record`` with its path from the bundle's folder."""
    return record.model_copy(update={"path": f"{GRAPH_FOLDER}/{record.path}"})


def _sizes(name: str, buckets: Sequence[Bucket], facts: ModelFacts, everywhere: bool) -> dict[str, dict[str, int]]:
    """Sizes to check at. Where a graph of this topology was checked everywhere, one odd size proves the weights."""
    sizes = {
        f"{which} of bucket {bucket.name}": dims
        for bucket in buckets
        for which, dims in graph_sizes(name, bucket, facts).items()
    }
    return sizes if everywhere else dict([next(item for item in sizes.items() if item[0].startswith("odd"))])


def require_passed(rows: Iterator[CheckRow]) -> None:
    """Raise :class:`CheckError` at the first row that failed."""
    for row in rows:
        if not row.passed:
            raise CheckError(
                f"graph {row.graph} differs from {row.against} at the {row.size}: relative L2 error {row.rel_l2:.1e}, "
                f"at most {row.gate:.1e} allowed; check the versions of torch and onnxruntime"
            )
