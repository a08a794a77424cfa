"""The request as a value: JSON and back, every fault one line, limits on every number and text."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.limits import BOUNDS, SEED_LIMIT, TEXT_LIMIT
from stiv_deploy.runtime.pipeline.request import NAMES, GenerationRequest, in_a_row, new_seed

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
LATENT = np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 2, 2)
FIELDS = GenerationRequest.model_fields


def numbers(name: str) -> st.SearchStrategy[Any]:
    low, high = BOUNDS[name]
    return st.integers(int(low), int(high)) if BOUNDS[name].whole else st.floats(low, high)


@st.composite
def requests(draw: st.DrawFn) -> GenerationRequest:
    """Any request; its seed leaves room for its videos."""
    values: dict[str, Any] = {name: draw(numbers(name)) for name in draw(st.sets(st.sampled_from(sorted(BOUNDS))))}
    if "seed" in values:
        values["seed"] = min(values["seed"], SEED_LIMIT - values.get("count", 1))
    values |= {name: draw(st.sampled_from(list(kind))) for name, kind in NAMES.items() if draw(st.booleans())}
    given_frames = st.dictionaries(st.integers(-9, 9), st.sampled_from([PICTURE, "a.png", Path("b/ä.png")]), max_size=3)
    given_latents = st.dictionaries(st.integers(-9, 9), st.just(LATENT), max_size=2)
    given_values = draw(st.sampled_from(["frames", "latents"]))
    values[given_values] = draw(given_frames if given_values == "frames" else given_latents)
    if values.get("count", 1) == 1 and draw(st.booleans()):
        values["noise"] = np.stack([LATENT, -LATENT])
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
    return GenerationRequest(prompt=draw(text), negative_prompt=draw(text), **values)


@given(requests())
def test_a_request_survives_json(request: GenerationRequest) -> None:
    text = json.dumps(request.to_json())
    assert GenerationRequest.from_json(text) == request
    assert json.dumps(GenerationRequest.from_json(json.loads(text)).to_json()) == text
    assert GenerationRequest.model_validate_json(text) == request


def test_only_the_prompt_is_needed_and_json_has_no_more_than_is_set() -> None:
    request = GenerationRequest(prompt="")
    assert GenerationRequest.from_json({"prompt": ""}) == request
    assert GenerationRequest.from_json(b'{"prompt": "", "seed": null}') == request
    assert set(request.to_json()) == {"prompt", "negative_prompt", "fit", "background", "count"}


def test_a_request_is_frozen_and_keeps_its_own_values() -> None:
    frames = {0: PICTURE}
    request = GenerationRequest(prompt="digit", frames=frames)
    frames[1] = PICTURE
    assert list(request.frames) == [0]
    with pytest.raises(ValidationError, match="frozen"):
        request.seed = 3  # type: ignore[misc]


def test_numbers_of_numpy_are_numbers() -> None:
    request = GenerationRequest(prompt="", seed=np.int64(3), fps=np.float32(8), guidance_renorm=np.bool_(True))
    assert request == GenerationRequest(prompt="", seed=3, fps=8, guidance_renorm=True)
    assert type(request.seed) is int
    assert type(request.fps) is float


def test_every_number_has_bounds() -> None:
    numeric = {int, float, int | None, float | None}
    assert {name for name, field in FIELDS.items() if field.annotation in numeric} == set(BOUNDS)


@pytest.mark.parametrize("name", BOUNDS)
def test_both_ends_of_every_number(name: str) -> None:
    low, high = BOUNDS[name]
    outside = (low - 1, high + 1) if BOUNDS[name].whole else (math.nextafter(low, -math.inf), high * 1.001)
    for value in (low, high):
        count = {"count": 1} if name == "seed" else {}
        assert getattr(GenerationRequest(**{"prompt": "", name: value} | count), name) == value
    for value in outside:
        with pytest.raises(
            RequestError, match=rf"^{name} must be from {low} to {high}, got {value}$".replace("+", r"\+")
        ):
            GenerationRequest(**{"prompt": "", name: value})
    wrong = [True, "3", [], math.nan, math.inf] + ([1.5] if BOUNDS[name].whole else [])
    for value in wrong:
        with pytest.raises(RequestError, match=f"^{name} must be a (whole|finite) number, got "):
            GenerationRequest(**{"prompt": "", name: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no prompt given"),
        ({"prompt": None}, "a prompt must be a string, got None"),
        ({"prompt": 3}, "a prompt must be a string, got 3"),
        ({"prompt": "x" * (TEXT_LIMIT + 1)}, f"a prompt has at most {TEXT_LIMIT} characters, got {TEXT_LIMIT + 1}"),
        ({"prompt": "\ud800"}, r"a prompt must be Unicode text, got '\\ud800'"),
        ({"prompt": "", "negative_prompt": None}, "a negative prompt must be a string, got None"),
        ({"prompt": "", "promt": 1}, "a request has no 'promt'; there are: prompt, negative_prompt, frames, "),
        ({"prompt": "", "count": None}, "count must be a whole number, got None"),
        ({"prompt": "", "guidance_mode": "cfg"}, "unknown guidance_mode 'cfg'; there are: none, jit, sit"),
        ({"prompt": "", "solver": 3}, "unknown solver 3; there are: euler, heun, ab2"),
        ({"prompt": "", "fit": None}, "unknown fit None; there are: exact, stretch, crop, pad"),
        ({"prompt": "", "solver_weights": [[1, "2"]]}, "solver_weights must be a finite number, got '2'"),
        ({"prompt": "", "solver_weights": [[1, True]]}, "solver_weights must be a finite number, got True"),
        ({"prompt": "", "solver_weights": [1, 2]}, "solver_weights.0: Input should be a valid tuple, got 1"),
        ({"prompt": "", "guidance_renorm": "yes"}, "guidance_renorm must be true or false, got 'yes'"),
        ({"prompt": "", "skip_blocks": "yes"}, "skip_blocks must be true or false, got 'yes'"),
        ({"prompt": "", "skip_blocks": 1}, "skip_blocks must be true or false, got 1"),
        ({"prompt": "", "skipped_steps": [3, "5"]}, "skipped_steps are whole numbers, got '5'"),
        ({"prompt": "", "skipped_steps": [True]}, "skipped_steps are whole numbers, got True"),
        ({"prompt": "", "skipped_steps": [3.0]}, "skipped_steps are whole numbers, got 3.0"),
        ({"prompt": "", "skipped_steps": [-1]}, "skipped_steps.0: Input should be greater than or equal to 0, got -1"),
        ({"prompt": "", "skipped_steps": 3}, "skipped_steps: Input should be a valid tuple, got 3"),
        ({"prompt": "", "skipped_steps": [None]}, "skipped_steps.0: Input should be a valid integer"),
        ({"prompt": "", "frames": "a.png"}, r"images are given by frame number, as in \{0: ...\}, got a str"),
        ({"prompt": "", "frames": {"first": "a.png"}}, "images are given by frame number, got 'first'"),
        ({"prompt": "", "frames": {True: "a.png"}}, "images are given by frame number, got True"),
        ({"prompt": "", "frames": {0.0: "a.png"}}, "images are given by frame number, got 0.0"),
        ({"prompt": "", "frames": {0: 3}}, "cannot use a int as an image"),
        ({"prompt": "", "latents": [LATENT]}, "latents are given by frame number"),
        ({"prompt": "", "latents": {0: LATENT.astype(np.float64)}}, "are float64"),
        ({"prompt": "", "noise": LATENT}, r"latents of noise are float32 \[4, 2, 2\]; give float32 \[T, C, h, w\]"),
        ({"prompt": "", "noise": np.full((1, 1, 1, 1), np.nan, np.float32)}, "latents of noise are not finite"),
        ({"prompt": "", "latents": {0: LATENT}, "frames": {1: "a.png"}}, "frames and latents are given; give either"),
        (
            {"prompt": "", "seed": SEED_LIMIT - 1, "count": 2},
            r"seed must be from 0 to 2\^63 - 2, got 9223372036854775807",
        ),
    ],
)
def test_a_fault_is_one_line(values: dict[str, Any], message: str) -> None:
    for make in (lambda: GenerationRequest(**values), lambda: GenerationRequest.from_json(values)):
        with pytest.raises(RequestError, match=message) as caught:
            make()
        text = str(caught.value)
        assert "\n" not in text
        assert "Value error" not in text
        assert "pydantic" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the request is not JSON"),
        ("[" * 100_000, "the request is not JSON"),
        ('["digit"]', "a request: Input should be"),
        ("null", "a request: Input should be"),
        ('{"prompt": "", "seed": NaN}', "seed must be a whole number, got nan"),
        ('{"prompt": "", "frames": {"1e3": "a.png"}}', "images are given by frame number, got '1e3'"),
    ],
)
def test_json_that_is_no_request(text: str, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        GenerationRequest.from_json(text)
    assert "\n" not in str(caught.value)


def test_a_changed_request_is_checked_like_any() -> None:
    request = GenerationRequest(prompt="a", frames={0: PICTURE}, seed=1)
    assert request.changed(seed=2) == GenerationRequest(prompt="a", frames={0: PICTURE}, seed=2)
    with pytest.raises(RequestError, match="seed must be from 0"):
        request.changed(seed=-1)


def test_pictures_in_every_form(tmp_path: Path) -> None:
    image = Image.fromarray(PICTURE)
    request = GenerationRequest(prompt="", frames={0: PICTURE, -1: image})
    assert request.frames[0] == request.frames[-1]
    assert GenerationRequest.from_json({"prompt": "", "frames": {"-1": "a.png"}}).frames[-1].path == "a.png"


def test_seeds_in_a_row_count_all_videos() -> None:
    listed = in_a_row([GenerationRequest(prompt="a", count=3), GenerationRequest(prompt="b")], 5)
    assert [request.seed for request in listed] == [5, 8]


def test_new_seeds_are_new_and_drawn_from_a_generator() -> None:
    assert new_seed() != new_seed()
    assert new_seed(np.random.default_rng(3)) == new_seed(np.random.default_rng(3)) < 2**32


def test_schema_describes_every_field() -> None:
    schema = GenerationRequest.model_json_schema()
    assert schema["required"] == ["prompt"]
    assert schema["additionalProperties"] is False
    assert all(FIELDS[name].description for name in FIELDS)
    assert set(schema["properties"]) == set(FIELDS)
    steps = next(form for form in schema["properties"]["num_inference_steps"]["anyOf"] if form["type"] == "integer")
    assert (steps["minimum"], steps["maximum"]) == BOUNDS["num_inference_steps"]


def test_limits_are_said_where_the_request_is_explained() -> None:
    assert f"{TEXT_LIMIT} characters" in (inspect.getdoc(GenerationRequest) or "")
