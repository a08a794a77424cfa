"""The TensorRT plugin library: found, hashed, and put into TensorRT's registry once, with a stand-in for TensorRT."""

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.plugins import library as library_module
from stiv_deploy.runtime.plugins import tensorrt_plugins as module
from stiv_deploy.runtime.plugins.spec import DOMAIN, PLUGINS, VERSION
from stiv_deploy.runtime.plugins.tensorrt_plugins import (
    PLUGIN_LIBRARY,
    PLUGIN_LIBRARY_VARIABLE,
    PluginLibrary,
    load_plugins,
    plugin_library,
)

NAMES = [plugin.name for plugin in PLUGINS]


class FakeRegistry:
    """Stands for ``IPluginRegistry``: libraries hold the creators that ``holds`` says."""

    def __init__(self, names: list[str], version: str = VERSION, domain: str = DOMAIN) -> None:
        self.holds = {(name, version, domain) for name in names}
        self.creators: set[tuple[str, str, str]] = set()
        self.loaded: list[str] = []
        self.refuse = False

    def load_library(self, path: str) -> str | None:
        if self.refuse or self.creators & self.holds:  # documented: None if any of the plugins are registered already
            return None
        self.loaded.append(path)
        self.creators |= self.holds
        return path

    def deregister_library(self, handle: str) -> None:
        assert handle in self.loaded
        self.creators -= self.holds

    def get_creator(self, name: str, version: str, plugin_namespace: str = "") -> tuple[str, str, str] | None:
        creator = (name, version, plugin_namespace)
        return creator if creator in self.creators else None


def tensorrt(registry: FakeRegistry) -> Any:
    return SimpleNamespace(__name__="tensorrt", __version__="11.4", get_plugin_registry=lambda: registry)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has loaded nothing."""
    monkeypatch.setattr(module, "_loaded", {})


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets files that are no libraries be opened; returns which were."""
    paths: list[str] = []
    monkeypatch.setattr(module, "CDLL", paths.append)
    return paths


@pytest.fixture
def library(tmp_path: Path, opened: list[str]) -> PluginLibrary:
    return make(tmp_path / PLUGIN_LIBRARY, b"library")


def make(path: Path, content: bytes) -> PluginLibrary:
    path.write_bytes(content)
    return PluginLibrary.at(path)


def refused(trt: Any, library: PluginLibrary) -> str:
    with pytest.raises(BackendError) as caught:
        load_plugins(trt, library)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_installed_library_and_its_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library_module, "FOLDER", tmp_path)
    (tmp_path / PLUGIN_LIBRARY).write_bytes(b"library")
    found = plugin_library()
    assert found == PluginLibrary(tmp_path / PLUGIN_LIBRARY, hashlib.sha256(b"library").hexdigest())
    assert str(found) == f"{tmp_path / PLUGIN_LIBRARY} ({hashlib.sha256(b'library').hexdigest()[:12]})"


def test_the_variable_goes_before_the_installed_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(library_module, "FOLDER", tmp_path)
    (tmp_path / PLUGIN_LIBRARY).write_bytes(b"installed")
    (tmp_path / "other.so").write_bytes(b"other")
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(tmp_path / "other.so"))
    assert plugin_library().path == tmp_path / "other.so"
    monkeypatch.setenv(PLUGIN_LIBRARY_VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(BackendError, match=f"{PLUGIN_LIBRARY_VARIABLE} names .*absent.so, which is not a file; build"):
        plugin_library()


def test_a_missing_library_names_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PLUGIN_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(library_module, "FOLDER", tmp_path)
    wanted = (
        f"none at .*{PLUGIN_LIBRARY}; build it with `make plugins TENSORRT_ROOT=DIR`.*`cmake -S .*--target install`"
    )
    with pytest.raises(BackendError, match=wanted) as caught:
        plugin_library()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(sys.platform == "win32", reason="a folder cannot be opened as a file in another way there")
def test_an_unreadable_library(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"cannot be read \(Is a directory\); build it with"):
        PluginLibrary.at(tmp_path)


def test_it_is_loaded_once(library: PluginLibrary) -> None:
    registry = FakeRegistry(NAMES)
    trt = tensorrt(registry)
    load_plugins(trt, library)
    load_plugins(trt, PluginLibrary.at(library.path))
    assert registry.loaded == [str(library.path)]
    assert all(registry.get_creator(name, VERSION, DOMAIN) for name in NAMES)


def test_another_library_of_the_same_names_is_refused(library: PluginLibrary, tmp_path: Path) -> None:
    registry = FakeRegistry(NAMES)
    trt, other = tensorrt(registry), make(tmp_path / "other.so", b"other")
    load_plugins(trt, library)
    message = refused(trt, other)
    assert f"{other} cannot be loaded: this process has {library} already" in message
    assert registry.loaded == [str(library.path)]


def test_names_that_something_else_has_taken(library: PluginLibrary) -> None:
    """As after the quickly deployable packaging was registered in this process."""
    registry = FakeRegistry(NAMES)
    registry.creators |= registry.holds
    message = refused(tensorrt(registry), library)
    assert f"TensorRT 11.4 refused the plugin library {library.path}" in message
    assert "registered plugins of these names" in message


def test_a_refusal_is_not_remembered(library: PluginLibrary) -> None:
    registry = FakeRegistry(NAMES)
    trt = tensorrt(registry)
    registry.refuse = True
    refused(trt, library)
    registry.refuse = False
    load_plugins(trt, library)
    assert registry.loaded == [str(library.path)]


@pytest.mark.parametrize(
    ("names", "version", "domain"), [(NAMES[:1], VERSION, DOMAIN), (NAMES, "9", DOMAIN), (NAMES, VERSION, "")]
)
def test_a_library_without_our_creators(library: PluginLibrary, names: list[str], version: str, domain: str) -> None:
    registry = FakeRegistry(names, version, domain)
    message = refused(tensorrt(registry), library)
    assert (
        f"has no {', '.join(NAMES[len(names) % len(NAMES) :])} version {VERSION} in the namespace '{DOMAIN}'" in message
    )
    assert not registry.creators, "it is taken out again"


def test_a_file_that_is_no_library_is_refused_with_the_linkers_words(tmp_path: Path) -> None:
    registry = FakeRegistry(NAMES)
    message = refused(tensorrt(registry), make(tmp_path / PLUGIN_LIBRARY, b"not ELF"))
    assert "cannot be loaded (" in message
    assert "make plugins TENSORRT_ROOT" in message
    assert not registry.loaded


def test_a_tensorrt_without_plugins(library: PluginLibrary) -> None:
    message = refused(SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7.1"), library)
    assert "tensorrt_rtx takes no plugins; use --backend tensorrt or engines of --attention native" in message
