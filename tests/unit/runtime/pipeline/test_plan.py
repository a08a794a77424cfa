"""From requests to a plan: defaults, batches, everything refused before a device is touched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from toys import Toy, make_bundle

from stiv_deploy.runtime import Bundle, GenerationRequest, GuidanceMode, RequestError, Solver
from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline import limits
from stiv_deploy.runtime.pipeline.plan import RECOMMENDED, plan_generation

PICTURE = np.full((8, 8, 3), 51, dtype=np.uint8)
LATENT = np.ones((4, 4, 4), dtype=np.float32)

LEFT_OUT = (
    "unseen",
    "solver_weights",
    "skip_blocks",
    "skipped_steps",
    "guidance_from",
    "guidance_until",
    "decode_tile",
    "noise",
)
"""Fields that a planned request may leave open."""


def request_of(prompt: str = "digit", **values: Any) -> GenerationRequest:
    return GenerationRequest(prompt=prompt, **values)


def test_defaults_are_the_bundles(toy_bundle: Bundle) -> None:
    (video,) = plan_generation(toy_bundle, request_of()).videos
    values = dict(video.request)
    sampling = toy_bundle.manifest.recommended()
    for name, recommended in RECOMMENDED.items():
        assert values[name] == getattr(sampling, recommended), name
    assert (values["original_height"], values["original_width"], values["stride"]) == (8, 8, 1)
    assert 0 <= video.seed < 2**32
    assert all(value is not None for name, value in values.items() if name not in LEFT_OUT)
    assert video.micro.tolist() == [8, 8, 0, 0, 1, 4]
    assert video.micro.dtype == np.float32


def test_what_is_asked_for_is_planned(toy_bundle: Bundle) -> None:
    request = request_of(
        "left",
        negative_prompt="right",
        num_frames=2,
        height=4,
        width=6,
        fps=12.5,
        stride=3,
        original_height=720,
        num_inference_steps=9,
        guidance_mode="sit",
        guidance_scale=2,
        image_guidance_scale=1,
        guidance_renorm=False,
        solver="heun",
        time_shift=2,
        late_stretch=1.5,
        seed=7,
        decode_tile=4,
    )
    plan = plan_generation(toy_bundle, request)
    (video,) = plan.videos
    assert (plan.size.frames, plan.size.height, plan.size.width, plan.decode_tile) == (2, 4, 6, 4)
    assert (video.prompt, video.negative_prompt, video.seed, video.origin) == ("left", "right", 7, 0)
    used = video.settings
    assert (used.steps, used.guidance_mode, used.guidance_scale, used.image_scale) == (9, GuidanceMode.SIT, 2, 1)
    assert (used.renorm, used.solver, used.time_shift, used.late_stretch) == (False, Solver.HEUN, 2, 1.5)
    assert video.micro.tolist() == [720, 6, 0, 0, 3, 2]
    assert video.request == request.changed(original_width=6)


def test_one_video_each_with_its_own_request(toy_bundle: Bundle) -> None:
    plan = plan_generation(toy_bundle, [request_of("a", seed=5, count=3), request_of("b", seed=1, fps=3)])
    assert [(video.prompt, video.seed, video.origin) for video in plan.videos] == [
        ("a", 5, 0),
        ("a", 6, 0),
        ("a", 7, 0),
        ("b", 1, 1),
    ]
    assert {video.request.count for video in plan.videos} == {1}
    assert [video.request.fps for video in plan.videos] == [8, 8, 8, 3]
    assert [len(batch) for batch in plan.batches] == [2, 2]
    assert plan.bundle == toy_bundle.manifest.bundle_hash


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=4))
def test_batches_are_few_and_even(toy_bundle: Bundle, counts: list[int]) -> None:
    plan = plan_generation(toy_bundle, [request_of(str(index), count=count) for index, count in enumerate(counts)])
    sizes = [len(batch) for batch in plan.batches]
    assert len(sizes) == -(-sum(counts) // 3)  # the toy takes three
    assert max(sizes) - min(sizes) <= 1
    assert [video.origin for video in plan.videos] == [
        index for index, count in enumerate(counts) for _ in range(count)
    ]


def test_a_resolved_request_plans_to_itself(toy_bundle: Bundle, tmp_path: Path) -> None:
    Image.fromarray(PICTURE).save(tmp_path / "a.png")
    request = request_of(frames={-1: tmp_path / "a.png", 0: PICTURE}, count=2)
    for video in plan_generation(toy_bundle, request).videos:
        assert sorted(video.request.frames) == [0, 3]
        again = plan_generation(toy_bundle, GenerationRequest.from_json(video.request.to_json())).videos[0]
        assert again.request == video.request
        assert again.settings == video.settings
        for index, image in video.given.images.items():
            np.testing.assert_array_equal(again.given.images[index], image)


def test_equal_pictures_are_read_once(toy_bundle: Bundle) -> None:
    requests = [request_of("a", frames={0: PICTURE}, count=2), request_of("b", frames={0: PICTURE.copy()})]
    other = request_of("c", frames={0: PICTURE[::-1] // 2})
    first, second, third, fourth = plan_generation(toy_bundle, [*requests, other]).videos
    assert first.given is second.given is third.given
    assert fourth.given is not first.given


def test_pictures_are_fitted_as_asked(toy_bundle: Bundle) -> None:
    wide = np.full((4, 16, 3), 51, dtype=np.uint8)
    for fit, grey in (("stretch", 64), ("crop", 64), ("pad", 16)):
        (video,) = plan_generation(toy_bundle, request_of(frames={0: wide}, fit=fit)).videos
        assert (video.given.images[0] == 51).all(axis=-1).sum() == grey


def test_transparent_pictures_lie_on_the_background(toy_bundle: Bundle) -> None:
    clear = np.zeros((4, 8, 4), dtype=np.uint8)
    plan = plan_generation(
        toy_bundle, [request_of(frames={0: clear}, fit="pad", background=each) for each in ("black", "white")]
    )
    assert [(video.given.images[0] == 255).all() for video in plan.videos] == [False, True]
    assert plan.videos[1].request.background == "white"


def test_given_latents(toy_bundle: Bundle) -> None:
    (video,) = plan_generation(toy_bundle, request_of(latents={-1: LATENT, 0: 2 * LATENT})).videos
    assert sorted(video.given.latents) == [0, 3]
    np.testing.assert_array_equal(video.given.latents[3], LATENT)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 7}, "frames is 7; this bundle takes 1 to 6"),
        ({"height": 9}, "height is 9; this bundle takes 4 to 12 in multiples of 2"),
        ({"decode_tile": 3}, "decode_tile is 3; this bundle takes 4 or more in multiples of 2"),
        ({"frames": {4: PICTURE}}, "image for frame 4, but the video has frames 0 to 3"),
        ({"frames": {3: PICTURE, -1: PICTURE}}, "image for frame 3 given twice"),
        ({"frames": {0: PICTURE[:4]}}, r"the image is 8x4 \(width x height\), the video is 8x8"),
        ({"frames": {0: "nowhere.png"}}, "nowhere.png: no such image file"),
        ({"latents": {4: LATENT}}, "latents for frame 4, but the video has frames 0 to 3"),
        ({"latents": {0: LATENT[:, :2]}}, r"latents of frame 0 are \[4, 2, 4\]; 4 frames of 8x8 wants \[4, 4, 4\]"),
    ],
)
def test_refused(toy_bundle: Bundle, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plan_generation(toy_bundle, request_of(**values))
    assert "\n" not in str(caught.value)


def test_a_causal_vae_refuses_frames_that_it_cannot_code(toy_bundle: Bundle) -> None:
    manifest = toy_bundle.manifest
    causal = manifest.model.model_copy(update={"causal_vae": True, "temporal_factor": 4})
    bundle = Bundle(toy_bundle.folder, manifest.model_copy(update={"model": causal}))
    with pytest.raises(RequestError, match="images are given for frames 4; .*give frame 0 alone"):
        plan_generation(bundle, request_of(num_frames=5, frames={-1: PICTURE}))
    plan = plan_generation(bundle, request_of(num_frames=5, latents={-1: LATENT}))
    assert list(plan.videos[0].given.latents) == [1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 2}, "have one size, but request 0 has 4 frames of 8x8 and request 1 has 2 frames of 8x8"),
        ({"width": 4}, "have one size, but request 0 has 4 frames of 8x8 and request 1 has 4 frames of 4x8"),
        ({"decode_tile": 4}, "have one decode_tile, but request 0 has None and request 1 has 4; plan them apart"),
    ],
)
def test_requests_of_different_shapes_are_refused(toy_bundle: Bundle, values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        plan_generation(toy_bundle, [request_of(), request_of(**values)])
    assert "\n" not in str(caught.value)


def test_requests_that_are_none(toy_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="no request given"):
        plan_generation(toy_bundle, [])
    with pytest.raises(RequestError, match="a plan is made of GenerationRequest, got a str"):
        plan_generation(toy_bundle, "digit")  # type: ignore[arg-type]


def test_recommendations_are_fields_of_both_sides(toy_bundle: Bundle) -> None:
    assert set(RECOMMENDED) <= set(GenerationRequest.model_fields)
    assert set(RECOMMENDED.values()) == set(type(toy_bundle.manifest.recommended()).model_fields)


def test_videos_that_no_memory_holds(toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "memory_bytes", lambda: 10_000)
    few = GenerationRequest(prompt="digit", count=2)
    assert len(plan_generation(toy_bundle, few).videos) == 2
    with pytest.raises(RequestError, match="100 times 4 frames of 8x8 needs .* GiB of memory, here are .*;"):
        plan_generation(toy_bundle, few.changed(count=100))
    monkeypatch.setattr(limits, "memory_bytes", lambda: None)
    assert len(plan_generation(toy_bundle, few.changed(count=100)).videos) == 100


def student_bundle(folder: Path, **trained: Any) -> Bundle:
    manifest = read_manifest(make_bundle(folder, Toy(student=Student(guidance=(2.0, 6.0)))))
    facts = {"tasks": ("ti2v",), "givings": ("first",), "strides": (1,), "sizes": ((8, 8),), "frames": (4,)}
    write_manifest(folder, manifest.model_copy(update={"trained": TrainedOn(**facts | trained)}))
    return Bundle.open(folder)


def test_a_student_is_planned_in_one_row(tmp_path: Path) -> None:
    """A request that its teacher has taken is one that it takes, too."""
    bundle = student_bundle(tmp_path / "bundle")
    (own,) = plan_generation(bundle, request_of()).videos
    (asked,) = plan_generation(bundle, request_of(guidance_mode="jit", guidance_scale=5, guidance_renorm=True)).videos
    for video, scale in ((own, 3.0), (asked, 5.0)):
        assert (video.settings.guidance_mode, video.settings.guidance_scale) == (GuidanceMode.NONE, scale)
        assert len(video.settings.rows()) == 1
        assert (video.request.guidance_mode, video.request.guidance_scale) == (GuidanceMode.JIT, scale)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"guidance_mode": "none"}, "guidance_mode none"),
        ({"guidance_mode": "sit"}, "guidance_mode sit"),
        ({"guidance_scale": 6.5}, "trained for 2 to 6"),
        ({"guidance_until": 0.5}, "guided at all times"),
        ({"guidance_renorm": False}, "leave guidance_renorm out"),
        ({"negative_prompt": "left"}, "no row for a negative prompt"),
        ({"unseen": "zero"}, "no branch without the image"),
    ],
)
def test_what_a_student_has_no_row_for_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        plan_generation(student_bundle(tmp_path / "bundle"), request_of(**values))
    assert "\n" not in str(caught.value)


def test_a_student_of_views_has_zeros_in_it(tmp_path: Path) -> None:
    plan_generation(student_bundle(tmp_path / "bundle", tasks=("views",)), request_of(unseen="zero"))
