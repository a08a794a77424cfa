"""``stiv build`` without a builder: what is checked, what is cached, what is installed, and what a failure leaves."""

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from stiv_deploy.export.engines import build as build_module
from stiv_deploy.export.engines import install as engine_install
from stiv_deploy.export.engines import job as job_module
from stiv_deploy.export.engines import plan_cache as cache_module
from stiv_deploy.export.engines.build import BuildRequest, BuiltEngine, build_engines, choose_graphs, default_jobs
from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.export.engines.processes import BuilderProcesses
from stiv_deploy.runtime.bundle import bundle as bundle_module
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, write_manifest
from stiv_deploy.runtime.bundle.contract import Reduced, graph_specs
from stiv_deploy.runtime.bundle.engine_files import attention_form, graph_hash
from stiv_deploy.runtime.bundle.manifest import Manifest, QuantizationRecord, ReducedForm
from stiv_deploy.runtime.errors import BundleError, EngineError, OutputError

RTX = SimpleNamespace(
    __version__="1.7.1",
    ComputeCapability=SimpleNamespace(__members__={"NONE": 0, "SM75": 75, "SM86": 86, "SM89": 89, "SM120": 120}),
)


@pytest.fixture
def folder(words_bundle: Path) -> Path:
    return words_bundle


class Builders:
    """Stands for the builder processes: writes a plan that tells the job, and keeps the jobs."""

    def __init__(self) -> None:
        self.jobs: list[EngineJob] = []
        self.fail: dict[str, str] = {}
        self.before: Callable[[EngineJob], None] = lambda job: None

    def run(self, job: EngineJob) -> EngineResult:
        self.before(job)
        self.jobs.append(job)
        if job.graph in self.fail:
            return EngineResult(error=self.fail[job.graph])
        plan = json.dumps([job.graph, job.sm, len(self.jobs)])
        Path(job.plan).write_text(plan)
        return EngineResult(seconds=1.5, bytes=len(plan), sha256=hashlib.sha256(plan.encode()).hexdigest())


@pytest.fixture
def builders(monkeypatch: pytest.MonkeyPatch) -> Builders:
    """Stand-ins for the builder processes, and a library that knows SM 86, 89 and 120."""
    stand_in = Builders()
    monkeypatch.setattr(BuilderProcesses, "run", lambda self, job: stand_in.run(job))
    monkeypatch.setattr(build_module, "import_tensorrt", lambda flavour: RTX)
    return stand_in


def request_for(folder: Path, **update: object) -> BuildRequest:
    values = {"bundle": folder, "backend": "tensorrt-rtx", "sm": "89", "cache": folder.parent / "cache", **update}
    return BuildRequest(**values)  # type: ignore[arg-type]


def build(folder: Path, **update: object) -> tuple[BuiltEngine, ...]:
    return build_engines(request_for(folder, **update)).engines


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".partial" in path.name or path.name.startswith(".")]


def test_every_graph_gets_an_engine_and_a_record(folder: Path, builders: Builders) -> None:
    engines = build(folder)
    bundle = Bundle.open(folder)
    assert [engine.graph for engine in engines] == list(bundle.manifest.graphs)
    assert len(bundle.manifest.engines) == 2 * len(bundle.manifest.graphs)  # one for each bucket
    for record in bundle.manifest.engines:
        assert record.file.path == f"engines/tensorrt-rtx/sm89/{record.graph}.engine"
        assert bundle.verified(record.file).is_file()
        assert record.onnx == graph_hash(bundle.manifest.graphs[record.graph])
        assert (record.backend, record.backend_version, record.sm) == ("tensorrt-rtx", "1.7.1", "89")
        assert record.build_seconds == 1.5
    assert not leftovers(folder.parent)


def test_profiles_are_the_corners_of_the_buckets(folder: Path, builders: Builders) -> None:
    build(folder, graphs=("step",))
    (job,) = builders.jobs
    short, long = job.profiles
    assert short["velocity"] == ((1, 1, 4, 2, 2), (2, 2, 4, 4, 4), (6, 4, 4, 6, 6))
    assert long["velocity"][2] == (6, 9, 4, 6, 6)
    assert short["dt"] == ((1,), (1,), (2,))
    assert EngineJob.from_json(job.to_json()) == job


def test_equal_graphs_are_built_once(folder: Path, builders: Builders) -> None:
    engines = {engine.graph: engine for engine in build(folder, graphs=("block_00", "block_01", "block_02"))}
    assert len(builders.jobs) == 2
    assert [engines[f"block_0{index}"].cached for index in range(3)] == [False, False, True]
    assert engines["block_01"].plan.sha256 == engines["block_02"].plan.sha256


def test_second_build_takes_identical_plans_from_the_cache(folder: Path, builders: Builders) -> None:
    build(folder)
    first, number = snapshot(folder), len(builders.jobs)
    engines = build(folder)
    assert len(builders.jobs) == number
    assert all(engine.cached for engine in engines)
    assert snapshot(folder) == first


def test_rebuild_ignores_the_cache(folder: Path, builders: Builders) -> None:
    build(folder, graphs=("head",))
    build(folder, graphs=("head",), rebuild=True)
    assert len(builders.jobs) == 2
    record = Bundle.open(folder).manifest.engines[0]
    assert json.loads((folder / record.file.path).read_text()) == ["head", "89", 2]


@pytest.mark.parametrize("update", [{"sm": "120"}, {"buckets": ("short",)}, {"optimization_level": 4}])
def test_what_decides_the_plan_is_in_its_key(folder: Path, builders: Builders, update: dict[str, object]) -> None:
    build(folder, graphs=("head",))
    build(folder, graphs=("head",), **update)
    assert len(builders.jobs) == 2


@pytest.mark.parametrize(
    ("module", "table", "value"),
    [(build_module, "FLAGS_SET", {"tensorrt-rtx": ("STRICT_NANS",)}), (job_module, "FLAGS_CLEARED", ())],
)
def test_builder_flags_are_in_the_key(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch, module: ModuleType, table: str, value: object
) -> None:
    build(folder, graphs=("head",))
    monkeypatch.setattr(module, table, value)
    build(folder, graphs=("head",))
    assert len(builders.jobs) == 2


def test_weights_and_library_version_are_in_the_key(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(folder, graphs=("head",))
    newer = SimpleNamespace(__version__="1.8", ComputeCapability=RTX.ComputeCapability)
    monkeypatch.setattr(build_module, "import_tensorrt", lambda flavour: newer)
    build(folder, graphs=("head",))
    (folder / "onnx/head.onnx.data").write_text("other weights")
    manifest = read(folder)
    head = manifest.graphs["head"].model_copy(update={"data": file_record(folder, "onnx/head.onnx.data")})
    write_manifest(folder, manifest.model_copy(update={"graphs": {**manifest.graphs, "head": head}}))
    build(folder, graphs=("head",))
    assert len(builders.jobs) == 3


def with_reduced_vae(folder: Path, reduced: Reduced | None) -> None:
    """Make the bundle one of float16 whose decoder has a form in ``reduced``, or none."""
    manifest = read(folder)
    graphs = {
        name: record.model_copy(update={"spec": spec})
        for (name, record), spec in zip(
            manifest.graphs.items(), graph_specs(manifest.model, "float16").values(), strict=True
        )
    }
    if reduced is not None:
        path = f"onnx/decoder.{reduced}.onnx"
        (folder / path).write_text("rounded graph over decoder.onnx.data")
        form = ReducedForm(file=file_record(folder, path), topology="1" * 64, precision=reduced)
        graphs["decoder"] = graphs["decoder"].model_copy(update={"reduced": form})
    write_manifest(folder, manifest.model_copy(update={"precision": "float16", "graphs": graphs}))


@pytest.mark.parametrize(
    ("reduced", "sm", "file", "tf32"),
    [
        ("bfloat16", "89", "decoder.bfloat16.onnx", False),
        ("bfloat16", "portable", "decoder.bfloat16.onnx", False),
        ("bfloat16", "75", "decoder.onnx", True),  # which has neither: the flag says nothing there
        ("float16", "75", "decoder.float16.onnx", False),
        (None, "89", "decoder.onnx", True),
    ],
)
def test_the_vae_is_built_in_what_the_gpu_has(
    folder: Path, builders: Builders, reduced: Reduced | None, sm: str, file: str, tf32: bool
) -> None:
    with_reduced_vae(folder, reduced)
    build(folder, graphs=("decoder", "head"), sm=sm)
    jobs = {job.graph: job for job in builders.jobs}
    assert (Path(jobs["decoder"].onnx).name, jobs["decoder"].tf32) == (file, tf32)
    assert (Path(jobs["head"].onnx).name, jobs["head"].tf32) == ("head.onnx", False)
    assert EngineJob.from_json(jobs["decoder"].to_json()) == jobs["decoder"]
    manifest = Bundle.open(folder).manifest
    record = next(each for each in manifest.engines if each.graph == "decoder")
    assert attention_form(record, manifest) == "native"
    assert record.onnx == graph_hash(manifest.graphs["decoder"], reduced=file != "decoder.onnx")


def test_a_float32_bundle_has_no_tf32(folder: Path, builders: Builders) -> None:
    build(folder, graphs=("decoder",))
    assert [(job.tf32, job.flags_cleared) for job in builders.jobs] == [(False, ("TF32",))]


def test_a_block_in_nvfp4_is_built_from_its_form_for_engines_and_never_from_its_twin(
    folder: Path, builders: Builders, fp4_form: Callable[[Path, str], None]
) -> None:
    quantized = QuantizationRecord(format="nvfp4", scales="0" * 64, layers={"block_01.ffn.up": "nvfp4"})
    write_manifest(folder, read(folder).model_copy(update={"quantization": quantized}))
    with pytest.raises(BundleError, match=r"graph block_01 .*: it has layers in NVFP4 and no form for engines; "):
        Bundle.open(folder)
    fp4_form(folder, "block_01")
    build(folder, graphs=("block_00", "block_01"), sm="120")
    assert {job.graph: Path(job.onnx).name for job in builders.jobs} == {
        "block_00": "block_00.onnx",
        "block_01": "block_01.nvfp4.onnx",
    }
    manifest = Bundle.open(folder).manifest
    record, graph = next(each for each in manifest.engines if each.graph == "block_01"), manifest.graphs["block_01"]
    assert record.onnx == graph_hash(graph, fp4=True) != graph_hash(graph)
    assert attention_form(record, manifest) == "native"
    of_twin = record.model_copy(update={"onnx": graph_hash(graph)})
    assert attention_form(of_twin, manifest) is None
    (folder / "onnx/block_01.nvfp4.onnx.data").write_text("4 Bits")
    with pytest.raises(BundleError, match=r"block_01\.nvfp4\.onnx\.data: damaged"):
        build(folder, graphs=("block_01",), sm="120")


def test_a_damaged_reduced_form(folder: Path, builders: Builders) -> None:
    with_reduced_vae(folder, "bfloat16")
    path = folder / "onnx/decoder.bfloat16.onnx"
    path.write_text("R" + path.read_text()[1:])
    with pytest.raises(BundleError, match=r"decoder\.bfloat16\.onnx: damaged"):
        build(folder)
    assert not builders.jobs
    path.unlink()
    with pytest.raises(BundleError, match=r"decoder\.bfloat16\.onnx: missing from the bundle"):
        Bundle.open(folder)


def read(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_text())


def test_engines_of_another_sm_stay(folder: Path, builders: Builders) -> None:
    build(folder)
    build(folder, sm="120")
    build(folder, sm="portable", graphs=("head",))
    records = read(folder).engines
    graphs = len(read(folder).graphs)
    assert [sum(record.sm == sm for record in records) for sm in ("89", "120", "portable")] == [
        2 * graphs,
        2 * graphs,
        2,
    ]
    assert (folder / "engines/tensorrt-rtx/portable/head.engine").is_file()
    assert builders.jobs[-1].sm is None


def test_engine_for_one_bucket_does_not_touch_the_others(folder: Path, builders: Builders) -> None:
    build(folder, graphs=("head",))
    build(folder, graphs=("head",), buckets=("long",))
    assert len(builders.jobs[-1].profiles) == 1
    paths = {record.bucket: record.file.path for record in read(folder).engines}
    base = "engines/tensorrt-rtx/sm89/head"
    assert paths == {"short": f"{base}.engine", "long": f"{base}.long.engine"}
    build(folder, graphs=("head",))
    assert {record.file.path for record in read(folder).engines} == {f"{base}.engine"}
    assert not (folder / f"{base}.long.engine").exists(), "no record names it any more"


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"graphs": ("heat",)}, r"unknown graph heat; the bundle has text_encoder, "),
        ({"buckets": ("wide",)}, "unknown bucket wide; the bundle has short, long"),
    ],
)
def test_unknown_names(folder: Path, builders: Builders, update: dict[str, object], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build(folder, **update)
    assert not builders.jobs


def test_damaged_graph_is_found_before_any_builder_runs(folder: Path, builders: Builders) -> None:
    (folder / "onnx/decoder.onnx").write_text("graph DECODER")
    with pytest.raises(BundleError, match=r"decoder.onnx: damaged"):
        build(folder)
    assert not builders.jobs
    assert not (folder / "engines").exists()


def test_failed_graph_leaves_the_bundle_as_it_was(folder: Path, builders: Builders) -> None:
    build(folder, graphs=("head",))
    before = snapshot(folder)
    builders.fail["step"] = "Error Code 4: this op is unknown"
    with pytest.raises(EngineError, match=r"step: TensorRT-RTX 1.7.1 cannot build it for sm89: Error Code 4: this op"):
        build(folder, rebuild=True)
    assert snapshot(folder) == before
    assert not leftovers(folder.parent)


def test_interrupt_while_building_leaves_the_bundle_as_it_was(folder: Path, builders: Builders) -> None:
    before = snapshot(folder)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(request_for(folder), interrupt)
    assert snapshot(folder) == before
    assert not leftovers(folder.parent)


def test_failure_while_installing_leaves_the_bundle_as_it_was(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, copies = snapshot(folder), []

    def full(source: Path, target: Path) -> None:
        if len(copies) == 3:
            raise OSError(28, "No space left on device")
        copies.append(target)
        Path(target).write_bytes(b"half")

    monkeypatch.setattr(engine_install.os, "link", full)
    monkeypatch.setattr(engine_install.shutil, "copyfile", full)
    with pytest.raises(OutputError, match="the engines cannot be written .No space left on device"):
        build(folder)
    assert snapshot(folder) == before


def test_ctrl_c_while_committing_waits_for_its_end(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(target: Path, manifest: Manifest) -> Path:
        os.kill(os.getpid(), signal.SIGINT)
        return write_manifest(target, manifest)

    monkeypatch.setattr(engine_install, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(folder, graphs=("head",))
    bundle = Bundle.open(folder)
    assert {record.graph for record in bundle.manifest.engines} == {"head"}
    assert bundle.verified(bundle.manifest.engines[0].file).is_file()


def test_bundle_exported_again_meanwhile(folder: Path, builders: Builders) -> None:
    def export_again(job: EngineJob) -> None:
        manifest = read(folder)
        graphs = {**manifest.graphs, "step": manifest.graphs["step"].model_copy(update={"topology": "1" * 64})}
        write_manifest(folder, manifest.model_copy(update={"graphs": graphs}))

    builders.before = export_again
    with pytest.raises(BundleError, match="the graphs changed while their engines were built; run the build again"):
        build(folder, graphs=("head",))
    assert not read(folder).engines
    assert not leftovers(folder)


def test_engines_added_meanwhile_are_kept(folder: Path, builders: Builders) -> None:
    def other_build(job: EngineJob) -> None:
        builders.before = lambda job: None
        build(folder, graphs=("step",), sm="120")

    builders.before = other_build
    build(folder, graphs=("head",))
    assert {(record.graph, record.sm) for record in read(folder).engines} == {("head", "89"), ("step", "120")}


def test_bundle_that_cannot_be_written(folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module.os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="engines cannot be written into this bundle"):
        build(folder)
    assert not (folder.parent / "cache").exists()


def test_cache_that_cannot_be_written(folder: Path, builders: Builders) -> None:
    (folder.parent / "file").write_text("")
    with pytest.raises(OutputError, match=r"the plan cache .* cannot be written .*; give --cache DIR"):
        build(folder, cache=folder.parent / "file" / "cache")


def test_timing_cache_is_for_tensorrt_only(folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder, graphs=("head",))
    assert builders.jobs[-1].timing_cache is None
    monkeypatch.setattr(build_module, "import_tensorrt", lambda flavour: SimpleNamespace(__version__="11.4"))
    monkeypatch.setattr(build_module, "gpu_sm", lambda: "90")
    build(folder, graphs=("head",), backend="tensorrt", sm="auto")
    assert builders.jobs[-1].timing_cache == str(folder.parent / "cache/timing/tensorrt-11.4-sm90.cache")
    assert builders.jobs[-1].sm == "90"


def test_builders_run_side_by_side(folder: Path, builders: Builders) -> None:
    together = threading.Barrier(2, timeout=20)
    builders.before = lambda job: together.wait() and None
    build(folder, graphs=("head", "step"), jobs=2)
    assert len(builders.jobs) == 2


def test_progress_and_report_are_of_every_graph(folder: Path, builders: Builders) -> None:
    told: list[tuple[str, int, int]] = []
    report = build_engines(request_for(folder), lambda *step: told.append(step))
    graphs = list(read(folder).graphs)
    assert sorted(name for name, *_ in told[1:]) == sorted(graphs)
    assert [step[1:] for step in told] == [(done, len(graphs)) for done in range(len(graphs) + 1)]
    assert [engine.graph for engine in report.engines] == graphs
    assert (report.backend, report.version, report.sm) == ("tensorrt-rtx", "1.7.1", "89")
    assert {engine.attention for engine in report.engines} == {"native"}
    written = json.loads(report.model_dump_json())
    assert written["engines"][0]["plan"]["sha256"] == report.engines[0].plan.sha256


def test_blocks_stand_for_all_blocks(folder: Path) -> None:
    manifest = read(folder)
    blocks = ["block_00", "block_01", "block_02"]
    assert choose_graphs(manifest, ("head", "blocks", "block_01")) == ["head", *blocks]
    assert choose_graphs(manifest, ()) == list(manifest.graphs)
    assert choose_graphs(manifest, (), ["step"]) == ["step"]
    with pytest.raises(EngineError, match="unknown graph block_09; the bundle has text_encoder, "):
        choose_graphs(manifest, ("blocks", "block_09"))


def test_less_than_one_job(folder: Path) -> None:
    with pytest.raises(EngineError, match="--jobs must be at least 1, got 0"):
        request_for(folder, jobs=0)


def test_tensorrt_builds_one_at_a_time_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_jobs("tensorrt") == 1
    assert 1 <= default_jobs("tensorrt-rtx") <= 4
    monkeypatch.setattr(build_module.os, "sched_getaffinity", lambda _: range(2), raising=False)
    monkeypatch.setattr(build_module, "memory_bytes", lambda: 4 * 2**30)
    jobs = {weights: default_jobs("tensorrt-rtx", weights * 2**20) for weights in (0, 180, 400, 900, 4000)}
    assert jobs == {0: 2, 180: 2, 400: 2, 900: 1, 4000: 1}
    monkeypatch.setattr(build_module, "memory_bytes", lambda: None)
    assert default_jobs("tensorrt-rtx", 2**40) == 2


def test_plans_are_linked_from_the_cache(folder: Path, builders: Builders) -> None:
    engines = {engine.graph: engine.plan for engine in build(folder, graphs=("head", "step"))}
    for record in read(folder).engines:
        plan = engines[record.graph]
        assert (folder / record.file.path).samefile(plan.path)
        assert record.file.sha256 == hashlib.sha256(plan.path.read_bytes()).hexdigest()
    first = snapshot(folder)
    build(folder, graphs=("head", "step"))  # the same files once more in their own places
    assert snapshot(folder) == first
    assert not leftovers(folder.parent)


def test_a_cache_on_another_file_system_is_copied(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(engine_install.os, "link", refuse)
    (engine,) = build(folder, graphs=("head",))
    record = read(folder).engines[0]
    assert not (folder / record.file.path).samefile(engine.plan.path)
    assert Bundle.open(folder).verified(record.file).read_bytes() == engine.plan.path.read_bytes()
    assert not leftovers(folder.parent)


@pytest.mark.parametrize("where", ["builder", "cache"])
def test_a_full_disk_amid_the_blocks_keeps_what_is_finished(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    before, run, wrote = snapshot(folder), builders.run, cache_module.write_text

    def full(job: EngineJob) -> EngineResult:
        return EngineResult(unwritten="No space left on device") if job.graph == "step" else run(job)

    def no_room(path: Path, text: str) -> None:
        if len(builders.jobs) == 3:
            raise OSError(28, "No space left on device")
        wrote(path, text)

    with monkeypatch.context() as disk:
        if where == "builder":
            disk.setattr(builders, "run", full)
        else:
            disk.setattr(cache_module, "write_text", no_room)
        with pytest.raises(OutputError) as told:
            build(folder, jobs=1, graphs=("embed", "head", "step", "decoder"))
    message = str(told.value)
    assert message.startswith("step: its plan cannot be written to the cache ")
    assert message.endswith(
        "(No space left on device); make room, or give --cache DIR; finished plans are kept there for the next build"
    )
    assert "\n" not in message
    assert snapshot(folder) == before
    assert not leftovers(folder.parent)
    built = {engine.graph: engine.cached for engine in build(folder, graphs=("embed", "head", "step", "decoder"))}
    assert (built["embed"], built["head"], built["step"]) == (True, True, False)


def test_files_of_an_export_by_the_same_command_are_not_hashed_again(
    folder: Path, builders: Builders, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = bundle_module.sha256
    monkeypatch.setattr(bundle_module, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    written = read(folder)
    build(folder, graphs=("head",), written=written)
    assert hashed == []
    other = written.graphs["head"].model_copy(
        update={"file": written.graphs["head"].file.model_copy(update={"sha256": "0" * 64})}
    )
    build(folder, graphs=("head",), written=written.model_copy(update={"graphs": {**written.graphs, "head": other}}))
    assert hashed == ["head.onnx"], "the weights are the same, the graph is not"
