"""The INT8 measurement: what is timed, how numbers are made of it, and that its variants are one computation."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer

from stiv_deploy.runtime.backends.onnxruntime_int8 import VNNI, cpu_flags
from stiv_deploy.stiv_ref.config import CONFIGS


@pytest.fixture
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("cpu_int8")


@pytest.mark.alone
def test_in_turns(script: ModuleType) -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}
    seconds = script.in_turns(calls, repeats=2)
    assert order == ["c", "b", "a", "a", "b", "c", "c", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}
    slow = script.in_turns({"slow": lambda: time.sleep(0.02)}, repeats=1)
    assert 0.02 <= slow["slow"][0] < 0.5


def test_speedup_is_by_pairs(script: ModuleType) -> None:
    """A machine that becomes slower during the run changes times, not ratios."""
    rows = script.speed_rows({"float32": [3.0, 6.0, 30.0], "int8": [1.0, 2.0, 10.0]}, "float32")
    assert rows["int8"] == {"milliseconds": 2000.0, "speedup": 3.0}
    assert rows["float32"] == {"milliseconds": 6000.0, "speedup": 1.0}


def test_by_operator_leaves_the_warm_up_out(script: ModuleType) -> None:
    def event(operator: str, at: int, microseconds: int, name: str = "n_kernel_time") -> dict:
        return {"name": name, "ts": at, "dur": microseconds, "args": {"op_name": operator}}

    runs = [[event("Add", 10 * run, 2000), event("MatMul", 10 * run + 1, 5000)] for run in (1, 2)]
    warm_up = [event("Add", 0, 10**6), event("MatMul", 1, 10**6)]
    fence = [event("Add", 5, 10**6, "n_fence_before")]
    times = script.by_operator([*runs[1], *runs[0], *fence, *warm_up], runs=2)
    assert times == {"MatMul": 5.0, "Add": 2.0}
    assert list(times) == ["MatMul", "Add"]


@pytest.mark.parametrize("text", ["2x8", "2x8x64x1", "axbxc", "", "0x8x64"])
def test_bad_size(script: ModuleType, text: str) -> None:
    with pytest.raises(typer.BadParameter, match="BATCHxFRAMESxTOKENS|begin at 1"):
        script.parse_size(text)


def test_size(script: ModuleType) -> None:
    assert script.parse_size("2x8x64") == (2, 8, 64)


def test_command_is_whole(script: ModuleType) -> None:
    found = script.command_line("XL", [(2, 8, 64), (1, 2, 3)], 1, 9, 10)
    assert found.endswith("--repeats 9 --size 2x8x64 --size 1x2x3 --bundles FLOAT32 INT8 --steps 10")
    assert script.command_line("XL", [(2, 8, 64)], 1, 9, None).endswith("--repeats 9 --size 2x8x64")


def test_cpu_tells_what_matters(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "cpu_flags", lambda: frozenset({"avx2", "avx512_vnni", "sse"}))
    assert script.cpu()["instructions"] == ["avx2", "avx512_vnni"]


def test_variants_are_those_that_the_cpu_can_run(script: ModuleType) -> None:
    """ONNX Runtime refuses signed activations beside the unsigned weights that the runtime wants without VNNI."""
    signed = "int8, signed activations as they are"
    assert signed not in script.variants(frozenset({"avx2"}))
    for flag in ("avx_vnni", "avx512_vnni"):
        assert signed in script.variants(frozenset({"avx2", flag}))


@pytest.mark.slow
def test_integer_variants_are_one_computation(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Signed or unsigned, activations and weights: the same integers, so the same bits; and near float32."""
    pytest.importorskip("modelopt")
    narrow = CONFIGS["XL"].model_copy(update={"width": 64, "heads": 4, "text_width": 32})
    monkeypatch.setitem(CONFIGS, "narrow", narrow)
    checkpoint = script.one_block_checkpoint("narrow", frames=4, size=32)
    inputs = script.block_inputs(checkpoint, 2, 3, 5)
    script.write_graphs(checkpoint, inputs, tmp_path)
    outputs = {}
    for name, variant in script.variants().items():
        session = script.open_session(variant, tmp_path, threads=1)
        outputs[name] = session.run(None, script.fed(session, inputs))[0]
    integer = [name for name in outputs if name.startswith("int8") and "float16" not in name]
    assert len(integer) == 2 + bool(VNNI & cpu_flags())
    for name in integer[1:]:
        np.testing.assert_array_equal(outputs[name], outputs[integer[0]])
    result = script.measure_block(tmp_path, inputs, threads=1, repeats=1)
    assert result["size"] == {"batch": 2, "frames": 3, "tokens": 5, "width": 64}
    assert 0 < result["variants"]["int8"]["rel_l2"] < 0.1
    assert "MatMulIntegerToFloat" in result["variants"]["int8"]["milliseconds_by_operator"]
    assert not list(tmp_path.glob("profile*"))
    json.dumps(result)
