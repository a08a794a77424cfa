"""A reproduction stands alone: its script, and Polygraphy's own loaders and comparator, see what is right and wrong."""

import ast
import os
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import parser

from stiv_deploy.export.graphs.draws import quantized_gate, rel_l2
from stiv_deploy.export.parity import reproduction
from stiv_deploy.export.parity.explain import Failure, piece_of, whole_of
from stiv_deploy.export.parity.ladder import gate_of
from stiv_deploy.export.parity.reproduction import Reproduction, Wrong, commands, write_reproduction
from stiv_deploy.runtime.bundle.contract import Format, Precision
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.tensorrt_library import missing_library

GRAPH = "block_00"
Block = Any
"""What the fixture ``block`` makes."""
MakeBlock = Any
MODEL = """
    <ir_version: 11, opset_import: ["": 23]>
    doubled (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) <float two = {2}, float[3] one = {1, 1, 1}>
    { y = Mul(x, two)
      z = Add(y, one) }
"""
GIVEN = np.arange(6, dtype=np.float32).reshape(2, 3)


def made(**changes: Any) -> Reproduction:
    whole: dict[str, Any] = {
        "model": parser.parse_model(MODEL),
        "inputs": {"x": GIVEN},
        "expected": {"y": GIVEN.astype(np.float64) * 2, "z": GIVEN.astype(np.float64) * 2 + 1},
        "bounds": {"y": 1e-6, "z": 1e-6},
        "text": "# doubled",
    }
    return Reproduction(**whole | changes)


def written(folder: Path, given: Reproduction) -> Path:
    write_reproduction(folder, given)
    return folder


def off(share: float) -> Reproduction:
    """What is expected is ``share`` of itself away from what the graph gives."""
    right = made()
    return replace(right, expected={**right.expected, "y": right.expected["y"] * (1 + share)})


@pytest.mark.parametrize(("share", "code", "word"), [(0.0, 0, "right"), (0.5e-6, 0, "right"), (2e-6, 1, "WRONG")])
def test_the_script_says_which_output_is_beyond_its_bound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], share: float, code: int, word: str
) -> None:
    folder = written(tmp_path, off(share))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(folder / "reproduce.py"))
    assert int(stopped.value.code or 0) == code
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("y: relative L2 error")
    assert first.endswith(word)
    assert second.endswith("right")


def test_the_script_is_short_and_imports_nothing_of_ours(tmp_path: Path) -> None:
    text = (written(tmp_path, made(options={"session.disable_quant_qdq": "1"})) / "reproduce.py").read_text()
    tree = ast.parse(text)
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names == {"base64", "io", "json", "pathlib", "numpy", "onnxruntime"}
    assert len([line for line in text.splitlines() if line.strip()]) < 30
    assert 'options.add_session_config_entry("session.disable_quant_qdq", "1")' in text


def compared(folder: Path, given: Reproduction) -> bool:
    """Polygraphy's verdict on a folder, by its own readers, runner and comparator."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, L2CompareFunc, RunResults
    from polygraphy.json import load_json

    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL if given.options else None
    session = SessionFromOnnx(str(folder / "graph.onnx"), graph_optimization_level=level)
    results = Comparator.run([OnnxrtRunner(session)], data_loader=load_json(str(folder / "inputs.json")))
    results.extend(RunResults.load(str(folder / "expected.json")))
    return bool(Comparator.compare_accuracy(results, compare_func=L2CompareFunc(given.tolerances())))


@pytest.mark.parametrize(("share", "passed"), [(0.5e-6, True), (2e-6, False)])
def test_polygraphy_reads_the_files_and_gives_the_same_verdict(tmp_path: Path, share: float, passed: bool) -> None:
    assert compared(written(tmp_path, off(share)), off(share)) is passed


@pytest.mark.parametrize("needs", ["polygraphy, onnxruntime", "polygraphy, tensorrt, a GPU"])
def test_the_lines_are_ones_that_polygraphy_knows(needs: str) -> None:
    from polygraphy.tools.run import Run

    words = shlex.split(commands(made(options={"a": "1"}))[needs])
    assert words[:2] == ["polygraphy", "run"]
    known, unknown = Run().setup_parser().parse_known_args(words[2:])
    assert not unknown
    assert known.l2_threshold == [f"{name}:{value:.6g}" for name, value in made().tolerances().items()]


def test_large_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduction, "INLINE_BYTES", 100)
    model = parser.parse_model(MODEL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(4096, np.float32), "large"))
    folder = written(tmp_path, made(model=model))
    assert (folder / "graph.onnx.data").stat().st_size >= 4 * 4096
    assert compared(folder, made())


BUILD = """
import sys
import tensorrt_rtx_bindings
sys.modules["tensorrt_rtx"] = tensorrt_rtx_bindings  # the front package, whose name Polygraphy asks for
from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
network = NetworkFromOnnxPath(sys.argv[1], strongly_typed=True)
print(len(bytes(EngineBytesFromNetwork(network, CreateConfig())())))
"""


def built(graph: Path) -> int:
    """Bytes of an engine that TensorRT-RTX builds through Polygraphy's loaders."""
    if missing_library("tensorrt-rtx"):
        pytest.skip("needs the rtx extra")
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    command = [sys.executable, "-c", BUILD, str(graph)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "quantization"),
    [("float32", None), ("float16", None), ("float32", "int8"), ("float32", "fp8")],
)
def test_a_block_in_onnxruntime_passes_by_polygraphys_account(
    block: MakeBlock, tmp_path: Path, precision: Precision, quantization: Format | None
) -> None:
    given = block(quantization, precision)
    reproduced = given.pieces().reproduction(whole(given), "# block")
    assert bool(reproduced.options) == (quantization is not None)
    assert compared(written(tmp_path, reproduced), reproduced)
    with pytest.raises(SystemExit, match="False"):
        runpy.run_path(str(tmp_path / "reproduce.py"))
    halved = replace(reproduced, bounds={name: bound / 100 for name, bound in reproduced.bounds.items()})
    assert not compared(tmp_path, halved)


def whole(given: Block) -> Wrong:
    """The whole block, as where every module of one that fails passes alone."""
    draws = given.sides.draws
    if draws is None:
        truth, plain = (oracle.run(GRAPH, given.given)["x_out"] for oracle in given.sides[:2])
        level, gate = "block", gate_of("block", given.precision, rel_l2(plain, truth))
    else:
        first, *others = (each["x_out"] for each in draws.graph(GRAPH, given.given))
        level, gate = "direct_block", quantized_gate(given.precision, [rel_l2(each, first) for each in others])
    row = ParityRow(
        level=level,
        name=GRAPH,
        backend="onnxruntime",
        precision=given.precision,
        rel_l2=1.0,
        max_abs=1.0,
        gate=gate,
        passed=False,
    )
    return whole_of(Failure("onnxruntime", GRAPH, [row], given.given), given.modules().cut, given.sides)


@pytest.mark.slow
def test_a_bfloat16_module_is_built_through_polygraphy(block: MakeBlock, tmp_path: Path) -> None:
    """Engines run where there is a GPU; here TensorRT-RTX takes the graph whose ends are float32."""
    given = block(None, "bfloat16")
    (found,) = (each for each in given.measured() if each.row.module == "ffn.up")
    assert found.row.passed
    assert built(written(tmp_path, given.pieces().reproduction(piece_of(found, given.modules()), "")) / "graph.onnx")
