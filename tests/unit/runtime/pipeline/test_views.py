"""Views of an object: the training's layout, what the clip is asked for, and what is written."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime import Bundle, RequestError, StivPipeline
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.films import open_film
from stiv_deploy.runtime.pipeline.grid import grid_sides
from stiv_deploy.runtime.pipeline.records import read_requests
from stiv_deploy.runtime.pipeline.views import DEFAULTS, TASK, cameras, chosen_cameras
from stiv_deploy.stiv_ref.data.views.sets import layout
from stiv_deploy.stiv_ref.tasks import TASKS

PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
FEW: dict[str, Any] = {"num_inference_steps": 1, "seed": 3}


def opened(path: Path, **changes: Any) -> StivPipeline:
    """The toy bundle, trained for views of 4 and 6 frames."""
    plain = Bundle.open(path)
    facts: dict[str, Any] = {"tasks": ("t2i", "views"), "givings": ("none", "first"), "strides": (1, 3)}
    trained = TrainedOn(**facts | {"sizes": ((8, 8),), "frames": (4, 6)} | changes)
    bundle = Bundle(plain.folder, plain.manifest.model_copy(update={"trained": trained}))
    return StivPipeline(bundle, open_backend("onnxruntime", bundle, 1))


@pytest.fixture(scope="module")
def pipe(bundle_path: Path) -> Iterator[StivPipeline]:
    with opened(bundle_path) as pipe:
        yield pipe


@pytest.mark.parametrize("frames", [1, 2, 4, 7, 8])
def test_cameras_are_those_of_the_training_data(frames: int) -> None:
    assert [tuple(each)[1:] for each in cameras(frames)] == [(each.azimuth, each.elevation) for each in layout(frames)]
    assert [each.frame for each in cameras(frames)] == list(range(1, frames))


def test_chosen_cameras() -> None:
    assert [each.azimuth for each in chosen_cameras(7, None)] == [30, 90, 150, 210, 270, 330]
    assert [each.frame for each in chosen_cameras(7, [330, 30, 30, -30])] == [1, 6]
    for wrong in (45, float("nan"), 0, "30"):
        with pytest.raises(RequestError, match="those of 7 frames are 30, 90, 150, 210, 270, 330"):
            chosen_cameras(7, [wrong])  # type: ignore[list-item]


def test_the_clip_is_asked_for_as_in_the_paper(pipe: StivPipeline) -> None:
    views = pipe.views(PICTURE, **FEW)
    (request,) = views.output.requests
    assert (request.prompt, request.num_frames, request.stride) == ("", 6, 1)
    assert (request.guidance_scale, request.guidance_mode, request.unseen) == (3.5, "jit", "zero")
    assert list(request.frames) == [0]
    assert views.output.warnings == [()]
    assert views.frames.shape == (6, 8, 8, 3)
    again = pipe("", image=PICTURE, num_frames=6, stride=1, guidance_scale=3.5, unseen="zero", **FEW)
    assert np.array_equal(again.latents, views.output.latents)
    own = pipe.views(PICTURE, azimuths=[60], num_frames=4, guidance_scale=2, **FEW)
    assert (own.output.requests[0].guidance_scale, len(own.frames)) == (2, 2)


def test_what_is_written_shows_the_views_and_carries_the_request(pipe: StivPipeline, tmp_path: Path) -> None:
    views = pipe.views(PICTURE, azimuths=[36, 180], **FEW)
    assert views.labels == ["given", "36°, elevation 30°", "180°, elevation 30°"]
    sheet, turntable = views.write(tmp_path / "views.png", 2), views.write(tmp_path / "views.webp", 2)
    with Image.open(sheet) as image:
        height, width = grid_sides(3, 16, 16)
        assert (image.width, image.height) >= (width, height)
    assert open_film(turntable).frames == 3
    for path in (sheet, turntable):
        ((request, _),) = read_requests(path)
        assert json.loads(request.model_dump_json())["unseen"] == "zero"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"azimuths": [45]}, "no view has the azimuth 45; those of 6 frames are 36, 108, 180, 252, 324"),
        ({"azimuths": []}, "no azimuth given"),
        ({"num_frames": 1}, "ask for 2 or more"),
        ({"num_videos_per_prompt": 2}, "leave the count out"),
    ],
)
def test_bad_input(pipe: StivPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.views(PICTURE, **FEW, **options)


def test_a_model_that_was_not_trained_for_views(bundle_path: Path) -> None:
    with opened(bundle_path, tasks=("ti2v", "all")) as pipe, pytest.raises(RequestError, match="tasks are ti2v, all"):
        pipe.views(PICTURE, **FEW)


def test_the_unconditional_branch_sees_what_training_showed() -> None:
    assert DEFAULTS["unseen"] == TASKS[TASK].unseen.value
