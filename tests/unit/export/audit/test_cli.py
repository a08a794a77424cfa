"""``stiv audit`` as typed: what it builds, what it writes, its exit codes. Builders answer with recorded reports."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from toys import Toy, make_bundle

from stiv_deploy.export.audit import audit
from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import EngineRecord, QuantizationRecord
from stiv_deploy.runtime.command.main import main
from stiv_deploy.runtime.tensorrt_library import missing_library

Stiv = Callable[..., tuple[int, str]]
REPORTS = Path(__file__).parent / "reports"
LINEARS = ("spatial.qkv", "spatial.out", "temporal.qkv", "temporal.out", "cross.q", "cross.out", "ffn.up", "ffn.down")
pytestmark = pytest.mark.skipif(
    missing_library("tensorrt-rtx") is not None, reason=str(missing_library("tensorrt-rtx"))
)


@pytest.fixture
def fp8_bundle(words_bundle: Path) -> Path:
    """A bundle whose plan has all linears and spatial attention of the blocks in FP8, the rest in float16."""
    layers = {f"block_{index:02d}.{name}": "fp8" for index in range(3) for name in (*LINEARS, "spatial.attention")}
    record = QuantizationRecord.model_validate({"format": "fp8", "scales": "0" * 64, "layers": layers})
    write_manifest(words_bundle, read_manifest(words_bundle).model_copy(update={"quantization": record}))
    return words_bundle


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
    """The jobs that builder processes were given; each answers with the recorded report of a fused block."""
    given: list[EngineJob] = []

    class Recorded:
        def run(self, job: EngineJob) -> EngineResult:
            given.append(job)
            assert job.report is not None
            shutil.copy(REPORTS / "rtx_fp8.txt", job.report)
            Path(job.plan).write_bytes(b"plan")
            return EngineResult(seconds=1.0, bytes=4)

        def stop(self) -> None: ...

    monkeypatch.setattr(audit, "BuilderProcesses", Recorded)
    return given


@pytest.fixture
def as_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded reports are of float16 graphs, the bundle's words of none."""
    genuine = audit.expectation
    changed = {"precision": "float16"}
    monkeypatch.setattr(audit, "expectation", lambda *given: genuine(*given).model_copy(update=changed))


@pytest.mark.usefixtures("as_float16")
def test_each_kind_of_block_is_built_once_for_each_target_and_bucket(
    stiv: Stiv, fp8_bundle: Path, jobs: list[EngineJob], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in fp8_bundle.rglob("*") if path.is_file()}
    out = tmp_path / "audit.json"
    assert stiv("audit", fp8_bundle, "--graphs", "blocks", "--json", out)[0] == 0
    assert [(job.sm, job.graph) for job in jobs] == [("89", "block_00")] * 2 + [("120", "block_00")] * 2
    assert all(len(job.profiles) == 1 for job in jobs)
    assert jobs[0].profiles != jobs[1].profiles
    written = json.loads(out.read_text())
    assert written["passed"] is True
    assert written["quantization"] == "fp8"
    assert {(row["target"], row["bucket"]) for row in written["rows"]} == {
        (sm, bucket) for sm in ("sm89", "sm120") for bucket in ("short", "long")
    }
    assert {"name", "expected", "found", "passed", "graph"} <= written["rows"][0].keys()
    assert written["engines"][0]["same"] == ["block_00", "block_01", "block_02"]
    assert {path: path.read_bytes() for path in fp8_bundle.rglob("*") if path.is_file()} == before
    assert not any(Path(job.plan).parent.exists() for job in jobs)


@pytest.mark.usefixtures("as_float16")
def test_blocks_with_other_plans_are_other_kinds(stiv: Stiv, fp8_bundle: Path, jobs: list[EngineJob]) -> None:
    manifest = read_manifest(fp8_bundle)
    assert manifest.quantization is not None
    layers = {**manifest.quantization.layers, "block_01.ffn.up": "high"}
    record = manifest.quantization.model_copy(update={"layers": layers})
    write_manifest(fp8_bundle, manifest.model_copy(update={"quantization": record}))
    code, _ = stiv("audit", fp8_bundle, "--graphs", "blocks", "--sm", "89")
    assert [job.graph for job in jobs] == ["block_00"] * 2 + ["block_01"] * 2
    assert code == 1, "the report has FP8 where this plan is high"


@pytest.mark.usefixtures("as_float16", "jobs")
def test_the_name_of_what_did_not_fuse_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fp8_bundle: Path
) -> None:
    log = REPORTS / "rtx_fp8_unfused.txt"
    monkeypatch.setattr(sys, "argv", ["stiv", "audit", str(fp8_bundle), "--log", str(log)])
    assert main() == 1
    printed = capsys.readouterr().out
    assert "audit FAILED" in printed
    assert "block_00: spatial attention: expected 1 fused kernel, FP8, found not fused: FP8 x FP8 GEMM" in printed
    assert "it needs at least 32 tokens a frame" in printed


@pytest.mark.usefixtures("as_float16")
def test_a_log_needs_no_builder(stiv: Stiv, fp8_bundle: Path, jobs: list[EngineJob], tmp_path: Path) -> None:
    out = tmp_path / "audit.json"
    log = REPORTS / "rtx_fp8.txt"
    assert stiv("audit", fp8_bundle, "--graphs", "block_01", "--log", log, "--json", out)[0] == 0
    assert not jobs
    assert {row["graph"] for row in json.loads(out.read_text())["rows"]} == {"block_01"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--graphs", "block_07"], "unknown graph block_07"),
        (["--sm", "90"], "supports SM"),
        (["--sm", "86"], "SM 86 has no FP8"),
        (["--backend", "openvino"], "'openvino'"),
        (["--json", "nowhere/audit.json"], "nowhere/audit.json: cannot be written"),
        (["--log", "nowhere.log"], "nowhere.log: cannot be read"),
        (["--log", "build.log"], "no layers in it"),
        (["--log", "build.log", "--graphs", "blocks"], "--log is of one graph"),
        (["--log", "build.log", "--graphs", "block_07"], "--log is of one graph"),
    ],
)
def test_bad_input_is_one_line(
    stiv: Stiv,
    fp8_bundle: Path,
    jobs: list[EngineJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("build.log").write_text("a log without layers")
    code, text = stiv("audit", fp8_bundle, *arguments)
    assert (code, text.count("\n")) == (2, 1), text
    assert text.startswith("error: ")
    assert words in text
    assert not jobs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.log", "bundle"]


def test_a_graph_that_cannot_be_built(stiv: Stiv, words_bundle: Path, tmp_path: Path) -> None:
    """The real builder, on a file of words."""
    out = tmp_path / "audit.json"
    code, text = stiv("audit", words_bundle, "--graphs", "step", "--sm", "89", "--json", out)
    assert (code, text.count("\n")) == (2, 1)
    assert "step: TensorRT-RTX" in text
    assert "the ONNX parser refused step.onnx" in text
    assert not out.exists()


def test_engines_with_weights_as_inputs_are_noted_beside_their_own(
    stiv: Stiv, tmp_path: Path, jobs: list[EngineJob], as_float16: None
) -> None:
    """Where it is asked for, and of itself where the bundle has such engines for the GPU; each against its own plan."""
    folder, out = make_bundle(tmp_path / "bundle", Toy()), tmp_path / "audit.json"
    asked = ("--graphs", "block_00,step", "--json", out, "--jobs", "1")
    stiv("audit", folder, "--sm", "89", "--shared-plan", *asked)
    assert [(job.graph, job.weights_as_inputs) for job in jobs] == [
        ("block_00", True),
        ("block_00", False),
        ("step", False),
    ]
    assert jobs[0].profiles[0].keys() - jobs[1].profiles[0].keys() == {"slope"}
    report = json.loads(out.read_text())
    assert {row["name"] for row in report["rows"] if row["graph"] == "block_00"}.isdisjoint({"kernels"})
    (note,) = report["notes"]
    assert (note["graph"], note["target"]) == ("block_00", "sm89")
    assert re.fullmatch(r"(\d+) kernels, 0.0 MiB; \1 and 0.0 with its weights", note["text"])
    jobs.clear()
    add_shared_engine(folder, "120")
    stiv("audit", folder, "--sm", "89,120", "--graphs", "block_00", "--json", out, "--jobs", "1")
    assert [(job.sm, job.weights_as_inputs) for job in jobs] == [("89", False), ("120", True), ("120", False)]
    assert [note["target"] for note in json.loads(out.read_text())["notes"]] == ["sm120"]


def add_shared_engine(folder: Path, sm: str) -> None:
    """Say in the manifest that there is an engine for ``sm`` that takes a weight of ``block_00``."""
    manifest = read_manifest(folder)
    record = EngineRecord(
        graph="block_00",
        bucket="small",
        backend="tensorrt-rtx",
        backend_version="1.7.1",
        sm=sm,
        file=manifest.tokenizer,
        onnx="0" * 64,
        weights=("slope",),
        build_seconds=1.0,
    )
    write_manifest(folder, manifest.model_copy(update={"engines": (record,)}))


def test_weights_in_8_bits_are_no_inputs(stiv: Stiv, fp8_bundle: Path, jobs: list[EngineJob]) -> None:
    code, text = stiv("audit", fp8_bundle, "--sm", "89", "--shared-plan", "--graphs", "blocks")
    assert (code, text.count("\n")) == (2, 1)
    assert text.startswith("error: --shared-plan: layer block_00.spatial.qkv is FP8")
    assert not jobs
