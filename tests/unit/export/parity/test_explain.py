"""``stiv parity --explain``: what it refuses before it measures, and what it says."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.parity import explain as stage
from stiv_deploy.export.parity.explain import ExplainReport, ExplainRequest, check_target, explain
from stiv_deploy.export.parity.explanation import Explanation
from stiv_deploy.export.parity.modules import ModuleRow
from stiv_deploy.export.parity.reproduction import FILES
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.errors import OutputError

Stiv = Callable[..., tuple[int, str]]


@pytest.fixture
def never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundle is not even looked at."""
    monkeypatch.setattr(stage.Bundle, "open", lambda *_: pytest.fail("too late"))


@pytest.mark.usefixtures("never_opened")
@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("bundle", r"would replace .*, which is read"),
        ("bundle/why", "is in the bundle"),
        ("notes", "has other files than those of a reproduction; choose another folder for --explain, or remove it"),
        ("notes/a.txt", "this is a file and a folder is wanted"),
    ],
)
def test_a_folder_that_would_be_lost_is_refused_first(
    words_bundle: Path, tmp_path: Path, out: str, reason: str
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(OutputError, match=reason):
        explain(ExplainRequest(bundle=words_bundle, out=tmp_path / out))
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_an_older_reproduction_may_be_replaced(words_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "why").mkdir()
    for name in FILES:
        (tmp_path / "why" / name).write_text("old")
    check_target(ExplainRequest(bundle=words_bundle, out=tmp_path / "why"))


@pytest.mark.usefixtures("never_opened")
def test_without_polygraphy_it_is_said_what_to_install(
    words_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.json", None)
    with pytest.raises(ExportError, match=r"Polygraphy cannot be imported.*pip install 'stiv-deploy\[export\]'"):
        explain(ExplainRequest(bundle=words_bundle, out=tmp_path / "why"))
    assert not (tmp_path / "why").exists()


def parity_row(backend: str = "onnxruntime") -> ParityRow:
    return ParityRow(
        level="block",
        name="block_03",
        backend=backend,
        precision="bfloat16",
        rel_l2=0.3,
        max_abs=1.0,
        gate=0.02,
        passed=False,
    )


def module_row(module: str, before: str = "", rel_l2: float | None = 1e-3, bound: float = 1e-2) -> ModuleRow:
    passed = rel_l2 is not None and rel_l2 <= bound
    operators = ("Reshape", "Transpose", "MatMul", "Add")
    return ModuleRow(
        module=module, before=before, operators=operators, rel_l2=rel_l2, plain_torch=1e-3, bound=bound, passed=passed
    )


def explanation(rows: list[ModuleRow], backend: str = "onnxruntime") -> Explanation:
    first = next((index for index, row in enumerate(rows) if not row.passed), None)
    return Explanation(
        row=parity_row(backend),
        graph="block_03",
        measured_on="onnxruntime",
        modules=tuple(rows),
        first=first,
        reproduction=Path("out/why"),
    )


RIGHT = [module_row("", "spatial.qkv"), module_row("spatial.qkv")]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (explanation([*RIGHT, module_row("ffn.up", rel_l2=None)]), "block_03.ffn.up is the first beyond its bound"),
        (
            explanation([module_row("spatial", "spatial.out", 0.1)]),
            "block_03.spatial, before spatial.out is the first beyond its bound (MatMul, Add)",
        ),
        (explanation([module_row("", "x_out", 0.1)]), "block_03, before x_out is the first"),
        (explanation(RIGHT), "it is wrong as a whole, by what onnxruntime makes of it"),
        (explanation(RIGHT, "tensorrt-rtx"), "the graph is right, and its tensorrt-rtx engine is wrong"),
    ],
)
def test_the_verdict_names_the_module_or_the_whole(found: Explanation, verdict: str) -> None:
    assert verdict in found.verdict


def test_the_command_prints_the_modules_and_exits_1(
    stiv: Stiv, words_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = explanation([*RIGHT, module_row("ffn.up", rel_l2=None), module_row("", "x_out", 0.1)])
    asked: list[ExplainRequest] = []

    def answer(request: ExplainRequest, _: Any) -> ExplainReport:
        asked.append(request)
        return ExplainReport(rows=(found.row,), explanation=found)

    monkeypatch.setattr(stage, "explain", answer)
    printed: list[str] = []
    monkeypatch.setattr("rich.console.Console.print", lambda _, *what, **__: printed.extend(map(lines_of, what)))
    code, _ = stiv("parity", words_bundle, "--explain", "out/why", "--json", tmp_path / "why.json")
    assert code == 1
    assert asked[0].out == Path("out/why")
    text = "\n".join(printed)
    assert "block block_03 on onnxruntime, bfloat16: error 3.0e-01, gate 2.0e-02" in text
    assert "to spatial.qkv|MatMul, Add|1.0e-03|1.0e-03|1.0e-02|" in text
    assert "ffn.up|MatMul, Add|not finite|1.0e-03|1.0e-02|<- first" in text
    assert "to x_out|MatMul, Add|1.0e-01|1.0e-03|1.0e-02|NO" in text
    assert "python out/why/reproduce.py" in text
    values = json.loads((tmp_path / "why.json").read_text())
    assert values["explanation"]["modules"][2]["module"] == "ffn.up"


def lines_of(what: Any) -> str:
    """A printed text, or a table's title and rows."""
    if isinstance(what, str):
        return what
    rows = zip(*(column.cells for column in what.columns), strict=True)
    return "\n".join([str(what.title), *("|".join(map(str, row)) for row in rows)])


def test_where_every_graph_is_right_there_is_nothing_to_explain(
    stiv: Stiv, words_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ExplainReport(rows=(parity_row().model_copy(update={"passed": True}),), explanation=None)
    monkeypatch.setattr(stage, "explain", lambda *_: right)
    assert stiv("parity", words_bundle, "--explain", "out/why")[0] == 0
