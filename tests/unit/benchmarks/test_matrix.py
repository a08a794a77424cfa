"""Versions of TensorRT-RTX side by side, by recorded listings: what is lost is named, what cannot be had is said."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import typer

from stiv_deploy.runtime.errors import EngineError

ATTENTION = "block_00: spatial attention"


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("matrix")


def listing(version: str, *, fused: bool = True, kernels: int = 36) -> dict[str, Any]:
    """What ``stiv audit --json`` printed of one block, cut to two checks."""
    place = {"target": "sm89", "bucket": "default", "graph": "block_00", "hint": ""}
    found = "1 fused kernel, BFloat16" if fused else "not fused: BFloat16 x BFloat16 GEMM"
    attention = {"name": "spatial attention", "expected": "1 fused kernel, BFloat16", "found": found, "passed": fused}
    limit = {"name": "kernels", "expected": "at most 37", "found": str(kernels), "passed": kernels <= 37}
    engine = {"graph": "block_00", "kernels": kernels, "plan_bytes": 5 * 2**20, "build_seconds": 1.0}
    return {
        "builder": f"TensorRT-RTX {version}",
        "engines": [engine],
        "rows": [place | attention, place | limit],
    }


def cell(script: ModuleType, version: str, **change: Any) -> Any:
    return script.read_cell(version, "bfloat16", listing(version, **change))


def test_nothing_is_lost_where_all_pass(script: ModuleType) -> None:
    assert list(script.lost([cell(script, "1.6.1.120"), cell(script, "1.7.1.116")])) == []
    assert list(script.lost([])) == []


def test_a_lost_fusion_is_named(script: ModuleType) -> None:
    cells = [cell(script, "1.7.1.116", fused=False), cell(script, "1.9.0.1"), cell(script, "1.10.0.2", fused=False)]
    (line,) = script.lost(cells)
    assert line == (f"bfloat16, {ATTENTION}: 1.9.0.1 has it; 1.10.0.2 has not fused: BFloat16 x BFloat16 GEMM"), (
        "versions go by their numbers"
    )


def test_what_no_version_had_is_not_lost_and_what_came_back_is_there(script: ModuleType) -> None:
    never = [cell(script, each, kernels=40) for each in ("1.6.1.120", "1.7.1.116")]
    back = [cell(script, "1.5.0.114"), cell(script, "1.6.1.120", fused=False), cell(script, "1.7.1.116")]
    assert list(script.lost(never)) == list(script.lost(back)) == []


def test_a_bundle_that_no_longer_builds_has_lost_everything(script: ModuleType) -> None:
    broken = script.Cell(version="1.7.1.116", bundle="bfloat16", error="the ONNX parser refused block_00.onnx")
    lines = list(script.lost([cell(script, "1.6.1.120"), broken]))
    assert [line.split(":")[0] for line in lines] == ["bfloat16, block_00"] * 2
    assert all(line.endswith("1.7.1.116 has the ONNX parser refused block_00.onnx") for line in lines)


def test_the_table_has_versions_side_by_side(script: ModuleType) -> None:
    broken = script.Cell(version="1.4.0.76", bundle="bfloat16", error="no")
    text = script.table([cell(script, "1.7.1.116", kernels=32), cell(script, "1.6.1.120", kernels=40), broken])
    assert text.splitlines() == [
        "| bundle, graph | 1.4.0.76 | 1.6.1.120 | 1.7.1.116 |",
        "|---|---|---|---|",
        "| **bfloat16**, checks | does not build | 1 of 2 | 2 of 2 |",
        "| bfloat16, `block_00` | - | 40 / 5.0 | 32 / 5.0 |",
    ]


def test_a_listing_of_another_version_is_refused(script: ModuleType) -> None:
    with pytest.raises(EngineError, match=r"asked for TensorRT-RTX 1\.4\.0\.76, got TensorRT-RTX 1\.7\.1\.116"):
        script.read_cell("1.4.0.76", "bfloat16", listing("1.7.1.116"))


def answers(code: int, out: str = "", err: str = "") -> Callable[..., SimpleNamespace]:
    return lambda *_, **__: SimpleNamespace(returncode=code, stdout=out, stderr=err)


def test_what_cannot_be_had_is_noted(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", answers(1, err="WARNING: a\nERROR: No matching distribution found\n"))
    cells, absent = script.measure([], ["0.1.2"], "89", tmp_path)
    assert cells == []
    assert absent == {"0.1.2": "TensorRT-RTX 0.1.2 cannot be installed: ERROR: No matching distribution found"}


def test_the_version_stands_first_on_the_path(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "0.1.2").mkdir()
    monkeypatch.setenv("PYTHONPATH", "others")
    assert script.installed(tmp_path, "0.1.2") == {"PYTHONPATH": f"{tmp_path / '0.1.2'}:others"}
    monkeypatch.setattr(script, "here", lambda: "0.1.2")
    assert script.installed(tmp_path, "0.1.2") == {}, "that is the installed one"


@pytest.mark.parametrize("code", [0, 1, 2])
def test_an_audit_is_read_unless_it_was_refused(
    script: ModuleType, bundle_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    out = "" if code == 2 else json.dumps(listing("1.7.1.116"))
    monkeypatch.setattr(subprocess, "run", answers(code, out, "error: cannot build it for sm89: no parser\n"))
    found = script.cell("1.7.1.116", bundle_path, "89", {})
    assert found.error == ("error: cannot build it for sm89: no parser" if code == 2 else None)
    assert found.bundle == "float32"


def test_versions_are_numbers(script: ModuleType) -> None:
    assert script.chosen("1.10.0, 1.9.1,1.9.1") == ["1.9.1", "1.10.0"]
    for wrong in ("", "1.x"):
        with pytest.raises(typer.BadParameter, match="give versions with commas"):
            script.chosen(wrong)
