"""All graphs of a real bundle through the real TensorRT-RTX builder, on the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented

from stiv_deploy.export.bundle_from_checkpoint import export_bundle
from stiv_deploy.export.engines.build import BuildRequest, EngineBuild
from stiv_deploy.export.engines.epcontext import EpContextRequest, export_epcontext
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.progress import unheard
from stiv_deploy.runtime.tensorrt_library import missing_library

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx"))),
]


@pytest.fixture(scope="module")
def bfloat16_bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle(
        ExportRequest(
            checkpoint=checkpoint,
            out=tmp_path_factory.mktemp("bf16") / "bundle",
            precision="bfloat16",
            check=False,
            skips=True,
        )
    ).bundle


@pytest.fixture(scope="module")
def own_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the fp32 bundle to write engines into (links to its files: the engines are the only new ones)."""
    folder = tmp_path_factory.mktemp("own") / "bundle"
    for source in bundle.rglob("*"):
        target = folder / source.relative_to(bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            os.link(source, target)
    return folder


def build(folder: Path, sm: str, *graphs: str, rebuild: bool = False) -> EngineBuild:
    cache = folder.parent / "cache"
    request = BuildRequest(bundle=folder, backend="tensorrt-rtx", sm=sm, graphs=graphs, cache=cache, rebuild=rebuild)
    job = EngineBuild(request)
    job.run(unheard)
    return job


def test_all_float32_graphs_for_ada_then_from_the_cache(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(own_bundle, "89")
    bundle = Bundle.open(own_bundle)
    records = {record.graph: record for record in bundle.manifest.engines}
    assert records.keys() == bundle.manifest.graphs.keys()
    plans = {name: bundle.verified(record.file).read_bytes() for name, record in records.items()}
    assert all(b"sm89" in plan for plan in plans.values()), "the plan names its target"

    def no_child(*_: Any, **__: Any) -> None:
        raise AssertionError("a builder process was started")

    monkeypatch.setattr(subprocess, "Popen", no_child)
    build(own_bundle, "89")
    again = Bundle.open(own_bundle)
    assert {record.graph: again.verified(record.file).read_bytes() for record in again.manifest.engines} == plans


@pytest.mark.parametrize("sm", ["120", "86", "portable"])
def test_one_block_for_other_targets(own_bundle: Path, sm: str) -> None:
    build(own_bundle, sm, "block_00")
    (record,) = [record for record in Bundle.open(own_bundle).manifest.engines if record.sm == sm]
    assert record.file.bytes > 0


def test_all_bfloat16_graphs_for_blackwell(bfloat16_bundle: Path, tmp_path: Path) -> None:
    """Then as models with their engines inside, of which ONNX Runtime lacks nothing but the provider."""
    build(bfloat16_bundle, "120")
    manifest = Bundle.open(bfloat16_bundle).manifest
    assert {record.graph for record in manifest.engines} == manifest.graphs.keys()
    report = export_epcontext(EpContextRequest(bundle=bfloat16_bundle, out=tmp_path / "models", embed=True))
    assert len(report.models) == len(manifest.graphs)
    for name in report.models:
        with pytest.raises(NotImplemented, match="EPContext"):
            onnxruntime.InferenceSession(tmp_path / "models" / name, providers=["CPUExecutionProvider"])


@pytest.mark.alone
def test_ctrl_c_leaves_no_builder_and_nothing_half_written(own_bundle: Path) -> None:
    before = {path: path.read_bytes() for path in own_bundle.rglob("*") if path.is_file()}
    cache = own_bundle.parent / "other cache"
    command = [sys.executable, "-m", "stiv_deploy.runtime.command.main", "build", str(own_bundle), "--sm", "121"]
    process = subprocess.Popen(
        [*command, "--cache", str(cache)],
        stderr=subprocess.PIPE,
        text=True,
        # A shell gives its background jobs an ignored SIGINT, which would be handed on here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(cache.glob("plans/*")):  # made just before the first builder starts
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert text == "interrupted\n"
    assert {path: path.read_bytes() for path in own_bundle.rglob("*") if path.is_file()} == before
    assert not list(cache.rglob("*.partial"))
