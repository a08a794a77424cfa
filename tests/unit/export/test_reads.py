"""How often a command reads a checkpoint: for a large one each pass over its files takes a minute."""

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs import writer
from stiv_deploy.export.graphs.quantization import Quantization
from stiv_deploy.export.parity import stage
from stiv_deploy.export.parity.ladder import ParityReport, Subject
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle import bundle as bundles
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.stiv_ref import checkpoint as checkpoints
from stiv_deploy.stiv_ref import weights

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
    load = weights.load_file

    def counted(path: Path) -> Any:
        found[path.name] += 1
        return load(path)

    monkeypatch.setattr(weights, "load_file", counted)
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


@pytest.mark.parametrize("named", [True, False])
def test_parity_hashes_parses_and_loads_once(
    micro_path: Path, loads: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.setattr(writer.GraphWriter, "write_all", lambda *_: {})
    export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", check=False))
    loads.clear()
    measured: list[Subject] = []

    def climb(subject: Subject, *_: Any) -> ParityReport:
        measured.append(subject)
        return ParityReport((), (), ())

    monkeypatch.setattr(stage, "climb", climb)
    monkeypatch.setattr(bundles, "check_contract", lambda *_: None)  # there are no graphs
    where = {"checkpoint": micro_path} if named else {"checkpoints": micro_path.parent}
    with opened(micro_path) as found:
        stage.run_parity(stage.ParityRequest(bundle=tmp_path / "bundle", **where))
    assert measured[0].checkpoint.path == micro_path
    assert loads == Counter(WEIGHTS)
    assert {name: found[name] for name in WEIGHTS} == dict.fromkeys(WEIGHTS, 1), "hashed once"
    assert found["config.json"] == 2, "hashed once, parsed once"


def test_parity_refuses_another_checkpoint_before_it_loads_one(
    micro_path: Path, loads: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.GraphWriter, "write_all", lambda *_: {})
    monkeypatch.setattr(bundles, "check_contract", lambda *_: None)
    export_bundle(ExportRequest(checkpoint=micro_path, out=tmp_path / "bundle", check=False))
    shutil.copytree(micro_path, tmp_path / "checkpoints" / "other")
    (tmp_path / "checkpoints" / "other" / "tokenizer.json").write_text("{}")
    (tmp_path / "checkpoints" / "broken").mkdir()
    (tmp_path / "checkpoints" / "broken" / "config.json").write_text("{}")
    loads.clear()
    with pytest.raises(BundleError, match="is not what .* was exported from"):
        stage.run_parity(stage.ParityRequest(bundle=tmp_path / "bundle", checkpoint=tmp_path / "checkpoints" / "other"))
    with pytest.raises(BundleError, match="is not below .*; name it with --checkpoint"):
        stage.run_parity(stage.ParityRequest(bundle=tmp_path / "bundle", checkpoints=tmp_path / "checkpoints"))
    assert not loads


def test_a_trajectory_of_one_step(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="--steps 1: a trajectory has at least 2"):
        stage.ParityRequest(bundle=tmp_path, steps=1)
