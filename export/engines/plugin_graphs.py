"""Graphs with plugin nodes on their way into engines: checked before a build, and made ready for TensorRT's parser.

Their nodes become plugins in one of two packagings: those of the plugin library, which the engine then needs where it
runs, or quickly deployable ones, temporal attention only, whose kernels lie in the engine.
"""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stiv_deploy.export.engines.job import EngineJob
from stiv_deploy.runtime.errors import BackendError, EngineError
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, TEMPORAL_ATTENTION, VERSION
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

    from stiv_deploy.runtime.bundle.manifest import Manifest, PluginForm
    from stiv_deploy.runtime.plugins.tensorrt_plugins import PluginLibrary

BuildAttention = Literal["native", "plugin", "quick"]
"""What ``stiv build --attention`` takes; the last two build from graphs' plugin forms."""
EXPORT_AGAIN = "export the bundle again with: stiv export CHECKPOINT --out BUNDLE --attention plugin"
NAMES = tuple(plugin.name for plugin in PLUGINS)
KNOWN = tuple(f"{name}/{VERSION}" for name in NAMES)
"""Plugins of this package as a manifest names them."""
QUICK_PLUGINS = (TEMPORAL_ATTENTION.name,)
"""Plugins that have the quickly deployable packaging; of other nodes TensorRT takes the function bodies."""


@dataclass(frozen=True)
class Packaging:
    """How the plugin nodes of a build become plugins.

    ``library`` is what the engines need where they run, None if they need nothing. ``identity`` (SHA-256, hex) is of
    all code that gets into them. ``plugins`` are those that it has.
    """

    library: "PluginLibrary | None"
    identity: str
    plugins: Collection[str] = KNOWN

    def takes(self, form: "PluginForm | None") -> bool:
        """Whether nodes of ``form`` become plugins; of none of them the graph's native form is the better one."""
        return form is not None and not set(self.plugins).isdisjoint(form.plugins)


def choose_packaging(
    trt: Any, manifest: "Manifest", graphs: Sequence[str], flavour: Flavour, attention: BuildAttention
) -> Packaging | None:
    """The packaging that ``attention`` means for those of ``graphs`` that have a plugin form; None for native builds.

    The plugin library is loaded in this process too: what is wrong with it shows before a builder starts. Raises
    :class:`BackendError` for a TensorRT without plugins or without the package onnx, and where there is no such
    library; :class:`~stiv_deploy.runtime.errors.KernelError` where the quickly deployable packaging lacks its kernels
    or TensorRT's part of it; :class:`EngineError` where no graph of the bundle has a plugin form, or one that this
    package is not for, or none that the quickly deployable packaging is for.
    """
    if attention == "native":
        return None
    _check_builder(flavour)
    _check_forms(manifest, graphs)
    if attention == "quick":
        return _quick_packaging(manifest)
    from stiv_deploy.runtime.plugins.tensorrt_plugins import load_plugins, plugin_library

    library = plugin_library()
    load_plugins(trt, library)
    return Packaging(library, library.sha256)


def _check_builder(flavour: Flavour) -> None:
    if flavour != "tensorrt":
        raise BackendError(
            f"{TITLES[flavour]} takes no plugins: build with --attention native (it fuses attention itself), or with "
            "--backend tensorrt"
        )
    if find_spec("onnx") is None:
        raise BackendError("building with plugins needs onnx; run: pip install 'stiv-deploy[export]'")


def _check_forms(manifest: "Manifest", graphs: Sequence[str]) -> None:
    if all(graph.plugin is None for graph in manifest.graphs.values()):
        raise EngineError(f"no graph of this bundle has a form with plugins; {EXPORT_AGAIN}")
    wanted = {name for each in graphs if (form := manifest.graphs[each].plugin) is not None for name in form.plugins}
    unknown = sorted(wanted.difference(KNOWN))
    if unknown:
        raise EngineError(
            f"the bundle wants the plugins {', '.join(unknown)}, this package has {', '.join(KNOWN)}; {EXPORT_AGAIN}"
        )


def _quick_packaging(manifest: "Manifest") -> Packaging:
    """Of the library that cuts the work into thread blocks and of the kernels for the bundle's type and head size."""
    from stiv_deploy.runtime.plugins.library import KernelDtype, open_library
    from stiv_deploy.runtime.plugins.quick.temporal_attention import ptx_file, require_tensorrt

    if not manifest.model.temporal:
        raise EngineError(
            "--attention quick has temporal attention only, the bundle is of an image model, which has none; build it "
            "with --attention plugin or native"
        )
    if manifest.precision == "float32":
        raise EngineError(
            "--attention quick has kernels for float16 and bfloat16, the bundle is float32; build it with --attention "
            "plugin, or export it with --precision bfloat16"
        )
    require_tensorrt()
    dtype, head_dim = KernelDtype[manifest.precision.upper()], manifest.model.head_dim
    files = [open_library().path, *(ptx_file(dtype, head_dim, fp8) for fp8 in (False, True))]
    identity = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return Packaging(None, identity, [f"{name}/{VERSION}" for name in QUICK_PLUGINS])


def prepare_plugins(trt: Any, job: EngineJob) -> bytes | None:
    """Register the plugins of ``job``, and return its graph for the parser; None if it has no plugin nodes.

    Raises what :func:`choose_packaging` and :func:`without_functions` do.
    """
    path = Path(job.onnx)
    if job.plugins is not None:
        from stiv_deploy.runtime.plugins.tensorrt_plugins import PluginLibrary, load_plugins

        load_plugins(trt, PluginLibrary.at(Path(job.plugins)))
        return without_functions(path)
    if job.quick:
        from stiv_deploy.runtime.plugins.quick.temporal_attention import register_temporal_attention

        register_temporal_attention(fp8_output=_writes_fp8(path))
        return without_functions(path, QUICK_PLUGINS)
    return None


def _writes_fp8(path: Path) -> bool:
    """Whether temporal attention of the graph in ``path`` has the scale of an FP8 output: its last input."""
    nodes = [node for node in _read(path).graph.node if (node.domain, node.op_type) == (DOMAIN, QUICK_PLUGINS[0])]
    return any(len(node.input) == len(TEMPORAL_ATTENTION.inputs) for node in nodes)


def without_functions(path: Path, names: Collection[str] = NAMES) -> bytes:
    """The ONNX file ``path`` without the function bodies of the plugins ``names``; weights stay in the file beside it.

    A parser that sees a body may expand it rather than look the plugin up. Read in onnx-tensorrt: up to TensorRT 10.6
    a local function goes before a plugin of that name; from 10.7 on the plugin does if it is in the registry, and the
    body is taken in silence if it is not. Without bodies a plugin that is missing is an error in every version. What
    is looked up is the node's type with its attributes ``plugin_version`` and ``plugin_namespace``, not the domain
    (which later parsers try second). Raises :class:`EngineError` if the file is no plugin form of a graph.
    """
    model = _read(path)
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if not nodes:
        raise EngineError(f"{path.name} has no nodes of the domain {DOMAIN!r}; {EXPORT_AGAIN}")
    for node in nodes:
        _check_node(path, node)
    kept = [function for function in model.functions if function.domain != DOMAIN or function.name not in names]
    del model.functions[:]
    model.functions.extend(kept)
    return model.SerializeToString()


def _read(path: Path) -> "ModelProto":
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own kinds of DecodeError
        raise EngineError(f"{path.name}: not a readable ONNX file ({error}); {EXPORT_AGAIN}") from None


def _check_node(path: Path, node: "NodeProto") -> None:
    values = {attribute.name: attribute.s.decode() for attribute in node.attribute}
    found = node.op_type, values.get("plugin_version"), values.get("plugin_namespace")
    if found not in [(name, VERSION, DOMAIN) for name in NAMES]:
        raise EngineError(
            f"{path.name}: node {node.name or node.op_type} is {found[0]}, plugin_version {found[1]}, "
            f"plugin_namespace {found[2]}; this package has {', '.join(KNOWN)} in {DOMAIN!r}; {EXPORT_AGAIN}"
        )
