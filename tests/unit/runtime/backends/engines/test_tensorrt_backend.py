"""The TensorRT backend on stand-ins: buffers, arena, contexts, capture, and a whole generation."""

import ctypes
import gc
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.backends.tensorrt import TensorRTBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import dimensions
from stiv_deploy.runtime.errors import BackendError, CaptureError, EngineError
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline


def decoder_arrays(batch: int = 1, frames: int = 4) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, frames, 4, 4, 4)).astype(np.float32)


def bind_decoder(backend: TensorRTBackend, latents: np.ndarray) -> tuple[Any, Any, Any]:
    source = backend.upload(latents)
    target = backend.empty((latents.shape[0], latents.shape[1], 3, 8, 8), "float32")
    return source, target, backend.bind("decoder", {"latents": source}, {"video": target})


def test_whole_generation_equals_onnxruntime(folder: Path, stand_ins: SimpleNamespace) -> None:
    """Every binding, view, in-place step and copy of a real request, against the other backend."""
    arguments: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 3, "seed": 4}
    backend, trt = stand_ins.open(folder)
    with backend:
        ours = StivPipeline(Bundle.open(folder), backend)(**arguments)
    with OnnxRuntimeBackend(Bundle.open(folder)) as reference:
        theirs = StivPipeline(Bundle.open(folder), reference)(**arguments)
    np.testing.assert_array_equal(ours.latents, theirs.latents)
    np.testing.assert_array_equal(ours.frames, theirs.frames)
    assert {engine.graph for engine in trt.loaded} >= {"embed", "head", "step", "decoder", "block_01"}
    assert ours.timings["graphs"] > ours.timings["replays"] > 0, "all steps but the first replay a CUDA graph"
    assert theirs.timings["replays"] == 0


def test_a_generation_without_cuda_graphs_is_the_same_and_says_why(
    folder: Path, stand_ins: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    arguments: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 3, "seed": 4}
    outputs = []
    for refused in (set(), {"embed"}):
        backend, trt = stand_ins.open(folder)
        trt.not_capturable |= refused
        with backend:
            outputs.append(StivPipeline(Bundle.open(folder), backend)(**arguments))
    np.testing.assert_array_equal(outputs[0].latents, outputs[1].latents)
    assert outputs[1].timings["replays"] == 0
    (said,) = caplog.messages
    assert said.startswith("running without a CUDA graph: ")
    assert "embed" in said


def test_profiling_times_every_graph_and_so_captures_none(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    with backend:
        pipe = StivPipeline(Bundle.open(folder), backend, profile=True)
        assert pipe("digit three", num_inference_steps=3, seed=4).timings["replays"] == 0


def test_engines_are_loaded_on_first_use_and_once(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    assert not trt.loaded
    latents = decoder_arrays()
    for _ in range(2):
        bind_decoder(backend, latents)
    assert [engine.graph for engine in trt.loaded] == ["decoder"]


def test_one_arena_serves_all_contexts_and_is_as_large_as_the_largest(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    backend, trt = stand_ins.open(folder, cudart)
    _, _, decode = bind_decoder(backend, decoder_arrays())
    decode()
    small = backend._arena.memory
    assert small is not None
    assert small.size == stand_ins.scratch_of("decoder")
    dims = dimensions(
        backend._bundle.manifest.model, batch=1, model_batch=1, video_frames=4, height=8, width=8, text_tokens=5
    )
    spec = backend._bundle.manifest.graphs["head"].spec
    buffers = {t.name: backend.empty(t.sized(dims), t.dtype) for t in (*spec.inputs, *spec.outputs)}
    for buffer in buffers.values():
        backend.write(buffer, np.zeros(buffer.shape, np.float32))
    head = backend.bind("head", {t.name: buffers[t.name] for t in spec.inputs}, {"velocity": buffers["velocity"]})
    old = small.address
    del small
    gc.collect()
    assert old not in cudart.memory, "the outgrown arena is freed"
    for call in (decode, head, decode):  # the earlier binding must have moved to the new arena
        call()
    arena = backend._arena.memory
    assert arena is not None
    assert arena.size == stand_ins.scratch_of("head")
    assert {c.memory for engine in trt.loaded for c in engine.contexts} == {(arena.address, arena.size)}


def test_contexts_own_no_device_memory(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    bind_decoder(backend, decoder_arrays())
    assert trt.context_settings == ["user managed"]


def test_rtx_contexts_share_one_cache_of_compiled_kernels(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch, stand_ins: SimpleNamespace
) -> None:
    monkeypatch.setattr(stand_ins.trt, "IRuntimeCache", object, raising=False)
    strategies = SimpleNamespace(EAGER="wait for the kernels of the shapes")
    monkeypatch.setattr(stand_ins.trt, "DynamicShapesKernelSpecializationStrategy", strategies, raising=False)
    backend, trt = stand_ins.open(stand_ins.add_engines(own_bundle, backend="tensorrt-rtx"), flavour="tensorrt-rtx")
    kept = [bind_decoder(backend, decoder_arrays()) for _ in range(2)]
    assert [(how.strategy, how.cache) for how in trt.context_settings] == [("user managed", "kernels")] * 2
    assert {how.dynamic_shapes_kernel_specialization_strategy for how in trt.context_settings} == {strategies.EAGER}
    assert trt.caches == 1
    assert len(kept) == 2


def test_context_of_a_dead_binding_is_reused_and_a_live_one_is_not(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    first, second = bind_decoder(backend, decoder_arrays()), bind_decoder(backend, 2 * decoder_arrays())
    assert len(trt.loaded[0].contexts) == 2
    del first
    gc.collect()
    other = decoder_arrays(batch=2)
    third = bind_decoder(backend, other)
    assert len(trt.loaded[0].contexts) == 2
    third[2]()
    assert backend.read(third[1]).shape == (2, 4, 3, 8, 8)
    second[2]()
    np.testing.assert_array_equal(backend.read(second[1])[..., ::2, ::2], 2 * decoder_arrays()[:, :, :3])


def test_captured_calls_replay_on_new_data(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    runs = trt.loaded[0].contexts[0].runs
    replay = backend.capture([call])
    assert trt.loaded[0].contexts[0].runs == runs, "nothing runs while capturing"
    backend.write(source, 3 * decoder_arrays())
    replay()
    assert trt.loaded[0].contexts[0].runs == runs + 1
    np.testing.assert_array_equal(backend.read(target)[..., ::2, ::2], 3 * decoder_arrays()[:, :, :3])


def test_capture_after_the_arena_grew(folder: Path, stand_ins: SimpleNamespace) -> None:
    """Contexts that ran in the old arena only would have to set themselves up while being captured."""
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    backend._arena.reserve(2 * stand_ins.scratch_of("decoder"))
    runs = trt.loaded[0].contexts[0].runs
    replay = backend.capture([call])
    assert trt.loaded[0].contexts[0].runs == runs + 1
    backend._arena.reserve(3 * stand_ins.scratch_of("decoder"))  # the graph goes on in the arena that it knows
    still_works(backend, source, target, replay)


def test_views_that_are_not_aligned_are_copied(folder: Path, stand_ins: SimpleNamespace) -> None:
    """``setTensorAddress`` demands 256 bytes; rows of a stacked tensor need not have them. Also when captured."""
    backend, _ = stand_ins.open(folder)
    latents = np.stack([decoder_arrays(frames=1), 2 * decoder_arrays(frames=1)])
    source, target = backend.upload(latents), backend.empty((2, 1, 1, 3, 8, 8), "float32")
    offset = 16  # bytes
    odd = type(target)(target.address + offset, (1, 1, 3, 8, 8), "float32", target.owner)
    call = backend.bind("decoder", {"latents": source[1]}, {"video": odd})
    shifted = type(source)(source.address + offset, (1, 1, 4, 4, 4), "float32", source.owner)
    other = backend.bind("decoder", {"latents": shifted}, {"video": target[0]})
    expected = np.ravel(latents)[offset // 4 :][:64].reshape(1, 1, 4, 4, 4)
    call(), other()
    for replay in (call, backend.capture([call])):
        replay()
        np.testing.assert_array_equal(backend.read(odd)[..., ::2, ::2], latents[1, :, :, :3])
    for replay in (other, backend.capture([other])):
        replay()
        np.testing.assert_array_equal(backend.read(target[0])[..., ::2, ::2], expected[:, :, :3])


def test_fault_while_capturing_ends_the_capture(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    for fault, wanted in ((BackendError("broken"), CaptureError), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(wanted):
            backend.capture([call, partial(raise_, fault)])
        assert trt.cudart.captured is None
    still_works(backend, source, target, call)


def test_calls_that_never_ran_run_before(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    replay = backend.capture([call])
    assert trt.loaded[0].contexts[0].runs == 1
    still_works(backend, source, target, replay)


def test_launch_that_fails_while_capturing(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    wanted = "no CUDA graph could be captured: graph decoder: the engine could not be launched"
    with pytest.raises(CaptureError, match=wanted):
        backend.capture([partial(setattr, trt.loaded[0].contexts[0], "set_up", False), call])
    assert trt.cudart.last_error == 0, "another library would take it for its own"
    still_works(backend, source, target, call)


def test_contexts_that_say_no_are_not_captured(folder: Path, stand_ins: SimpleNamespace) -> None:
    """``is_stream_capturable``, which RTX has; a library without it is not asked."""
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    trt.not_capturable.add("decoder")
    with pytest.raises(CaptureError, match="TensorRT cannot capture decoder into a CUDA graph"):
        backend.capture([call])
    assert "cudaStreamBeginCapture" not in trt.cudart.calls
    still_works(backend, source, target, call)


def test_a_library_without_the_question_is_not_asked(
    folder: Path, stand_ins: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, trt = stand_ins.open(folder)
    bound = bind_decoder(backend, decoder_arrays())
    bound[2]()
    monkeypatch.delattr(type(trt.loaded[0].contexts[0]), "is_stream_capturable")
    still_works(backend, *bound[:2], backend.capture([bound[2]]))


def test_a_graph_that_cuda_refuses(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    trt.cudart.refuse_graphs = True
    wanted = "no CUDA graph could be captured: cudaGraphInstantiate failed: cudaErrorNotSupported .operation not"
    with pytest.raises(CaptureError, match=wanted):
        backend.capture([call])
    assert trt.cudart.last_error == 0
    still_works(backend, source, target, call)


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("thread", [lambda work: work(), in_thread], ids=["this thread", "another thread"])
def test_what_dies_while_capturing_is_freed_afterwards(
    folder: Path, stand_ins: SimpleNamespace, thread: Callable[[Callable[[], None]], None]
) -> None:
    """A buffer, a graph of an earlier capture, and memory of another backend in this process."""
    backend, trt = stand_ins.open(folder)
    neighbour, _ = stand_ins.open(folder, trt.cudart)
    source, target, call = bind_decoder(backend, decoder_arrays())
    call()
    doomed = [backend.empty((7,), "float32"), neighbour.empty((7,), "float32"), backend.capture([call])]
    addresses = {buffer.address for buffer in doomed[:2]}
    kept = trt.cudart.memory.keys() - addresses
    doomed.append(doomed)  # a cycle: the collector's business

    def drop() -> None:
        doomed.clear()
        gc.collect()

    def strew() -> None:
        thread(drop)
        assert addresses <= trt.cudart.memory.keys()
        assert not gc.isenabled(), "the collector would end what it likes in the midst of the capture"

    replay = backend.capture([call, strew])
    assert trt.cudart.memory.keys() == kept
    assert gc.isenabled()
    assert "cudaGraphExecDestroy" in trt.cudart.calls
    still_works(backend, source, target, replay)


def test_what_died_in_a_capture_that_failed_is_freed_too(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    doomed = [backend.empty((7,), "float32")]
    before = len(trt.cudart.memory)
    with pytest.raises(CaptureError):
        backend.capture([doomed.clear, partial(raise_, BackendError("broken"))])
    assert len(trt.cudart.memory) == before - 1
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    gc.disable()
    try:
        backend.capture([])
        assert not gc.isenabled()
    finally:
        gc.enable()


def raise_(fault: BaseException) -> None:
    raise fault


def still_works(backend: TensorRTBackend, source: Any, target: Any, call: Any) -> None:
    latents = 5 * decoder_arrays()
    backend.write(source, latents)
    call()
    np.testing.assert_array_equal(backend.read(target)[..., ::2, ::2], latents[:, :, :3])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5), width=st.integers(1, 9), dtype=st.sampled_from(["float32", "int64", "bool"]), data=st.data()
)
def test_rows_are_copied_within_the_device(
    folder: Path, stand_ins: SimpleNamespace, rows: int, width: int, dtype: Any, data: st.DataObject
) -> None:
    backend, trt = stand_ins.open(folder)
    ours, theirs = ((start + np.arange(rows * width)).reshape(rows, width).astype(dtype) for start in (0, 1000))
    target, source = backend.upload(ours), backend.upload(theirs)
    count, to, of = data.draw(st.integers(0, rows)), *(data.draw(st.integers(0, rows - 1)) for _ in range(2))
    backend.copy(target.first(count), source.first(count))
    backend.copy(target[to], source[of])
    ours[:count] = theirs[:count]
    ours[to] = theirs[of]
    np.testing.assert_array_equal(backend.read(target), ours)
    np.testing.assert_array_equal(backend.read(source), theirs)


def test_copies_are_captured(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    target, source = backend.upload(np.zeros(3, np.float32)), backend.upload(np.ones(3, np.float32))
    replay = backend.capture([partial(backend.copy, target, source)])
    np.testing.assert_array_equal(backend.read(target), np.zeros(3))
    backend.write(source, np.full(3, 7, np.float32))
    replay()
    np.testing.assert_array_equal(backend.read(target), np.full(3, 7))


def test_bfloat16_is_read_as_float32(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    buffer = backend.empty((2, 2), "bfloat16")
    raw = np.array([[0x3F80, 0xC000], [0x0000, 0x4049]], np.uint16)  # 1, -2, 0, 3.140625
    ctypes.memmove(buffer.address, raw.ctypes.data, raw.nbytes)
    np.testing.assert_array_equal(backend.read(buffer), np.array([[1, -2], [0, 3.140625]], np.float32))


def test_memory_is_freed_with_the_last_view(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    backend, _ = stand_ins.open(folder, cudart)
    buffer = backend.empty((3, 5), "float32")
    address, row = buffer.address, buffer[1]
    del buffer
    gc.collect()
    assert address in cudart.memory
    del row
    gc.collect()
    assert address not in cudart.memory


def test_binding_keeps_its_buffers_alive(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    backend, _ = stand_ins.open(folder, cudart)
    source, target, call = bind_decoder(backend, decoder_arrays())
    addresses = {source.address, target.address}
    del source, target
    gc.collect()
    assert addresses <= cudart.memory.keys()
    call()
    del call
    gc.collect()
    assert not addresses & cudart.memory.keys()


def test_close_releases_everything_and_may_be_repeated(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    backend, _ = stand_ins.open(folder, cudart)
    bound = bind_decoder(backend, decoder_arrays())
    bound[2]()
    del bound
    backend.close()
    backend.close()
    gc.collect()
    assert not cudart.streams
    assert not cudart.memory


def test_out_of_memory_is_one_line(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder, stand_ins.cudart(limit=1000))
    with pytest.raises(BackendError, match="cudaMalloc failed: cudaErrorMemoryAllocation .out of memory"):
        backend.empty((1000,), "float32")


def test_failed_launch_is_an_error(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    _, _, call = bind_decoder(backend, decoder_arrays())
    trt.launches = False
    with pytest.raises(BackendError, match="graph decoder: the engine could not be launched"):
        call()


def test_shape_outside_the_buckets(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    with pytest.raises(
        EngineError, match=r"graph decoder has engines for the buckets small, not for latents 9x4x4x4x4"
    ):
        bind_decoder(backend, decoder_arrays(batch=9))


def test_profile_of_the_engine_that_allows_the_shapes(folder: Path, stand_ins: SimpleNamespace) -> None:
    """An engine of several buckets has a profile for each; the first that fits is selected."""
    backend, trt = stand_ins.open(folder)
    small, large = (1, 4, 4, 4, 4), (1, 6, 4, 6, 6)
    trt.profiles["decoder"] = [{"latents": (small, small, small)}, {"latents": (small, small, large)}]
    bound = [bind_decoder(backend, decoder_arrays(frames=frames)) for frames in (4, 5)]
    assert [context.profile for context in trt.loaded[0].contexts] == [0, 1]
    assert len(bound) == 2


def test_no_profile_of_the_engine_allows_the_shapes(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, trt = stand_ins.open(folder)
    trt.profiles["decoder"] = [{"latents": ((1, 1, 4, 4, 4),) * 3}]
    with pytest.raises(EngineError, match=r"no optimization profile allows .* run: stiv build"):
        bind_decoder(backend, decoder_arrays())


def test_engine_with_other_tensors(folder: Path, stand_ins: SimpleNamespace) -> None:
    backend, _ = stand_ins.open(folder)
    buffer = backend.upload(decoder_arrays())
    with pytest.raises(EngineError, match=r"graph decoder: the engine has tensors \['latents', 'video'\], bound are"):
        backend.bind("decoder", {"latents": buffer}, {"movie": buffer})


def test_a_quarter_of_the_bytes_leaves_the_device_into_one_page_locked_buffer(
    folder: Path, stand_ins: SimpleNamespace
) -> None:
    """Both for frames at once and for a few at a time, which go through the same buffer."""
    request: dict[str, Any] = {"prompt": "digit three moving left", "num_inference_steps": 1, "seed": 4}
    cudart = stand_ins.cudart()
    backend, _ = stand_ins.open(folder, cudart)
    with backend:
        pipe = StivPipeline(Bundle.open(folder), backend)
        frames = pipe(**request).frames
        assert cudart.fetched[-1] == (frames.size, True)
        (pinned,) = cudart.pinned
        frames = pipe(**request).frames
        assert cudart.fetched[-1] == (frames.size, True)
        assert list(cudart.pinned) == [pinned], "one buffer for all clips of a size"
        pipe.close()
    del pipe
    gc.collect()
    assert not cudart.pinned


def test_where_no_pages_can_be_locked_an_ordinary_buffer_does(folder: Path, stand_ins: SimpleNamespace) -> None:
    cudart = stand_ins.cudart()
    cudart.pinned_limit = 0
    backend, _ = stand_ins.open(folder, cudart)
    with backend:
        source = backend.upload(np.arange(12, dtype=np.float32).reshape(3, 4))
        staged = backend.staging(source)
        backend.fetch(source, staged)
        np.testing.assert_array_equal(staged, np.arange(12).reshape(3, 4))
        assert cudart.fetched[-1] == (48, False)
