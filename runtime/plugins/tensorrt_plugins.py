"""The TensorRT plugin library: found, told from others by its SHA-256, and put into TensorRT's registry.

Builders need it to parse graphs with plugin nodes, the runtime to load engines made of them: TensorRT looks plugins up
by name, version and namespace in both, and has no other link between an engine and the library it was built with.
"""

from ctypes import CDLL
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.files import sha256
from stiv_deploy.runtime.plugins.library import find_library
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, VERSION

PLUGIN_LIBRARY_VARIABLE = "STIV_TENSORRT_PLUGIN_LIBRARY"
PLUGIN_LIBRARY = "libstiv_plugins.so"
BUILD_HINT = (
    "build it with `make plugins TENSORRT_ROOT=DIR`, where DIR/include/NvInferRuntime.h is TensorRT's (nvcc and CMake "
    "3.25 needed), or by hand with `cmake -S . -B build/plugins -DTENSORRT_ROOT=DIR` and "
    "`cmake --build build/plugins --target install`"
)
SHORT = 12
"""Digits of a hash that are shown."""


@dataclass(frozen=True)
class PluginLibrary:
    """A plugin library: its file and the SHA-256 (hex) of it, which engines are recorded with."""

    path: Path
    sha256: str

    @classmethod
    def at(cls, path: Path) -> "PluginLibrary":
        """The library in the file ``path``; :class:`BackendError` if it cannot be read."""
        try:
            return cls(path=path.resolve(), sha256=sha256(path))
        except OSError as error:
            raise BackendError(f"plugin library {path} cannot be read ({error.strerror}); {BUILD_HINT}") from None

    def __str__(self) -> str:
        return f"{self.path} ({self.sha256[:SHORT]})"


def plugin_library() -> PluginLibrary:
    """The library that ``STIV_TENSORRT_PLUGIN_LIBRARY`` names, else the one that ``make plugins`` installed.

    Raises :class:`BackendError`, with the commands that build it, if there is none.
    """
    title = "TensorRT plugin library"
    return PluginLibrary.at(find_library(title, PLUGIN_LIBRARY_VARIABLE, PLUGIN_LIBRARY, BUILD_HINT, BackendError))


def open_in_process(library: PluginLibrary) -> CDLL:
    """Open ``library`` as the dynamic linker does, which needs neither TensorRT nor a GPU.

    Raises :class:`BackendError` with the linker's words; TensorRT itself only says that it failed.
    """
    try:
        return CDLL(str(library.path))
    except OSError as error:
        raise BackendError(f"plugin library {library.path} cannot be loaded ({error}); {BUILD_HINT}") from None


_lock = Lock()
_loaded: dict[int, tuple[Any, PluginLibrary]] = {}
"""By the identity of TensorRT's module (kept, so that the identity stays its own): the library in its registry."""


def load_plugins(trt: Any, library: PluginLibrary) -> None:
    """Register the plugins of ``library`` with ``trt``, TensorRT's module; once per process, further calls do nothing.

    Raises :class:`BackendError` if TensorRT refuses the library, if it lacks a plugin of
    :mod:`~stiv_deploy.runtime.plugins.spec`, or if this process has another one already.
    """
    with _lock:
        _, present = _loaded.get(id(trt), (trt, None))
        if present is None:
            _register(trt, library)
            _loaded[id(trt)] = trt, library
        elif present.sha256 != library.sha256:
            raise BackendError(
                f"plugin library {library} cannot be loaded: this process has {present} already, whose plugins have "
                "the same names; use one of them in one process"
            )


def _register(trt: Any, library: PluginLibrary) -> None:
    if not hasattr(trt, "get_plugin_registry"):
        raise BackendError(f"{trt.__name__} takes no plugins; use --backend tensorrt or engines of --attention native")
    open_in_process(library)
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(library.path))
    if handle is None:  # as documented: if the names are taken
        raise BackendError(
            f"TensorRT {trt.__version__} refused the plugin library {library.path}: something else in this process has "
            f"registered plugins of these names, or the library is of another TensorRT: {BUILD_HINT}"
        )
    missing = [plugin.name for plugin in PLUGINS if registry.get_creator(plugin.name, VERSION, DOMAIN) is None]
    if missing:
        registry.deregister_library(handle)
        raise BackendError(
            f"plugin library {library.path} has no {', '.join(missing)} version {VERSION} in the namespace {DOMAIN!r}: "
            f"it is of another version of this package; {BUILD_HINT}"
        )
