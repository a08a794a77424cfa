"""Engines that take weights as inputs, on stand-ins: one plan for all blocks, and LoRAs merged where it is loaded."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import save_file
from toys import Toy, make_bundle, with_answers

from stiv_deploy.export.engines.shared_plan import first_of_form
from stiv_deploy.export.engines.weight_inputs import weight_inputs
from stiv_deploy.runtime import backends
from stiv_deploy.runtime.backends import tensorrt
from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.backends.engine_choice import same_again
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.engine_files import buckets_of_engine, graph_profile
from stiv_deploy.runtime.bundle.golden import read_golden
from stiv_deploy.runtime.bundle.merging import is_of_transformer, linear_of, weight_places, with_loras
from stiv_deploy.runtime.errors import BundleError, EngineError, LoraError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.sampling.golden_run import graph_rows

LINEAR = "ffn.up.weight"
BLOCKS = ("block_00", "block_01")
REQUEST: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 3, "seed": 4}


def matrix(seed: int) -> np.ndarray:
    """A weight [4, 4] that neither grows nor forgets what it multiplies."""
    return (0.5 * np.eye(4) + 0.1 * np.random.default_rng(seed).standard_normal((4, 4))).astype(np.float32)


def to_linear(path: Path, weight: np.ndarray) -> None:
    """Let the toy block in ``path`` multiply x by ``weight`` where it multiplied it by its slope."""
    model = onnx.load(path)
    (node,) = [each for each in model.graph.node if list(each.input) == ["x", "slope"]]
    node.op_type, node.input[1] = "MatMul", LINEAR
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, LINEAR))
    path.with_name(f"{path.name}.data").unlink()
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0)


@pytest.fixture
def folder(tmp_path: Path, stand_ins: SimpleNamespace) -> Path:
    """A toy bundle whose blocks are linears of different weights, with a stand-in engine for every graph."""
    path = make_bundle(tmp_path / "bundle", Toy())
    manifest = read_manifest(path)
    graphs = dict(manifest.graphs)
    for seed, name in enumerate(BLOCKS):
        to_linear(path / graphs[name].file.path, matrix(seed))
        file, data = (file_record(path, f"onnx/{name}.onnx{end}") for end in ("", ".data"))
        graphs[name] = graphs[name].model_copy(update={"file": file, "data": data})
    write_manifest(path, manifest.model_copy(update={"graphs": graphs}))
    return stand_ins.add_engines(path)


def share(folder: Path, stand_ins: SimpleNamespace, graphs: Sequence[str] = BLOCKS) -> Path:
    """Let ``graphs`` of the bundle have engines with weights as inputs."""
    bundle = Bundle.open(folder)
    inputs = {name: weight_inputs(bundle.graph_file(name)) for name in graphs}
    firsts, engines = first_of_form(inputs), []
    for record in bundle.manifest.engines:
        if record.graph not in inputs:
            engines.append(record)
            continue
        first = firsts.get(record.graph, record.graph)
        path = f"engines/tensorrt/89/shared_{first}_01234567.engine"
        rewritten = (folder / path).with_suffix(".onnx")
        rewritten.write_bytes(inputs[record.graph].model)
        (folder / path).write_text(f"{first}\n{rewritten}\n{stand_ins.scratch_of(first)}")
        update = {"file": file_record(folder, path), "weights": tuple(inputs[record.graph].shapes)}
        engines.append(record.model_copy(update=update))
    write_manifest(folder, bundle.manifest.model_copy(update={"engines": tuple(engines)}))
    return folder


@pytest.fixture
def shared(folder: Path, tmp_path: Path, stand_ins: SimpleNamespace) -> Path:
    """The same bundle with one engine for all blocks."""
    return share(shutil.copytree(folder, tmp_path / "shared"), stand_ins)


def opened(folder: Path, stand_ins: SimpleNamespace, *loras: str, cudart: Any = None) -> tuple[TensorRTBackend, Any]:
    """The backend on stand-ins, with LoRAs merged into the bundle."""
    bundle, cudart = with_loras(Bundle.open(folder), loras), cudart or stand_ins.cudart()
    profiles = {
        name: [graph_profile(bundle.manifest, name, bucket) for bucket in bundle.manifest.buckets]
        for name in bundle.manifest.graphs
    }
    trt = stand_ins.trt(cudart, profiles)
    return TensorRTBackend(bundle, "tensorrt", trt=trt, cuda=Cuda(cudart)), trt


def clip(folder: Path, stand_ins: SimpleNamespace, *loras: str, cudart: Any = None) -> np.ndarray:
    """Latents of a clip, all steps but the first of which replay a CUDA graph."""
    backend, _ = opened(folder, stand_ins, *loras, cudart=cudart)
    with backend:
        made = StivPipeline(Bundle.open(folder), backend)(**REQUEST)
        assert made.timings["graphs"] > made.timings["replays"] > 0
        return made.latents


def lora_file(path: Path, blocks: tuple[int, ...] = (0, 1), seed: int = 1) -> Path:
    """A LoRA of rank 1 of the linears of ``blocks``."""
    generator, tensors = np.random.default_rng(seed), {}
    for block in blocks:
        linear = f"transformer.blocks.{block}.ffn.up"
        tensors[f"{linear}.lora_A.weight"] = generator.standard_normal((1, 4)).astype(np.float32)
        tensors[f"{linear}.lora_B.weight"] = generator.standard_normal((4, 1)).astype(np.float32) / 10
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({})})
    return path


def test_one_plan_gives_the_bits_of_separate_engines(folder: Path, shared: Path, stand_ins: SimpleNamespace) -> None:
    assert np.array_equal(clip(shared, stand_ins), clip(folder, stand_ins))
    with OnnxRuntimeBackend(Bundle.open(folder)) as reference:
        assert np.array_equal(clip(shared, stand_ins), StivPipeline(Bundle.open(folder), reference)(**REQUEST).latents)


def test_it_is_loaded_once_and_each_block_has_a_context(shared: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = opened(shared, stand_ins)
    with backend:
        StivPipeline(Bundle.open(shared), backend)(**REQUEST)
        (engine,) = [each for each in trt.loaded if each.graph == "block_00"]
        assert len({context.addresses[LINEAR] for context in engine.contexts}) == len(BLOCKS)
        assert {context.addresses[LINEAR] % 256 for context in engine.contexts} == {0}


def test_weights_are_copied_once_and_freed_with_the_backend(shared: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    backend, _ = opened(shared, stand_ins, cudart=cudart)
    pipe = StivPipeline(Bundle.open(shared), backend)
    first = pipe(**REQUEST).latents
    memory = {key: weights.memory.address for key, weights in backend._weights.items()}
    assert {graph for graph, _ in memory} == set(BLOCKS)
    assert np.array_equal(pipe(**REQUEST).latents, first)
    assert {key: weights.memory.address for key, weights in backend._weights.items()} == memory
    assert set(memory.values()) <= cudart.memory.keys()
    del pipe
    backend.close()
    assert not set(memory.values()) & cudart.memory.keys()


def test_base_a_b_and_base_again(folder: Path, shared: Path, stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    """On one device, one after another; each as ONNX Runtime merges it, bit by bit."""
    a, b = lora_file(tmp_path / "a.safetensors"), lora_file(tmp_path / "b.safetensors", (1,), seed=2)
    cudart, chosen = stand_ins.cudart(), ([], [f"{a}:0.5"], [str(b)], [f"{a}:0", f"{b}:0"], [])
    base, with_a, with_b, with_none, again = (clip(shared, stand_ins, *loras, cudart=cudart) for loras in chosen)
    assert np.array_equal(base, again)
    assert np.array_equal(base, with_none)
    assert not np.array_equal(base, with_a)
    assert not np.array_equal(with_a, with_b)
    for loras, ours in ((chosen[1], with_a), (chosen[2], with_b)):
        with OnnxRuntimeBackend(with_loras(Bundle.open(folder), loras)) as reference:
            assert np.array_equal(StivPipeline(Bundle.open(folder), reference)(**REQUEST).latents, ours)


def test_a_lora_of_weights_that_lie_in_an_engine(folder: Path, stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    """Only that is refused: what else there is in ordinary engines is none of its business."""
    share(folder, stand_ins, BLOCKS[:1])
    clip(folder, stand_ins, str(lora_file(tmp_path / "a.safetensors", (0,))))
    with pytest.raises(
        LoraError,
        match=r"^blocks.1.ffn.up lies in the engine of block_01, --lora cannot change it there; run: stiv build BUNDLE "
        r"--backend tensorrt --sm 89 --shared-plan; or give --backend onnxruntime, or merge it for good",
    ):
        opened(folder, stand_ins, str(lora_file(tmp_path / "b.safetensors")))


def test_loras_open_engines_that_take_weights_and_no_others(
    folder: Path, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = str(lora_file(tmp_path / "a.safetensors"))
    monkeypatch.setattr(backends, "unavailable_reason", lambda *_: None)
    monkeypatch.setattr("stiv_deploy.runtime.backends.tensorrt.TensorRTBackend", lambda *_: SimpleNamespace(ok=True))
    with pytest.raises(LoraError, match=r"engines have their weights in them, .*stiv build --shared-plan"):
        backends.open_backend("tensorrt", with_loras(Bundle.open(folder), [lora]), quarantined=True)
    assert backends.open_backend("tensorrt", with_loras(Bundle.open(shared), [lora]), quarantined=True).ok  # type: ignore[attr-defined]


def altered(folder: Path, **update: object) -> Path:
    """The bundle with something else in the records of its shared engine."""
    manifest = read_manifest(folder)
    engines = [each.model_copy(update=update) if each.weights else each for each in manifest.engines]
    write_manifest(folder, manifest.model_copy(update={"engines": tuple(engines)}))
    return folder


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (("ffn.down.weight",), "takes ffn.down.weight as input, which graph block_00 has not as weights; run: stiv"),
        ((), "graph block_00: the engine has tensors"),
    ],
)
def test_weights_that_do_not_fit(shared: Path, stand_ins: SimpleNamespace, weights: tuple[str, ...], said: str) -> None:
    backend, _ = opened(altered(shared, weights=weights), stand_ins)
    with backend, pytest.raises(EngineError, match=re.escape(said)):
        StivPipeline(Bundle.open(shared), backend)(**REQUEST)


def test_weights_that_are_damaged(shared: Path, stand_ins: SimpleNamespace) -> None:
    data = shared / "onnx" / "block_01.onnx.data"
    data.write_bytes(bytes(data.stat().st_size))
    backend, _ = opened(shared, stand_ins)
    with backend, pytest.raises(BundleError, match=r"block_01.onnx.data: damaged"):
        StivPipeline(Bundle.open(shared), backend)(**REQUEST)


def test_what_records_of_a_shared_engine_tell(shared: Path) -> None:
    manifest = read_manifest(shared)
    records = [each for each in manifest.engines if each.weights]
    assert {each.file.path for each in records} == {"engines/tensorrt/89/shared_block_00_01234567.engine"}
    assert same_again(records[1], manifest) == "run: stiv build BUNDLE --backend tensorrt --sm 89 --shared-plan"
    assert buckets_of_engine(records[1], manifest) == [bucket.name for bucket in manifest.buckets]


def test_verify_tells_the_weights_of_one_block_from_those_of_another(
    shared: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_answers(shared)
    bundle, genuine = Bundle.open(shared), tensorrt.load_weights

    def failed() -> set[str]:
        golden = read_golden(bundle)
        with opened(shared, stand_ins)[0] as backend:
            return {row.subject for row in graph_rows(backend, bundle, golden, golden.graphs) if not row.passed}

    assert failed() == set()
    first = {"graph": "block_00"}
    monkeypatch.setattr(tensorrt, "load_weights", lambda *a: genuine(*a[:-1], a[-1].model_copy(update=first)))
    assert failed() == {"block_01"}


def whole_lora(path: Path, bundle: Bundle) -> Path:
    """A LoRA of rank 2 of every linear in ``text_kv``, ``embed``, ``head`` and the blocks of an exported bundle."""
    generator, tensors = np.random.default_rng(3), {}
    for graph in filter(is_of_transformer, bundle.manifest.graphs):
        for name, place in weight_places(bundle, graph).items():
            linear = linear_of(graph, name)
            if linear is not None and len(place.shape) == 2:
                inner, out = place.shape
                down, up = generator.standard_normal((2, inner)), generator.standard_normal((out, 2))
                tensors[f"transformer.{linear}.lora_A.weight"] = (down * inner**-0.5).astype(np.float32)
                tensors[f"transformer.{linear}.lora_B.weight"] = (up / 10).astype(np.float32)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps({})})
    return path


def distance(found: np.ndarray, right: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(found - right) / np.linalg.norm(right))


@pytest.mark.slow
def test_an_exported_bundle_with_and_without_a_lora(bundle: Path, stand_ins: SimpleNamespace, tmp_path: Path) -> None:
    """Every graph of the transformer takes its weights as inputs: the clips are those of ONNX Runtime, LoRA and all.

    Sums may be in another order, which ONNX Runtime chooses by where weights lie, too: two right implementations are
    within the gates of the golden runs from the truth, so twice the largest from each other.
    """
    own = stand_ins.add_engines(shutil.copytree(bundle, tmp_path / "own"))
    graphs = list(filter(is_of_transformer, Bundle.open(own).manifest.graphs))
    share(own, stand_ins, graphs)
    assert len({each.file.path for each in read_manifest(own).engines if each.graph.startswith("block_")}) == 1
    sampling = read_golden(Bundle.open(own)).sampling
    assert sampling is not None
    gate = 2 * max(output.gate for each in sampling.runs for output in each.outputs)
    lora, made = str(whole_lora(tmp_path / "a.safetensors", Bundle.open(own))), []
    for loras in ([], [lora], []):
        with (
            opened(own, stand_ins, *loras)[0] as backend,
            OnnxRuntimeBackend(with_loras(Bundle.open(own), loras)) as reference,
        ):
            clips = [StivPipeline(Bundle.open(own), each)(**REQUEST).latents for each in (backend, reference)]
        assert distance(*clips) <= gate
        made.append(clips[0])
    assert np.array_equal(made[0], made[2])
    assert distance(made[1], made[0]) > 10 * gate
