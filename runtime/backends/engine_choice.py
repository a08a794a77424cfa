"""Which engines of a bundle this GPU, library and plugin library can use, and the command that makes others."""

from stiv_deploy.runtime.bundle.engine_files import attention_form, sm_folder
from stiv_deploy.runtime.bundle.manifest import PORTABLE, EngineRecord, Manifest
from stiv_deploy.runtime.errors import EngineError
from stiv_deploy.runtime.plugins.tensorrt_plugins import SHORT, PluginLibrary
from stiv_deploy.runtime.tensorrt_library import TITLES, Flavour


def build_command(flavour: Flavour, sm: str, attention: str = "native", *, shared: bool = False) -> str:
    """The command that makes the engines anew; ``shared`` if weights are to be their inputs."""
    form = "" if attention == "native" else f" --attention {attention}"
    return f"run: stiv build BUNDLE --backend {flavour} --sm {sm}{form}{' --shared-plan' if shared else ''}"


def same_again(record: EngineRecord, manifest: Manifest, sm: str | None = None) -> str:
    """The command that makes the engine of ``record`` anew, with plugins if it has some and its graph still can.

    ``sm`` is what to build for, by default what it was built for.
    """
    graph, attention = manifest.graphs.get(record.graph), "native"
    if record.plugins is not None and graph is not None and graph.plugin is not None:
        attention = "plugin"
    elif record.plugins is None and attention_form(record, manifest) == "plugin":
        attention = "quick"  # its plugins lie in the engine
    return build_command(record.backend, sm or record.sm, attention, shared=bool(record.weights))


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
