"""How often a command reads a checkpoint: for a large one each pass over its files takes a minute."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.graphs import writer
from stiv_deploy.export.graphs.quantization import Quantization
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.stiv_ref import checkpoint as checkpoints

WEIGHTS = ("model.safetensors", "text_encoder.safetensors", "vae.safetensors")
_listeners: list[Callable[[str], None]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        for listener in _listeners:
            listener(str(arguments[0]))


sys.addaudithook(_hear)


@contextmanager
def opened(folder: Path) -> Iterator[Counter[str]]:
    """Counts the files of ``folder`` that Python opens; safetensors reads weights by itself."""
    found: Counter[str] = Counter()

    def listen(name: str) -> None:
        if Path(name).parent == folder:
            found[Path(name).name] += 1

    _listeners.append(listen)
    try:
        yield found
    finally:
        _listeners.remove(listen)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the files that safetensors loads."""
    found: Counter[str] = Counter()
    load = checkpoints.load_file

    def counted(path: Path) -> Any:
        found[path.name] += 1
        return load(path)

    monkeypatch.setattr(checkpoints, "load_file", counted)
    return found


def test_an_export_in_8_bits_hashes_parses_and_loads_once(
    micro_path: Path,
    quantize: Callable[..., Quantization],
    saved: Callable[[Quantization], dict[str, Any]],
    loads: Counter[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writer.GraphWriter, "write_all", lambda *_: {})
    request = ExportRequest(
        checkpoint=micro_path, out=tmp_path / "bundle", precision="float16", check=False, **saved(quantize("fp8"))
    )
    with opened(micro_path) as found:
        report = export_bundle(request)
    assert report.manifest.checkpoint == checkpoints.checkpoint_hash(micro_path)
    assert loads == Counter(WEIGHTS)
    assert {name: found[name] for name in WEIGHTS} == dict.fromkeys(WEIGHTS, 1), "hashed once"
    assert found["config.json"] == 2, "hashed once, parsed once"
