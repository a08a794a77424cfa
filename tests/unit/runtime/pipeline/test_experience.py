"""What a model was not trained for is said, a line each: stride, size, frames, given frames."""

import json
import logging
from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime import Bundle, GenerationRequest, StivPipeline
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.experience import beyond_training
from stiv_deploy.runtime.pipeline.plan import plan_generation

TRAINED = TrainedOn(
    tasks=("t2v", "mix"), givings=("none", "first", "every 2"), strides=(2, 6), sizes=((8, 8), (4, 12)), frames=(2, 4)
)
KNOWN: dict[str, Any] = {"stride": 2, "size": (8, 8), "frames": 4, "given": (), "latent_frames": 4}
LATENT = np.ones((4, 4, 4), dtype=np.float32)


@pytest.fixture
def taught(toy_bundle: Bundle) -> Bundle:
    """The toy bundle, whose model has seen what ``TRAINED`` says, mostly at stride 2."""
    sampling = toy_bundle.manifest.sampling.model_copy(update={"stride": 2})
    return Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update={"trained": TRAINED, "sampling": sampling}))


@pytest.mark.parametrize(
    ("asked", "lines"),
    [
        ({}, []),
        ({"stride": 4}, []),
        ({"stride": 1}, ["stride 1: the model was trained at 2 or 6"]),
        ({"stride": 7}, ["stride 7: the model was trained at 2 or 6"]),
        ({"frames": 1, "stride": 9, "latent_frames": 1}, ["1 frames: the model was trained on 2 or 4"]),
        ({"size": (6, 10)}, []),
        ({"size": (8, 14)}, ["14x8 pixels: the model was trained at 8x8 or 12x4"]),
        ({"frames": 6, "latent_frames": 6}, ["6 frames: the model was trained on 2 or 4"]),
        ({"given": (0,)}, []),
        ({"given": (2, 0)}, []),
        ({"given": (0, 3)}, ["given frames 0, 3: the model was trained to be given none, first or every 2"]),
        ({"given": (1,), "stride": 1}, ["stride 1: ", "given frames 1: "]),
    ],
)
def test_a_line_for_each_thing_that_is_new(asked: dict[str, Any], lines: list[str]) -> None:
    found = beyond_training(TRAINED, **(KNOWN | asked))
    assert len(found) == len(lines)
    assert all(line.startswith(wanted) for line, wanted in zip(found, lines, strict=True))


def test_random_frames_are_any_but_none() -> None:
    always = TRAINED.model_copy(update={"givings": ("random",)})
    assert beyond_training(always, **(KNOWN | {"given": (1, 3)})) == ()
    assert beyond_training(always, **KNOWN) == ("no given frame: the model was trained to be given random",)


def test_a_checkpoint_that_does_not_tell_causes_no_warning() -> None:
    assert beyond_training(None, **(KNOWN | {"stride": 99, "given": (3,)})) == ()


def test_the_stride_of_training_is_the_default(taught: Bundle) -> None:
    plain, asked = plan_generation(
        taught, [GenerationRequest(prompt="digit"), GenerationRequest(prompt="digit", stride=3)]
    ).videos
    assert (plain.request.stride, plain.micro.tolist()) == (2, [8, 8, 0, 0, 2, 4])
    assert (asked.request.stride, asked.micro[4]) == (3, 3)


def test_pictures_and_latents_count_as_given(taught: Bundle) -> None:
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    for given in ({"frames": {-1: picture}}, {"latents": {3: LATENT}}):
        (video,) = plan_generation(taught, GenerationRequest(prompt="digit", **given)).videos
        assert video.warnings == ("given frames 3: the model was trained to be given none, first or every 2",)


def test_one_warning_each_and_the_record_says_it_too(taught: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    backend = open_backend("onnxruntime", taught, 1)
    with StivPipeline(taught, backend) as pipe, caplog.at_level(logging.WARNING):
        requests = [GenerationRequest(prompt="digit", seed=0, num_inference_steps=1, stride=each) for each in (7, 2, 7)]
        output = pipe.run(pipe.plan(requests))
    line = "stride 7: the model was trained at 2 or 6"
    assert [each.getMessage() for each in caplog.records] == [line]
    assert [record.warnings for record in output.records] == [(line,), (), (line,)]
    assert json.loads(output.records[0].embedded())["warnings"] == [line]
    assert "warnings" not in json.loads(output.records[1].embedded())
