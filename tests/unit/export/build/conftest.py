"""``stiv`` as typed, and a bundle to build where no builder looks at the graphs."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stiv_deploy.runtime.bundle.bundle import file_record, write_manifest
from stiv_deploy.runtime.bundle.contract import ModelFacts, graph_specs
from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.bundle.manifest import Bucket, GraphRecord, Manifest, Range, SamplingDefaults

FACTS = ModelFacts(
    name="toy",
    blocks=3,
    width=8,
    heads=2,
    patch=(1, 1),
    latent_channels=4,
    text_width=4,
    max_text_tokens=5,
    base_frames=2,
    base_grid=(2, 2),
    rope_theta=100.0,
    temporal=True,
    spatial_factor=2,
    temporal_factor=1,
)
SAMPLING = SamplingDefaults(
    frames=4, height=8, width=8, frames_per_second=8, steps=4, guidance_scale=3.0, image_scale=1.5, time_shift=1.0
)


def bucket(name: str, frames: int) -> Bucket:
    side, one = Range(min=4, typical=8, max=12), Range(min=1, typical=1, max=2)
    return Bucket(name=name, batch=one, frames=Range(min=1, typical=2, max=frames), height=side, width=side)


@pytest.fixture
def stiv(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Runs ``stiv`` with arguments; returns its exit code and standard error."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["stiv", *map(str, arguments)])
        code = main()
        return code, capsys.readouterr().err

    return run


@pytest.fixture
def words_bundle(tmp_path: Path) -> Path:
    """A bundle whose graph files are words: no builder looks at them here. Blocks 1 and 2 have equal contents."""
    path = tmp_path / "bundle"
    (path / "onnx").mkdir(parents=True)
    (path / "tokenizer.json").write_text("{}")
    graphs = {}
    for name, spec in graph_specs(FACTS, "float32").items():
        (path / f"onnx/{name}.onnx").write_text("block" if name in ("block_01", "block_02") else f"graph {name}")
        (path / f"onnx/{name}.onnx.data").write_text("weights")
        graphs[name] = GraphRecord(
            file=file_record(path, f"onnx/{name}.onnx"),
            data=file_record(path, f"onnx/{name}.onnx.data"),
            topology="0" * 64,
            spec=spec,
        )
    manifest = Manifest(
        precision="float32",
        opset=23,
        model=FACTS,
        sampling=SAMPLING,
        buckets=(bucket("short", 4), bucket("long", 9)),
        graphs=graphs,
        tokenizer=file_record(path, "tokenizer.json"),
        checkpoint="0" * 64,
        tools={},
    )
    write_manifest(path, manifest)
    return path
