"""``stiv build --shared-plan`` without a builder: which graphs share an engine, what records say, what is refused."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from onnx import numpy_helper
from toys import Toy, make_bundle

from stiv_deploy.export.engines import build as build_module
from stiv_deploy.export.engines.build import BuildRequest, BuiltEngine, build_engines
from stiv_deploy.export.engines.cli import show
from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.export.engines.shared_plan import first_of_form
from stiv_deploy.export.engines.weight_inputs import WeightInputs
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.engine_files import attention_form, buckets_of_engine
from stiv_deploy.runtime.bundle.manifest import EngineRecord, QuantizationRecord
from stiv_deploy.runtime.errors import BackendError, EngineError

SHARED = r"engines/tensorrt-rtx/sm89/shared_block_00_[0-9a-f]{8}"


def weighted(folder: Path, graph: str, value: float) -> None:
    """Give the toy block ``graph`` another slope."""
    manifest = read_manifest(folder)
    record = manifest.graphs[graph]
    model = onnx.load(folder / record.file.path)
    (slope,) = model.graph.initializer
    slope.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(slope) * 0 + value, slope.name))
    path, data = folder / record.file.path, f"{graph}.onnx.data"
    (folder / "onnx" / data).unlink()
    onnx.save_model(model, path, save_as_external_data=True, location=data, size_threshold=0)
    found = {"file": file_record(folder, record.file.path), "data": file_record(folder, f"onnx/{data}")}
    graphs = dict(manifest.graphs) | {graph: record.model_copy(update=found)}
    write_manifest(folder, manifest.model_copy(update={"graphs": graphs}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A toy bundle whose blocks differ in weights."""
    path = make_bundle(tmp_path / "bundle", Toy())
    weighted(path, "block_01", 0.25)
    return path


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[EngineJob]:
    """Jobs of stand-in builders, whose plans are words."""
    done: list[EngineJob] = []

    def run(_builders: BuilderProcesses, job: EngineJob) -> EngineResult:
        done.append(EngineJob.from_json(job.to_json()))
        plan = json.dumps([job.graph, len(done)])
        Path(job.plan).write_text(plan)
        return EngineResult(seconds=1.5, bytes=len(plan), sha256=hashlib.sha256(plan.encode()).hexdigest())

    library = SimpleNamespace(__version__="1.7.1", ComputeCapability=SimpleNamespace(__members__={"SM89": 89}))
    monkeypatch.setattr(BuilderProcesses, "run", run)
    monkeypatch.setattr(build_module, "import_tensorrt", lambda flavour: library)
    return done


def build(folder: Path, *graphs: str, shared: bool = True, **update: object) -> tuple[BuiltEngine, ...]:
    values = {"bundle": folder, "backend": "tensorrt-rtx", "sm": "89", "cache": folder.parent / "cache", **update}
    return build_engines(BuildRequest(graphs=graphs, shared_plan=shared, **values)).engines  # type: ignore[arg-type]


def records(folder: Path) -> dict[str, EngineRecord]:
    return {record.graph: record for record in Bundle.open(folder).manifest.engines}


def test_blocks_share_one_engine_and_other_graphs_have_their_own(folder: Path, jobs: list[EngineJob]) -> None:
    build(folder)
    found, manifest = records(folder), read_manifest(folder)
    assert found.keys() == manifest.graphs.keys()
    (path,) = {found[f"block_0{index}"].file.path for index in range(2)}
    assert re.fullmatch(rf"{SHARED}\.engine", path)
    assert found["block_00"].onnx != found["block_01"].onnx, "each is held to its own weights"
    assert all(attention_form(record, manifest) == "native" for record in found.values())
    assert {name: record.weights for name, record in found.items() if record.weights} == {
        "block_00": ("slope",),
        "block_01": ("slope",),
        "embed": ("six",),
    }
    assert len({record.file.path for record in found.values()}) == len(found) - 1
    asked = {job.graph: job.weights_as_inputs for job in jobs}
    assert {name for name, as_inputs in asked.items() if as_inputs} == {"block_00", "embed"}
    assert "block_01" not in asked
    assert next(job for job in jobs if job.graph == "block_00").profiles[0]["slope"] == ((), (), ())
    assert buckets_of_engine(found["block_01"], manifest) == ["small"]


def test_other_weights_take_the_plan_from_the_cache(folder: Path, jobs: list[EngineJob]) -> None:
    build(folder)
    number = len(jobs)
    for index in range(2):
        weighted(folder, f"block_0{index}", 0.1 + index)
    assert all(engine.cached for engine in build(folder))
    assert len(jobs) == number


def test_ordinary_and_shared_engines_take_turns(folder: Path, jobs: list[EngineJob]) -> None:
    """Each keeps its own plans in the cache, and the shared file lives as long as a block needs it."""
    build(folder, "blocks")
    path = folder / records(folder)["block_01"].file.path
    build(folder, "block_00", shared=False)
    assert path.is_file()
    assert records(folder)["block_00"].weights == ()
    build(folder, "block_01", shared=False)
    assert not path.exists()
    number = len(jobs)
    build(folder, "blocks")
    assert len(jobs) == number
    assert {folder / record.file.path for record in records(folder).values()} == {path}


def test_another_plan_for_one_block_leaves_that_of_the_others(folder: Path, jobs: list[EngineJob]) -> None:
    build(folder, "blocks")
    build(folder, "block_00", optimization_level=5)
    found, bundle = records(folder), Bundle.open(folder)
    assert found["block_00"].file != found["block_01"].file
    assert all(bundle.verified(record.file).is_file() for record in found.values())


def test_halves_share_by_their_kind_and_other_graphs_do_not() -> None:
    one, other = (WeightInputs(model=content, shapes={"a": (1,)}) for content in (b"spatial", b"mixed"))
    forms = {"text_kv": one, "block_00": other, "spatial_00": one, "mixed_00": other, "spatial_01": one, "embed": one}
    assert first_of_form(forms) == {
        "block_00": "block_00",
        "spatial_00": "spatial_00",
        "mixed_00": "mixed_00",
        "spatial_01": "spatial_00",
    }


def test_a_bucket_of_its_own(folder: Path, jobs: list[EngineJob]) -> None:
    build(folder, "blocks", buckets=("small",))
    (path,) = {record.file.path for record in records(folder).values()}
    assert re.fullmatch(rf"{SHARED}\.small\.engine", path)
    assert buckets_of_engine(records(folder)["block_01"], read_manifest(folder)) == ["small"]


def test_the_table_counts_a_shared_engine_once(
    folder: Path, jobs: list[EngineJob], capsys: pytest.CaptureFixture[str]
) -> None:
    request = BuildRequest(
        bundle=folder,
        backend="tensorrt-rtx",
        sm="89",
        graphs=("blocks",),
        cache=folder.parent / "cache",
        shared_plan=True,
    )
    report = build_engines(request)
    plan = report.engines[0].plan
    large = [
        BuiltEngine(**{**vars(each), "plan": type(plan)(**{**vars(plan), "bytes": 2**20})}) for each in report.engines
    ]
    show(report.model_copy(update={"engines": tuple(large)}))
    text = capsys.readouterr().out
    assert "that of block_00" in text
    assert text.count("1.0") == 2, "of the first block, and of all"


def quantize(folder: Path, format_: str, layer: str) -> None:
    record = QuantizationRecord.model_validate({"format": format_, "scales": "0" * 64, "layers": {layer: format_}})
    write_manifest(folder, read_manifest(folder).model_copy(update={"quantization": record}))


@pytest.mark.parametrize(
    ("prepare", "asked", "said"),
    [
        (
            None,
            {"graphs": ("step", "decoder")},
            "is for blocks, their halves, text_kv, embed and head, not for step, dec",
        ),
        (None, {"attention": "plugin"}, "--shared-plan has no plugins: take --attention native"),
        (None, {"attention": "quick"}, "--shared-plan has no plugins: take --attention native"),
        (
            ("fp8", "block_01.ffn.up"),
            {},
            "layer block_01.ffn.up is FP8, and with its scales as inputs TensorRT-RTX mult",
        ),
        (("int8", "block_00.ffn.up"), {}, "layer block_00.ffn.up is INT8, and with its scales as inputs"),
    ],
)
def test_what_is_refused_before_a_builder_starts(
    folder: Path, jobs: list[EngineJob], prepare: tuple[str, str] | None, asked: dict[str, object], said: str
) -> None:
    if prepare is not None:
        quantize(folder, *prepare)
    with pytest.raises(EngineError) as refused:
        build(folder, *asked.pop("graphs", ()), **asked)  # type: ignore[misc]
    assert said in str(refused.value)
    assert not jobs
    assert not (folder.parent / "cache").exists()


def test_a_float_block_of_a_quantized_bundle_is_taken(folder: Path, jobs: list[EngineJob]) -> None:
    quantize(folder, "int8", "block_01.ffn.up")
    build(folder, "block_00")
    assert records(folder)["block_00"].weights == ("slope",)


def test_without_onnx(folder: Path, jobs: list[EngineJob], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(BackendError, match=r"weights become inputs by onnx; run: pip install 'stiv-deploy\[export\]'"):
        build(folder)
    assert not jobs


def test_as_typed(stiv: Callable[..., tuple[int, str]], folder: Path, jobs: list[EngineJob], tmp_path: Path) -> None:
    code, _ = stiv("build", folder, "--sm", "89", "--shared-plan", "--cache", tmp_path / "cache")
    assert code == 0
    assert re.fullmatch(rf"{SHARED}\.engine", records(folder)["block_01"].file.path)
