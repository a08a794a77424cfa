import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import parser, printer

from stiv_deploy.runtime.backends import onnxruntime as module
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Buffer
from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend, session_options, thread_count
from stiv_deploy.runtime.backends.onnxruntime_memory import DeviceMemory, identity_graph
from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import QuantizationRecord
from stiv_deploy.runtime.errors import BackendError, BundleError, StivError


@pytest.fixture
def backend(toy_bundle: Bundle) -> OnnxRuntimeBackend:
    return OnnxRuntimeBackend(toy_bundle)


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> OnnxRuntimeBackend:
    """The CPU backend on numpy memory, and on the ``OrtValue`` memory that the CUDA provider gets."""
    if request.param == "device":
        monkeypatch.setattr(module, "HostMemory", partial(DeviceMemory, where="cpu"))
    return OnnxRuntimeBackend(toy_bundle)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=4), dtype=st.sampled_from(["float32", "int64", "bool"]))
def test_what_is_written_is_read(memory: OnnxRuntimeBackend, shape: list[int], dtype: Any) -> None:
    array = (np.arange(np.prod(shape)) % 2).reshape(shape).astype(dtype)
    buffer = memory.upload(array)
    assert buffer.address % 4 == 0
    read = memory.read(buffer)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, array)
    read[:] = 0
    np.testing.assert_array_equal(memory.read(buffer), array)


def test_views_share_memory(memory: OnnxRuntimeBackend) -> None:
    buffer = memory.upload(np.zeros((3, 2, 2), dtype=np.float32))
    rows = np.ones((2, 2), dtype=np.float32)
    memory.write(buffer[1], rows)
    np.testing.assert_array_equal(memory.read(buffer)[:, 0, 0], [0, 1, 0])
    np.testing.assert_array_equal(memory.read(buffer[1]), rows)
    np.testing.assert_array_equal(memory.read(buffer.reshape(3, 4)[1]), rows.reshape(4))


def test_a_host_view_is_the_buffer_and_a_device_has_none(memory: OnnxRuntimeBackend) -> None:
    whole = memory.upload(np.zeros((3, 2), dtype=np.float32))
    view = memory.host_view(whole.part(8, (2,), "int64"))
    assert (view is None) == isinstance(whole.owner, DeviceMemory)
    if view is not None:
        view[:] = 0x3F80_0000  # the lower half is fp32's 1
        np.testing.assert_array_equal(memory.read(whole), [[0, 0], [1, 0], [1, 0]])
    assert memory.host_view(memory.empty((2,), "bfloat16")) is None
    with pytest.raises(AssertionError):
        whole.part(8, (3,), "int64")


SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=3)
DTYPES = st.sampled_from(["float32", "int64", "bool"])


def numbered(shape: list[int], dtype: str, start: int) -> np.ndarray:
    """Values that all differ, as far as the type has that many."""
    return (start + np.arange(np.prod(shape))).reshape(shape).astype(dtype)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(shape=SHAPES, dtype=DTYPES, data=st.data())
def test_rows_are_views_and_are_copied_alone(
    memory: OnnxRuntimeBackend, shape: list[int], dtype: Any, data: st.DataObject
) -> None:
    """``first`` and an index share memory; a copy between views changes the target's rows and nothing else."""
    ours, theirs = numbered(shape, dtype, 0), numbered(shape, dtype, 1000)
    target, source = memory.upload(ours), memory.upload(theirs)
    count = data.draw(st.integers(0, shape[0]))
    memory.copy(target.first(count), source.first(count))
    ours[:count] = theirs[:count]
    np.testing.assert_array_equal(memory.read(target), ours)
    to, of = (data.draw(st.integers(0, shape[0] - 1)) for _ in range(2))
    memory.copy(target[to], source[of])
    ours[to] = theirs[of]
    np.testing.assert_array_equal(memory.read(target), ours)
    np.testing.assert_array_equal(memory.read(source), theirs)
    np.testing.assert_array_equal(memory.read(target.first(count)), ours[:count])


def test_copies_are_between_equals(memory: OnnxRuntimeBackend) -> None:
    target = memory.empty((2, 3), "float32")
    for other in (memory.empty((3, 2), "float32"), memory.empty((2, 3), "float16")):
        with pytest.raises(AssertionError):
            memory.copy(target, other)
    with pytest.raises(AssertionError):
        target.first(3)


def test_the_graph_that_copies_is_onnx() -> None:
    model = onnx.load_from_string(identity_graph())
    onnx.checker.check_model(model, full_check=True)
    wanted = '<ir_version: 8, opset_import: ["": 14]> copy (uint8[n] x) => (uint8[n] y) { y = Identity (x) }'
    assert printer.to_text(model) == printer.to_text(parser.parse_model(wanted))


def test_capture_by_default_runs_the_calls_in_order(backend: OnnxRuntimeBackend) -> None:
    ran: list[str] = []
    whole = backend.capture([partial(ran.append, "embed"), partial(ran.append, "head")])
    assert not ran
    whole()
    whole()
    assert ran == ["embed", "head"] * 2


def test_strided_arrays_are_written_in_order(memory: OnnxRuntimeBackend) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = memory.empty((3, 2), "float32")
    memory.write(buffer, array.T)
    np.testing.assert_array_equal(memory.read(buffer), array.T)


def test_half_precision_is_read(memory: OnnxRuntimeBackend) -> None:
    values = np.array([1.5, -2.0, 0.15625], dtype=np.float32)
    half, brain = memory.empty((3,), "float16"), memory.empty((3,), "bfloat16")
    half.owner.write(0, values.astype(np.float16).view(np.uint8))
    brain.owner.write(0, (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8))
    assert memory.read(half).dtype == np.float16
    assert memory.read(brain).dtype == np.float32
    np.testing.assert_array_equal(memory.read(half), values)
    np.testing.assert_array_equal(memory.read(brain), values)


def bind_text(backend: OnnxRuntimeBackend, rows: int, length: int) -> tuple[Any, dict[str, Buffer], dict[str, Buffer]]:
    ids = backend.upload(np.arange(rows * length, dtype=np.int64).reshape(rows, length))
    mask = backend.upload(np.ones((rows, length), dtype=np.int64))
    inputs = {"token_ids": ids, "token_mask": mask}
    outputs = {
        "text_states": backend.empty((rows, length, 4), "float32"),
        "pooled": backend.empty((rows, 4), "float32"),
    }
    return backend.bind("text_encoder", inputs, outputs), inputs, outputs


def test_a_bound_graph_runs_on_its_buffers(memory: OnnxRuntimeBackend, toy: Any) -> None:
    call, inputs, outputs = bind_text(memory, 2, 3)
    for ids in (np.arange(6), np.arange(6)[::-1]):
        ids = ids.reshape(2, 3).astype(np.int64)
        memory.write(inputs["token_ids"], ids)
        call()
        states, pooled = toy.text(ids, np.ones((2, 3)))
        np.testing.assert_allclose(memory.read(outputs["text_states"]), states, rtol=1e-6)
        np.testing.assert_allclose(memory.read(outputs["pooled"]), pooled, rtol=1e-6)


def test_bindings_of_one_graph_do_not_disturb_each_other(backend: OnnxRuntimeBackend) -> None:
    small, _, small_out = bind_text(backend, 1, 2)
    large, _, large_out = bind_text(backend, 3, 5)
    large()
    before = backend.read(large_out["pooled"])
    small()
    np.testing.assert_array_equal(backend.read(large_out["pooled"]), before)
    assert backend.read(small_out["pooled"]).shape == (1, 4)
    assert len(backend._sessions) == 1


def test_a_binding_keeps_its_buffers_alive(backend: OnnxRuntimeBackend) -> None:
    import gc

    call, _, outputs = bind_text(backend, 2, 3)
    call()
    wanted = backend.read(outputs["pooled"])
    gc.collect()
    for _ in range(20):
        backend.upload(np.full((2, 3), 7, dtype=np.int64))  # would take the place of a freed input
        call()
    np.testing.assert_array_equal(backend.read(outputs["pooled"]), wanted)


def test_graphs_are_loaded_on_first_use_only(backend: OnnxRuntimeBackend) -> None:
    assert not backend._sessions
    bind_text(backend, 1, 1)
    assert list(backend._sessions) == ["text_encoder"]
    backend.close()
    assert not backend._sessions


def replace_graph(folder: Path, name: str, data: bytes) -> Bundle:
    """A bundle whose manifest vouches for a graph file with other contents."""
    path = folder / f"onnx/{name}.onnx"
    path.write_bytes(data)
    manifest = read_manifest(folder)
    record = manifest.graphs[name].model_copy(update={"file": file_record(folder, f"onnx/{name}.onnx")})
    return Bundle(folder, manifest.model_copy(update={"graphs": {**manifest.graphs, name: record}}))


@pytest.mark.parametrize("data", [b"", b"not a graph at all", b"\x08\x0a" * 30])
def test_corrupt_graph_with_a_matching_hash(own_bundle: Path, data: bytes) -> None:
    backend = OnnxRuntimeBackend(replace_graph(own_bundle, "head", data))
    with pytest.raises(BundleError, match=r"head.onnx: not a graph that ONNX Runtime can load .*stiv export") as caught:
        backend.bind("head", {}, {})
    assert "\n" not in str(caught.value)


def test_damaged_graph_is_not_even_parsed(own_bundle: Path) -> None:
    path = own_bundle / "onnx/head.onnx"
    toy_bundle = Bundle.open(own_bundle)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(BundleError, match="SHA-256"):
        OnnxRuntimeBackend(toy_bundle).bind("head", {}, {})


def test_unsupported_precision_names_another(own_bundle: Path) -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> g (bfloat16[N] x) => (bfloat16[N] y) { y = Sigmoid (x) }'
    model = parser.parse_model(text)
    toy_bundle = replace_graph(own_bundle, "head", onnx.ModelProto.SerializeToString(model))
    with pytest.raises(BackendError, match="onnxruntime cannot run this float32 graph .*--precision float32"):
        OnnxRuntimeBackend(toy_bundle).bind("head", {}, {})
    record = QuantizationRecord(format="int8", scales="", layers={})
    quantized = Bundle(own_bundle, toy_bundle.manifest.model_copy(update={"quantization": record}))
    with pytest.raises(BackendError, match="onnxruntime cannot run this float32 graph .*--activations float32"):
        OnnxRuntimeBackend(quantized).bind("head", {}, {})


def test_failure_inside_a_graph_is_one_line(backend: OnnxRuntimeBackend) -> None:
    x = backend.upload(np.zeros((1, 2, 3, 4), dtype=np.float32))
    condition = backend.upload(np.zeros((1, 4), dtype=np.float32))
    model_input = backend.upload(np.zeros((1, 2, 4, 5, 5), dtype=np.float32))
    velocity = backend.empty((1, 2, 4, 5, 5), "float32")
    call = backend.bind("head", {"x": x, "condition": condition, "model_input": model_input}, {"velocity": velocity})
    with pytest.raises(StivError, match="graph head failed in ONNX Runtime") as caught:
        call()
    assert "\n" not in str(caught.value)


class FakeSession:
    """A session of the CUDA provider that notes in ``places`` where its providers, inputs and outputs are."""

    places: list[Any]

    def __init__(self, _graph: Any, _options: Any, providers: list[Any], **_: Any) -> None:
        self.places.append((providers[0][0], providers[0][1]["device_id"]))

    def get_providers(self) -> list[str]:
        return ["CUDAExecutionProvider"]

    def io_binding(self) -> Any:
        return SimpleNamespace(bind_input=self.note, bind_output=self.note)

    def note(self, _name: str, *where: Any) -> None:
        self.places.append(where[:2])

    def run_with_iobinding(self, _binding: Any) -> None:
        pass


def test_everything_is_on_the_gpu_that_was_asked_for(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions, bindings, memory, and what is staged to get in and out of it."""
    places: list[Any] = []
    value = ort.OrtValue.ortvalue_from_numpy(np.zeros(64, np.uint8))

    def allocate(_what: Any, *where: Any) -> ort.OrtValue:
        places.append(where[-2:])
        return value

    monkeypatch.setattr(FakeSession, "places", places, raising=False)
    monkeypatch.setattr(ort, "InferenceSession", FakeSession)
    monkeypatch.setattr(module, "check_session", lambda *_: None)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", allocate)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_numpy", allocate)
    backend = OnnxRuntimeBackend(toy_bundle, "cuda", device=2)
    assert backend.device == "CUDA device 2"
    _, inputs, outputs = bind_text(backend, 1, 2)
    backend.copy(inputs["token_ids"], inputs["token_mask"])
    backend.read(outputs["pooled"])
    assert set(places) == {("CUDAExecutionProvider", "2"), ("cuda", 2)}
    assert ("CUDAExecutionProvider", "2") in places


def test_threads_from_argument_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STIV_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert thread_count(None) == 0
    monkeypatch.setenv("STIV_THREADS", "3")
    assert thread_count(None) == 3
    assert thread_count(2) == 2
    monkeypatch.setenv("STIV_THREADS", "many")
    with pytest.raises(BackendError, match="whole number up to 1024, 0 for all cores; got 'many'"):
        thread_count(None)
    for bad in (-1, 1025, 10**20, 10**5000):
        with pytest.raises(BackendError, match="whole number up to 1024") as caught:
            thread_count(bad)
        assert len(str(caught.value)) < 200


def test_more_threads_than_cores_are_not_made(toy_bundle: Bundle) -> None:
    cores = os.cpu_count() or 1
    assert thread_count(1000) == cores
    assert open_backend("onnxruntime", toy_bundle, 1000)._options.intra_op_num_threads == cores  # type: ignore[attr-defined]
    assert OnnxRuntimeBackend(toy_bundle, threads=cores + 3)._options.intra_op_num_threads == cores + 3


def test_a_buffer_that_no_machine_has_is_one_line(memory: OnnxRuntimeBackend) -> None:
    for shape in ((2**50,), (2**40, 2**40)):
        with pytest.raises(BackendError, match=r"has no [\d.]+ GiB for one buffer .*; ask for fewer clips"):
            memory.empty(shape, "float32")


def test_swapped_graphs_are_refused_though_their_hashes_hold(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    for one, other in (("head", "decoder"), ("block_00", "block_01")):
        graphs = dict(manifest.graphs)
        files = {name: own_bundle / graphs[name].file.path for name in (one, other)}
        contents = {name: file.read_bytes() for name, file in files.items()}
        for name, source in ((one, other), (other, one)):
            files[name].write_bytes(contents[source])
            record = file_record(own_bundle, f"onnx/{name}.onnx")
            graphs[name] = graphs[name].model_copy(update={"file": record})
        write_manifest(own_bundle, manifest.model_copy(update={"graphs": graphs}))
        with pytest.raises(BundleError, match=f"{one}.onnx: (another graph than|does not read its own weights)"):
            bind_any(OnnxRuntimeBackend(Bundle.open(own_bundle), threads=1), one)
        for name, file in files.items():
            file.write_bytes(contents[name])


def bind_any(backend: OnnxRuntimeBackend, graph: str) -> None:
    backend.bind(graph, {}, {})


def test_another_thread_count_in_the_same_process_still_runs(toy_bundle: Bundle) -> None:
    for threads in (1, 2, 1):
        call, _, _ = bind_text(OnnxRuntimeBackend(toy_bundle, threads=threads), 1, 2)
        call()


FAKE_FP8 = """
<ir_version: 10, opset_import: ["": 23]>
g (float[M,4] x) => (float[M,3] y) <
    float scale = {0.03125}, float8e4m3fn zero, float8e4m3fn weight
> {
    q = QuantizeLinear (x, scale, zero)
    d = DequantizeLinear (q, scale, zero)
    w = DequantizeLinear (weight, scale)
    shape = Constant <value_ints=[-1, 2, 2]> ()
    r = Reshape (d, shape)
    t = Transpose <perm=[0, 2, 1]> (r)
    back = Constant <value_ints=[-1, 4]> ()
    s = Reshape (t, back)
    y = MatMul (s, w)
}"""


def fp8_graph(path: Path) -> None:
    model = parser.parse_model(FAKE_FP8.replace(", float8e4m3fn zero, float8e4m3fn weight", ""))
    kind = onnx.TensorProto.FLOAT8E4M3FN
    one = 0x38  # sign 0, exponent 7 (bias 7), mantissa 0
    weight = onnx.helper.make_tensor("weight", kind, [4, 3], bytes([one] * 12), raw=True)
    model.graph.initializer.extend([onnx.helper.make_tensor("zero", kind, [], b"\0", raw=True), weight])
    onnx.save(model, path)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_fp8_graphs_load(tmp_path: Path, precision: Any) -> None:
    """By default, ONNX Runtime makes products of them that it has no kernels for."""
    fp8_graph(tmp_path / "g.onnx")
    with pytest.raises(Exception, match="float8e4m3fn"):
        ort.InferenceSession(tmp_path / "g.onnx", session_options(1), providers=["CPUExecutionProvider"])
    options = session_options(1, "fp8", precision)
    session = ort.InferenceSession(tmp_path / "g.onnx", options, providers=["CPUExecutionProvider"])
    x = np.array([[1.0, 2.0, 3.0, 4.03]], dtype=np.float32)  # 4.03 / scale = 128.96: codes there are 16 apart
    (y,) = session.run(None, {"x": x})
    np.testing.assert_array_equal(y, np.full((1, 3), 10 * 0.03125, dtype=np.float32))


@pytest.mark.parametrize(
    ("quantization", "precision", "kept"),
    [(None, "float16", False), ("fp8", "float32", True), ("int8", "float16", True), ("int8", "float32", False)],
)
def test_integer_products_are_made_where_there_are_kernels(quantization: Any, precision: Any, kept: bool) -> None:
    options = session_options(1, quantization, precision)
    try:
        value = options.get_session_config_entry("session.disable_quant_qdq")
    except RuntimeError:
        value = "0"
    assert (value == "1") == kept


def test_the_backend_reads_the_manifest(own_bundle: Path) -> None:
    manifest = read_manifest(own_bundle)
    record = QuantizationRecord(format="fp8", scales="", layers={})
    write_manifest(own_bundle, manifest.model_copy(update={"quantization": record}))
    backend = OnnxRuntimeBackend(Bundle.open(own_bundle))
    assert backend._options.get_session_config_entry("session.disable_quant_qdq") == "1"
