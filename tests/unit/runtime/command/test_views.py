"""``stiv views``: what is written and told, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.manifest import TrainedOn

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(tmp_path / "solid.png")
    return tmp_path / "solid.png"


def trained_for(bundle: Path, *tasks: str) -> Path:
    trained = TrainedOn(tasks=tasks, givings=("first",), strides=(1,), sizes=((8, 8),), frames=(5,))
    write_manifest(bundle, read_manifest(bundle).model_copy(update={"trained": trained}))
    return bundle


def test_views_are_written_and_told(run: Run, own_bundle: Path, picture: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "around.png", tmp_path / "report.json"
    bundle = trained_for(own_bundle, "views")
    words: list[Any] = ["--azimuths", "45,225", "--steps", 1, "--seed", 3, "--json", report]
    code, told, err = run("views", bundle, picture, "--out", out, *words)
    assert (code, err) == (0, "")
    assert told == f"{out}: views of 8x8 at azimuths 45, 225, seed 3\n"
    values = json.loads(report.read_text())
    assert [each["azimuth"] for each in values["cameras"]] == [45, 225]
    assert values["clips"][0]["request"]["unseen"] == "zero"
    again = tmp_path / "again.webp"
    assert run("generate", bundle, "--request", report, "--out", again)[0] == 0
    turned = ["--request", again, "--steps", 2, "--out", tmp_path / "turned.gif", "--json", report]
    assert run("views", bundle, picture, *turned)[0] == 0
    request = json.loads(report.read_text())["clips"][0]["request"]
    assert (request["seed"], request["num_inference_steps"], request["guidance_scale"]) == (3, 2, 3.5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--azimuths", "30"], "those of 5 frames are 45, 135, 225, 315"),
        (["--azimuths", "left"], "want degrees with commas between, as in 30,90"),
        (["--out", "PICTURE"], "would replace"),
        (["--out", "around.jpg"], "cannot write '.jpg'"),
    ],
)
def test_bad_input_is_one_line(
    run: Run, own_bundle: Path, picture: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    words = [str(picture) if word == "PICTURE" else word for word in words]
    out = [] if "--out" in words else ["--out", tmp_path / "out.png"]
    code, _, err = run("views", trained_for(own_bundle, "views"), picture, *words, *out)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["solid.png"]


def test_a_model_that_was_not_trained_for_views(run: Run, own_bundle: Path, picture: Path, tmp_path: Path) -> None:
    code, _, err = run("views", trained_for(own_bundle, "t2v"), picture, "--out", tmp_path / "out.png")
    assert code == 2
    assert "this model was not trained for views of an object; its tasks are t2v" in err
