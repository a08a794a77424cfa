"""A whole model without its values: graphs get values in turn, and make a bundle that opens and builds."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stiv_deploy.export.errors import ExportError
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.config import CONFIGS


@pytest.fixture(scope="module")
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("big_build")


@pytest.fixture
def hollow(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    narrow = CONFIGS["XL"].model_copy(update={"width": 64, "heads": 4, "text_width": 32, "blocks": 3})
    monkeypatch.setitem(CONFIGS, "narrow", narrow)
    checkpoint: Checkpoint = script.hollow_checkpoint("narrow", None, 4, 64)
    return checkpoint


@pytest.mark.parametrize("precision", ["fp8", "bfloat16"])
def test_every_graph_has_values_of_its_own_and_the_model_none(
    script: ModuleType, hollow: Checkpoint, tmp_path: Path, precision: str
) -> None:
    bundle = Bundle.open(script.write_bundle(tmp_path / "bundle", hollow, precision, script.bucket_of(4, 64)))
    blocks = [record for name, record in bundle.manifest.graphs.items() if name.startswith("block_")]
    weights = {record.data.sha256 for record in blocks if record.data is not None}
    assert len(weights) == len(blocks) == 3
    assert len({record.topology for record in blocks}) == 1
    assert all(parameter.is_meta for parameter in hollow.model.parameters())
    for name in bundle.manifest.graphs:
        bundle.graph_file(name)
    assert bundle.manifest.vae_precision == "bfloat16"


def test_values_come_and_go(script: ModuleType, hollow: Checkpoint) -> None:
    block = hollow.model.blocks[0]
    with script.filled(block, torch.Generator().manual_seed(0)):
        assert all(parameter.isfinite().all() for parameter in block.parameters())
        assert next(hollow.model.blocks[1].parameters()).is_meta
    assert next(block.parameters()).is_meta


def test_a_file_of_two_names_counts_once(script: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "a/plan", tmp_path / "b/plan"
    for path in (first, second):
        path.parent.mkdir()
    first.write_bytes(bytes(10))
    second.hardlink_to(first)
    assert script.disk_bytes([tmp_path]) == (10, 20)


def test_unknown_precision(script: ModuleType) -> None:
    with pytest.raises(ExportError, match="--precision fp4: there is none; use fp8, int8, bfloat16, float16"):
        script.check_precisions(["fp8", "fp4"])


def test_precisions_without_a_shared_plan(script: ModuleType) -> None:
    assert script.check_precisions(["bfloat16", "float16"], shared=True) == ["bfloat16", "float16"]
    with pytest.raises(ExportError, match="--precision int8 has no --shared-plan; use bfloat16 or float16"):
        script.check_precisions(["bfloat16", "int8"], shared=True)


def test_the_shared_plan_is_a_row_of_its_own(
    script: ModuleType, hollow: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an empty cache, over the same graphs."""
    given: list[list[str]] = []
    from big_blocks import Stage

    def run_stage(name: str, command: list[str]) -> object:
        bundle, cache = Path(command[2]), Path(command[command.index("--cache") + 1])
        assert cache.exists() == (name == "build from the cache")
        for folder in (bundle / "engines", cache):
            folder.mkdir(exist_ok=True)
        given.append(command[7:])
        return Stage(name=name, seconds=1.0, peak_gib=1.0)

    monkeypatch.setattr(script, "run_stage", run_stage)
    rows = script.measure(tmp_path, "bfloat16", hollow, script.bucket_of(4, 64), ["--sm", "89"], shared=True)
    assert list(rows) == ["bfloat16", "bfloat16, --shared-plan"]
    assert given == [[], [], ["--shared-plan"], ["--shared-plan"]]
    assert "| bfloat16, --shared-plan | 0 |" in script.table(rows)
