import gc
import itertools
import math
import re
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import (
    BackendError,
    Bundle,
    BundleError,
    Cancelled,
    GenerationRequest,
    RequestError,
    StivPipeline,
    open_backend,
)
from stiv_deploy.runtime.backends.base import Buffer
from stiv_deploy.runtime.sampling.noise import draw_noise

PROMPT = "digit three moving left"
RED = np.zeros((8, 8, 3), dtype=np.uint8)
RED[..., 0] = 255
GREY = np.full((8, 8, 3), 51, dtype=np.uint8)
LATENT = np.linspace(-1, 1, 64, dtype=np.float32).reshape(4, 4, 4)


def test_defaults_come_from_the_bundle(pipe: StivPipeline) -> None:
    steps: list[int] = []
    out = pipe(PROMPT, seed=1, callback_on_step_end=lambda _pipe, step, _time, _values: steps.append(step))
    assert isinstance(out.frames, np.ndarray)
    assert out.frames.shape == (1, 4, 8, 8, 3)
    assert out.frames.dtype == np.uint8
    assert out.latents.shape == (1, 4, 4, 4, 4)
    assert out.latents.dtype == np.float32
    assert out.seeds == [1]
    assert steps == [0, 1, 2, 3]


def test_frames_are_the_decoded_latents(pipe: StivPipeline) -> None:
    out = pipe(PROMPT, seed=1)
    pixels = np.clip(np.rint((out.latents[:, :, :3] + 1) * 127.5), 0, 255)  # (1, T, 3, h, w)
    wanted = pixels.repeat(2, axis=-2).repeat(2, axis=-1).transpose(0, 1, 3, 4, 2)
    assert np.abs(np.asarray(out.frames, dtype=np.float64) - wanted).max() <= 1  # one fp32 rounding may cross a half


def test_same_seed_same_video_and_another_seed_another(pipe: StivPipeline) -> None:
    first, second, other = (pipe(PROMPT, seed=seed).latents for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)


def test_batched_prompts_equal_single_runs(pipe: StivPipeline) -> None:
    prompts = ["digit three", "moving left", "right", "digit", "left left"]  # two batches of a bundle that takes three
    together = pipe(prompts, seed=10, image=RED)
    assert together.seeds == [10, 11, 12, 13, 14]
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, seed=10 + index, image=RED)
        np.testing.assert_allclose(together.latents[index], alone.latents[0], rtol=0, atol=1e-5)


def test_videos_per_prompt_stand_next_to_each_other(pipe: StivPipeline) -> None:
    out = pipe(["digit three", "left"], seed=3, num_videos_per_prompt=2)
    assert out.seeds == [3, 4, 5, 6]
    np.testing.assert_allclose(out.latents[1], pipe("digit three", seed=4).latents[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(out.latents[2], pipe("left", seed=5).latents[0], rtol=0, atol=1e-5)


def test_generator_draws_the_seed(pipe: StivPipeline) -> None:
    first = pipe(PROMPT, generator=np.random.default_rng(1))
    again = pipe(PROMPT, generator=np.random.default_rng(1))
    assert first.seeds == again.seeds
    np.testing.assert_array_equal(pipe(PROMPT, seed=first.seeds[0]).latents, first.latents)
    assert pipe(PROMPT).seeds != pipe(PROMPT).seeds


@pytest.mark.parametrize("mode", ["none", "jit", "sit"])
@pytest.mark.parametrize("solver", ["euler", "heun", "ab2"])
def test_given_frames_come_out_as_they_went_in(pipe: StivPipeline, mode: str, solver: str) -> None:
    out = pipe(PROMPT, image={0: RED, -1: GREY}, seed=0, guidance_mode=mode, solver=solver)
    assert isinstance(out.frames, np.ndarray)
    np.testing.assert_array_equal(out.frames[0, 0], RED)
    np.testing.assert_array_equal(out.frames[0, 3], GREY)
    np.testing.assert_array_equal(out.latents[0, 0, :3, 0, 0], [1, -1, -1])
    assert not np.array_equal(out.frames[0, 1], RED)


def test_prompt_negative_prompt_scales_and_shift_all_matter(pipe: StivPipeline) -> None:
    def latents(prompt: str = PROMPT, **options: Any) -> np.ndarray:
        return pipe(prompt, seed=0, **options).latents

    base = latents()
    changes: list[Mapping[str, Any]] = [
        {"prompt": "right"},
        {"negative_prompt": "right right"},
        {"guidance_scale": 5.0},
        {"guidance_mode": "none"},
        {"guidance_mode": "sit"},
        {"guidance_renorm": False},
        {"solver": "heun"},
        {"solver": "ab2"},
        {"time_shift": 3.0},
        {"num_inference_steps": 5},
        {"image": RED},
    ]
    for change in changes:
        assert not np.array_equal(latents(**change), base), change
    sit = latents(guidance_mode="sit")
    assert not np.array_equal(latents(guidance_mode="sit", image_guidance_scale=4.0), sit)


def test_unknown_words_and_empty_and_long_prompts_are_fine(pipe: StivPipeline) -> None:
    for prompt in ("zebra", "", "digit " * 50):
        assert pipe(prompt, num_inference_steps=1).latents.shape == (1, 4, 4, 4, 4)


def test_other_sizes_within_the_bucket(pipe: StivPipeline) -> None:
    out = pipe(PROMPT, num_frames=6, height=4, width=12, num_inference_steps=1)
    assert np.asarray(out.frames).shape == (1, 6, 4, 12, 3)


def test_output_types(pipe: StivPipeline) -> None:
    array = pipe(["digit", "left"], seed=0)
    pictures = pipe(["digit", "left"], seed=0, output_type="pil").frames
    assert isinstance(pictures, list)
    assert isinstance(pictures[1][3], Image.Image)
    np.testing.assert_array_equal(
        np.stack([[np.asarray(frame) for frame in video] for video in pictures]), array.frames
    )
    latent = pipe(["digit", "left"], seed=0, output_type="latent")
    assert latent.frames is None
    assert latent.timings["decode"] == 0
    np.testing.assert_array_equal(latent.latents, array.latents)


def test_noise_may_be_given(pipe: StivPipeline) -> None:
    noise = draw_noise([8, 9], (4, 4, 4, 4))
    wanted = [pipe(PROMPT, seed=seed).latents[0] for seed in (8, 9)]
    made = pipe([PROMPT, PROMPT], latents=noise)
    np.testing.assert_allclose(made.latents, wanted, rtol=0, atol=1e-5)
    again = pipe.run(pipe.plan(made.requests)).latents
    np.testing.assert_array_equal(again, made.latents)
    with pytest.raises(RequestError, match=r"the noise is \[2, 4, 4, 4\]; 4 frames of 8x8 wants \[4, 4, 4, 4\]"):
        pipe(PROMPT, latents=noise[:1, :2])
    with pytest.raises(RequestError, match="noise is of one video, and count is 2"):
        GenerationRequest(prompt=PROMPT, noise=noise[0], count=2)


@pytest.mark.parametrize("returned", ["a dictionary", "the values"])
def test_a_callback_may_return_other_latents(pipe: StivPipeline, returned: str) -> None:
    wanted = pipe(PROMPT, seed=3).latents
    kept: dict[int, np.ndarray] = {}
    pipe(PROMPT, seed=3, callback_on_step_end=lambda _pipe, step, _time, values: kept.update({step: values["latents"]}))

    def callback(_pipe: StivPipeline, step: int, _time: float, values: Any) -> Any:
        if step > 1:
            return None
        if returned == "a dictionary":
            return {"latents": kept[step]}
        values["latents"] = kept[step]
        np.testing.assert_array_equal(values["latents"], kept[step])
        return values

    np.testing.assert_array_equal(pipe(PROMPT, seed=4, callback_on_step_end=callback).latents, wanted)
    unchanged = pipe(PROMPT, seed=3, callback_on_step_end=lambda _pipe, _step, _time, values: values).latents
    np.testing.assert_array_equal(unchanged, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callback_on_step_end": 3}, "callback_on_step_end must be callable, got 3"),
        ({"cancel": True}, "cancel must be a threading.Event, got True"),
        ({"output_type": None}, "unknown output_type None; there are: np, pil, pt, latent"),
        ({"callback_on_step_end": lambda *_: {"latents": 3.0}}, r"returned latents float64 \[\]; give float32 \[1, 4"),
        ({"callback_on_step_end": lambda *each: each[-1].__setitem__("total", 3)}, "can change the latents only, not"),
    ],
)
def test_what_can_not_be_used_in_a_run_is_one_line(pipe: StivPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(PROMPT, **options)


def test_frames_as_a_tensor_of_torch(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    out = pipe(PROMPT, seed=1, output_type="pt")
    assert (out.frames.dtype, out.frames.shape) == (torch.float32, (1, 4, 3, 8, 8))
    plain = pipe(PROMPT, seed=1).frames
    np.testing.assert_array_equal((out.frames * 255).round().permute(0, 1, 3, 4, 2).numpy(), plain)
    monkeypatch.setattr("stiv_deploy.runtime.pipeline.output.find_spec", lambda _: None)
    with pytest.raises(RequestError, match="wants torch, which is not installed"):
        pipe(PROMPT, output_type="pt")


def test_to_another_device(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with StivPipeline.from_pretrained(bundle_path, backend="onnxruntime") as pipe:
        wanted, backend = pipe(PROMPT, seed=1).latents, pipe.backend
        assert pipe.to("cpu") is pipe.to(torch.device("cpu")) is pipe
        assert pipe.backend is backend, "it is there already"
        monkeypatch.setattr("stiv_deploy.runtime.pipeline.pipeline.CPU", "elsewhere")
        opened: list[tuple[Any, int]] = []

        def open_another(name: Any, bundle: Bundle, *, device: int) -> Any:
            opened.append((name, device))
            return open_backend("onnxruntime", bundle)

        monkeypatch.setattr("stiv_deploy.runtime.pipeline.pipeline.open_backend", open_another)
        assert pipe.to("cuda:1") is pipe
        assert opened == [(None, 1)]
        assert pipe.backend is not backend
        np.testing.assert_array_equal(pipe(PROMPT, seed=1).latents, wanted)
        monkeypatch.setattr("stiv_deploy.runtime.pipeline.pipeline.CPU", "onnxruntime")
        with pytest.raises(BackendError, match="no backend can use cuda here"):
            pipe.to("cuda")
        for bad in ("gpu", "cuda:x", None, "cuda:1:2"):
            with pytest.raises(RequestError, match="a pipeline moves to 'cpu', 'cuda' or 'cuda:1', got"):
                pipe.to(bad)
        np.testing.assert_array_equal(pipe(PROMPT, seed=1).latents, wanted)
    with pytest.raises(RequestError, match="closed"):
        pipe.to("cpu")


def test_callback_may_look_at_latents(pipe: StivPipeline) -> None:
    seen: list[Any] = []

    def callback(owner: StivPipeline, step: int, time: float, values: Mapping[str, Any]) -> None:
        assert owner is pipe
        assert set(values) == {"latents", "total"}
        seen.append((step, time, values["total"], values["latents"]))

    out = pipe(["digit"] * 4, seed=0, num_inference_steps=2, callback_on_step_end=callback)  # batches of two and two
    assert [entry[:3] for entry in seen] == [(0, 0.5, 4), (1, 1.0, 4), (2, 0.5, 4), (3, 1.0, 4)]
    np.testing.assert_array_equal(np.concatenate([seen[1][3], seen[3][3]]), out.latents)


def test_cancel_stops_between_steps(pipe: StivPipeline) -> None:
    cancel = threading.Event()

    def callback(_pipe: StivPipeline, step: int, _time: float, _values: Mapping[str, Any]) -> None:
        if step == 1:
            cancel.set()

    with pytest.raises(Cancelled, match="cancelled after 2 of 4 steps"):
        pipe(PROMPT, callback_on_step_end=callback, cancel=cancel)
    assert pipe(PROMPT).frames is not None


def test_timings_add_up(pipe: StivPipeline) -> None:
    cold, warm = pipe(PROMPT, image=RED).timings, pipe(PROMPT, image=RED).timings
    phases = ("load", "text", "encode", "denoise", "decode")
    assert cold["load"] > warm["load"]
    assert sum(warm[name] for name in phases) <= warm["total"]
    assert 0 < warm["graphs"] < warm["total"]
    assert all(warm[name] > 0 for name in phases)


def watch_buffers(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Buffer]]:
    """References to all buffers that ``pipe`` allocates from now on."""
    made: list[weakref.ref[Buffer]] = []
    empty = pipe.backend.empty

    def spied(shape: tuple[int, ...], dtype: Any) -> Buffer:
        buffer = empty(shape, dtype)
        made.append(weakref.ref(buffer))
        return buffer

    monkeypatch.setattr(pipe.backend, "empty", spied)
    return made


def alive(buffers: list[weakref.ref[Buffer]]) -> int:
    gc.collect()
    return sum(buffer() is not None for buffer in buffers)


def test_buffers_are_kept_for_the_last_sizes_only(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = watch_buffers(pipe, monkeypatch)
    pipe(PROMPT)
    first = len(buffers)
    pipe(PROMPT, num_inference_steps=2, seed=9)
    assert len(buffers) == first
    pipe(PROMPT, num_frames=1)
    one = len(buffers) - first  # prompts are kept besides, whatever the size
    for frames in (2, 3):
        pipe(PROMPT, num_frames=frames)
    assert len(buffers) == first + 3 * one
    assert alive(buffers) == first + one
    pipe(PROMPT, num_frames=2)
    assert len(buffers) == first + 3 * one


def test_closing_frees_everything(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StivPipeline.from_bundle(bundle_path, "onnxruntime")
    buffers = watch_buffers(pipe, monkeypatch)
    pipe(PROMPT)
    pipe.close()
    assert alive(buffers) == 0
    pipe.close()  # again does no harm
    with pytest.raises(RequestError, match="this pipeline is closed; open one with") as caught:
        pipe(PROMPT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "no prompt given"),
        ({"prompt": ["digit", 3]}, "a prompt must be a string, got 3"),
        ({"prompt": ["a", "b"], "negative_prompt": ["x"]}, "1 negative prompts for 2 prompts"),
        ({"num_inference_steps": 0}, "num_inference_steps must be from 1 to 10000, got 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps must be a whole number, got 2.5"),
        ({"guidance_scale": math.nan}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": "high"}, "guidance_scale must be a finite number, got 'high'"),
        ({"image_guidance_scale": -math.inf}, "image_guidance_scale must be a finite number"),
        ({"time_shift": 0}, "time_shift must be from 0.001 to 1000.0, got 0.0"),
        ({"guidance_mode": "cfg"}, "unknown guidance_mode 'cfg'; there are: none, jit, sit"),
        ({"solver": "rk4"}, "unknown solver 'rk4'; there are: euler, heun, ab2"),
        ({"output_type": "mp4"}, "unknown output_type 'mp4'; there are: np, pil, pt, latent"),
        ({"num_frames": 7}, "frames is 7; this bundle takes 1 to 6"),
        ({"num_frames": 0}, "num_frames must be from 1 to 65536, got 0"),
        ({"num_frames": "all"}, "num_frames must be a whole number, got 'all'"),
        ({"height": 9}, "height is 9; this bundle takes 4 to 12 in multiples of 2"),
        ({"width": 64}, "width is 64; this bundle takes 4 to 12 in multiples of 2"),
        ({"seed": -1}, "seed must be from 0 to"),
        ({"seed": 2**63}, "seed must be from 0 to"),
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": 1, "generator": np.random.default_rng()}, "give either seed or generator"),
        ({"num_videos_per_prompt": 0}, "count must be from 1 to 1000, got 0"),
        ({"image": GREY[:4]}, r"the image is 8x4 \(width x height\), the video is 8x8"),
        ({"image": {4: GREY}}, "image for frame 4, but the video has frames 0 to 3"),
        ({"image": "nowhere.png"}, "nowhere.png: no such image file"),
        ({"image": GREY, "latents": {0: LATENT}}, "frames and latents are given; give either"),
        ({"resize": True, "fit": "exact"}, "resize is given, and the fit 'exact' resizes nothing"),
        ({"background": "mauvish"}, "background must be a colour without alpha, as in white or #336699, got 'mauvish'"),
        ({"colour": "red"}, "a request has no 'colour'; there are: prompt, negative_prompt, "),
    ],
)
def test_bad_request_is_refused_before_anything_runs(
    pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(pipe.backend, "bind", lambda *_: pytest.fail("something was computed"))
    with pytest.raises(RequestError, match=message) as caught:
        pipe(**{"prompt": PROMPT, **options})
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_resizing_is_offered(pipe: StivPipeline) -> None:
    out = pipe(PROMPT, image=np.full((16, 32, 3), 51, dtype=np.uint8), resize=True, num_inference_steps=1)
    np.testing.assert_array_equal(np.asarray(out.frames)[0, 0], GREY)


def test_corrupt_tokenizer(own_bundle: Path) -> None:
    path = own_bundle / "tokenizer.json"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: damaged"):
        StivPipeline.from_bundle(own_bundle)


def test_image_encoder_gets_at_least_the_smallest_clip(toy_bundle: Bundle, bundle_path: Path) -> None:
    """Engines are built for the bucket's sizes only, so one image is encoded as a clip of the smallest size."""
    few = toy_bundle.manifest.buckets[0].model_copy(
        update={"frames": toy_bundle.manifest.buckets[0].frames.model_copy(update={"min": 3})}
    )
    narrow = Bundle(bundle_path, toy_bundle.manifest.model_copy(update={"buckets": (few,)}))
    from stiv_deploy.runtime import open_backend

    shapes: list[tuple[int, ...]] = []
    with StivPipeline(narrow, open_backend("onnxruntime", narrow)) as pipe:
        bind = pipe.backend.bind

        def spied(graph: str, inputs: Any, outputs: Any) -> Any:
            if graph == "image_encoder":
                shapes.append(inputs["video"].shape)
            return bind(graph, inputs, outputs)

        pipe.backend.bind = spied  # type: ignore[method-assign]
        out = pipe(PROMPT, image={1: RED}, num_inference_steps=1)
    assert shapes == [(1, 3, 3, 8, 8)]
    np.testing.assert_array_equal(np.asarray(out.frames)[0, 1], RED)
    assert not np.array_equal(np.asarray(out.frames)[0, 0], RED)


def requests_of_all_kinds() -> list[GenerationRequest]:
    """Requests that differ in everything but their size."""
    common = {"num_inference_steps": 3, "seed": 4}
    return [
        GenerationRequest(prompt="digit three", **common),
        GenerationRequest(prompt="left", **common | {"guidance_mode": "sit", "seed": 9}, frames={-1: GREY}),
        GenerationRequest(prompt="digit", **common, guidance_mode="none", solver="heun"),
        GenerationRequest(prompt="right", negative_prompt="left", **common | {"num_inference_steps": 5}, count=2),
        GenerationRequest(prompt="three", **common, guidance_scale=5, solver="ab2", stride=3, frames={0: RED}),
        GenerationRequest(prompt="three", **common, guidance_renorm=False, time_shift=2, latents={1: LATENT}),
    ]


def test_requests_of_one_run_may_differ_in_all_that_is_no_shape(pipe: StivPipeline) -> None:
    """Each comes out as alone; bit by bit, but for the batch that it is in."""
    requests = requests_of_all_kinds()
    together = pipe.run(pipe.plan(requests))
    alone = [latents for request in requests for latents in pipe.run(pipe.plan(request)).latents]
    np.testing.assert_allclose(together.latents, np.stack(alone), rtol=0, atol=1e-5)
    assert together.seeds == [4, 9, 4, 4, 5, 4, 4]
    frames = np.asarray(together.frames)
    np.testing.assert_array_equal(frames[1, 3], GREY)
    np.testing.assert_array_equal(frames[5, 0], RED)
    np.testing.assert_array_equal(together.latents[6, 1], LATENT)


def test_every_step_of_mixed_requests_is_counted_once(pipe: StivPipeline) -> None:
    seen: list[tuple[int, int]] = []
    plan = pipe.plan(requests_of_all_kinds())
    pipe.run(plan, lambda _pipe, step, _time, values: seen.append((step, values["total"])))
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert {total for _, total in seen} == {len(seen)}


def test_fitted_weights_of_all_ones_are_eulers_rule_and_the_rules_own_are_ab2(pipe: StivPipeline) -> None:
    def made(**options: Any) -> np.ndarray:
        return pipe(PROMPT, seed=1, num_inference_steps=4, output_type="latent", **options).latents

    assert (made(solver="ab2", solver_weights=[(1, 0)] * 3) == made(solver="euler")).all()
    assert (made(solver="ab2", solver_weights=[(1.5, -0.5)] * 3) == made(solver="ab2", time_shift=1)).all()


def test_resolved_requests_make_each_video_again(pipe: StivPipeline, bundle_path: Path) -> None:
    first = pipe([PROMPT, "left"], num_videos_per_prompt=2, image=RED, stride=2, num_inference_steps=2)
    assert first.bundle == pipe.bundle.manifest.bundle_hash
    assert first.backend == "onnxruntime"
    for index, request in enumerate(first.requests):
        again = GenerationRequest.from_json(request.to_json())
        assert again == request
        alone = pipe.run(pipe.plan(again))
        np.testing.assert_allclose(alone.latents[0], first.latents[index], rtol=0, atol=1e-5)
        assert alone.requests == [request]


def test_given_latents_come_out_as_they_went_in(pipe: StivPipeline) -> None:
    out = pipe(PROMPT, latents={-1: LATENT}, seed=0)
    np.testing.assert_array_equal(out.latents[0, 3], LATENT)
    encoded = pipe(PROMPT, image={1: RED}, seed=0)
    again = pipe(PROMPT, latents={1: encoded.latents[0, 1]}, seed=0)
    np.testing.assert_array_equal(again.latents, encoded.latents)
    np.testing.assert_array_equal(again.frames, encoded.frames)


def test_micro_conditions_reach_the_model(pipe: StivPipeline) -> None:
    """The toy's velocity knows their mean: three of stride are as much as three of height."""
    base, stride, height = (
        pipe(PROMPT, seed=0, **each).latents for each in ({}, {"stride": 4}, {"original_height": 11})
    )
    assert not np.array_equal(stride, base)
    np.testing.assert_array_equal(stride, height)
    np.testing.assert_array_equal(pipe(PROMPT, seed=0, stride=1, original_height=8, original_width=8).latents, base)


def test_pictures_that_are_given_often_are_encoded_once(pipe: StivPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    bind = pipe.backend.bind

    def spied(graph: str, inputs: Any, outputs: Any) -> Any:
        call = bind(graph, inputs, outputs)
        return call if graph != "image_encoder" else lambda: (encoded.append(graph), call())[1]

    monkeypatch.setattr(pipe.backend, "bind", spied)
    pipe(["digit", "left", "right", "three"], image=RED.copy(), num_videos_per_prompt=2, num_inference_steps=1)
    assert len(encoded) == 1


def test_a_plan_is_for_its_bundle(pipe: StivPipeline, bundle_of: Callable[[float], Path]) -> None:
    with (
        StivPipeline.from_bundle(bundle_of(0.25), "onnxruntime") as other,
        pytest.raises(RequestError, match="the plan was made for another bundle"),
    ):
        other.run(pipe.plan(GenerationRequest(prompt=PROMPT)))


def test_threads_get_their_clips_one_after_another(pipe: StivPipeline) -> None:
    def options(seed: int) -> dict[str, Any]:
        return {"seed": seed, "num_inference_steps": 3 + seed % 2, "guidance_mode": ("jit", "sit")[seed // 2]}

    alone = [np.asarray(pipe(PROMPT, **options(seed)).frames) for seed in range(4)]
    made: dict[tuple[int, int], Any] = {}
    inside: list[int] = []
    begin = threading.Barrier(4)

    def step(_pipe: StivPipeline, _step: int, _time: float, _values: Mapping[str, Any]) -> None:
        inside.append(threading.get_ident())

    def work(seed: int) -> None:
        begin.wait()
        for turn in range(3):
            made[seed, turn] = pipe(PROMPT, **options(seed), callback_on_step_end=step).frames

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 12
    for (seed, _), frames in made.items():
        np.testing.assert_array_equal(frames, alone[seed])
    runs = [len(list(same)) for _, same in itertools.groupby(inside)]
    assert all(run >= 3 for run in runs)  # no steps of one call between those of another


def test_a_step_callback_can_not_use_its_pipeline(pipe: StivPipeline) -> None:
    faults: list[str] = []

    def callback(owner: StivPipeline, *_: object) -> None:
        for use in (lambda: owner(PROMPT), owner.close):
            with pytest.raises(RequestError, match="whose step callback can not use it") as caught:
                use()
            faults.append(str(caught.value))

    pipe(PROMPT, num_inference_steps=2, callback_on_step_end=callback)
    assert len(faults) == 4
    assert all("\n" not in fault for fault in faults)
    assert pipe(PROMPT, num_inference_steps=1).frames is not None


def test_a_failed_run_lets_the_next_one_in(pipe: StivPipeline) -> None:
    def callback(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipe(PROMPT, callback_on_step_end=callback)
    assert pipe(PROMPT, num_inference_steps=1).frames is not None


def test_cancel_while_another_thread_runs(pipe: StivPipeline) -> None:
    """A call that is cancelled while it waits computes nothing."""
    cancel, inside, caught = threading.Event(), threading.Event(), []

    def wait() -> None:
        inside.wait()
        try:
            pipe(PROMPT, cancel=cancel)
        except Cancelled as error:
            caught.append(str(error))

    waiting = threading.Thread(target=wait)
    waiting.start()

    def callback(*_: object) -> None:
        inside.set()
        cancel.set()

    pipe(PROMPT, callback_on_step_end=callback)
    waiting.join()
    assert caught == ["cancelled before the first step"]


def test_closing_waits_for_the_run(bundle_path: Path) -> None:
    pipe = StivPipeline.from_bundle(bundle_path, "onnxruntime")
    closing = threading.Thread(target=pipe.close)

    def callback(_pipe: StivPipeline, step: int, _time: float, _values: Mapping[str, Any]) -> None:
        if step == 0:
            closing.start()
            closing.join(0.05)
            assert closing.is_alive()

    assert pipe(PROMPT, callback_on_step_end=callback).frames is not None
    closing.join()
    with pytest.raises(RequestError, match="closed"):
        pipe(PROMPT)
