"""The keywords of a pipeline's call: which there are, and which requests they make."""

from typing import Any

import numpy as np
import pytest

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.call import CallOptions, options_of, requests_of_call
from stiv_deploy.runtime.pipeline.request import GenerationRequest

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
SHORT = {"image": "frames", "num_videos_per_prompt": "count", "resize": "fit", "generator": "seed"}
"""Keywords that are no fields, and the fields that they set."""


def test_every_keyword_is_a_field_or_a_short_form_and_every_field_has_one() -> None:
    keywords = set(CallOptions.__annotations__)
    assert keywords - set(GenerationRequest.model_fields) == set(SHORT)
    assert set(GenerationRequest.model_fields) - keywords == {"prompt", "frames", "count", "noise"}
    assert {"frames", "count"} <= set(SHORT.values())


def test_keywords_that_are_left_out_say_nothing() -> None:
    (request,) = requests_of_call("digit", {"seed": 3})
    assert request == GenerationRequest(prompt="digit", seed=3)


def test_a_torch_generator_has_a_seed() -> None:
    import torch

    for seed in (0, 7, 2**63 + 5):
        (request,) = requests_of_call("digit", {"generator": torch.Generator().manual_seed(seed)})
        assert request.seed == seed % 2**63


@pytest.mark.parametrize("tensor", [False, True])
def test_latents_of_all_videos_are_their_initial_noise(tensor: bool) -> None:
    import torch

    noise = np.random.default_rng(0).standard_normal((4, 2, 3, 1, 1), dtype=np.float32)
    latents = torch.from_numpy(noise).requires_grad_() if tensor else noise
    made = requests_of_call(["a", "b"], {"latents": latents, "num_videos_per_prompt": 2, "seed": 5})
    assert [(each.prompt, each.seed, each.count) for each in made] == [
        ("a", 5, 1),
        ("a", 6, 1),
        ("b", 7, 1),
        ("b", 8, 1),
    ]
    for request, own in zip(made, noise, strict=True):
        assert request.noise is not None
        np.testing.assert_array_equal(request.noise.array, own)
        assert GenerationRequest.from_json(request.to_json()) == request


def test_none_says_nothing_either() -> None:
    options = {"negative_prompt": None, "latents": None, "fit": None, "resize": None, "num_videos_per_prompt": None}
    assert requests_of_call("digit", options | {"seed": 3}) == [GenerationRequest(prompt="digit", seed=3)]
    options = {"image": None, "num_frames": None, "guidance_mode": None, "guidance_renorm": None, "decode_tile": None}
    assert requests_of_call("digit", options | {"seed": 3}) == [GenerationRequest(prompt="digit", seed=3)]


def test_short_forms() -> None:
    options: dict[str, Any] = {"image": PICTURE, "num_videos_per_prompt": 2, "resize": True, "seed": 0}
    (request,) = requests_of_call("digit", options)
    assert request == GenerationRequest(prompt="digit", frames={0: PICTURE}, count=2, fit="crop", seed=0)
    assert requests_of_call("digit", options | {"image": {2: PICTURE}})[0].frames.keys() == {2}
    assert requests_of_call("digit", {"resize": False, "seed": 0}) == [GenerationRequest(prompt="digit", seed=0)]
    assert requests_of_call("digit", {"resize": True, "fit": "stretch"})[0].fit == "stretch"


def test_one_request_for_each_prompt_with_seeds_in_a_row() -> None:
    made = requests_of_call(["a", "b"], {"negative_prompt": ["c", "d"], "seed": 5, "num_videos_per_prompt": 3})
    assert [(each.prompt, each.negative_prompt, each.seed, each.count) for each in made] == [
        ("a", "c", 5, 3),
        ("b", "d", 8, 3),
    ]


def test_pictures_are_shared_by_the_requests() -> None:
    first, second = requests_of_call(["a", "b"], {"image": PICTURE})
    assert first.frames[0] is second.frames[0]


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "no prompt given"),
        (["a", 3], {}, "a prompt must be a string, got 3"),
        (["a", "b"], {"negative_prompt": ["x"]}, "1 negative prompts for 2 prompts"),
        ("a", {"seed": 1, "generator": np.random.default_rng()}, "give either seed or generator"),
        (["a", "b"], {"seed": 2**63 - 1}, "seed must be from 0 to"),
        ("a", {"resize": True, "fit": "exact"}, "resize is given, and the fit 'exact' resizes nothing; give one"),
        ("a", {"resize": "x"}, "resize must be true or false, got 'x'"),
        (
            "a",
            {"latents": np.zeros((2, 1, 1, 1, 1), np.float32)},
            r"the initial noise of 1 videos is .*, got \[2, 1, 1",
        ),
        ("a", {"latents": np.zeros((1, 1, 1, 1, 1))}, r"latents of noise are float64 \[1, 1, 1, 1\]; give float32"),
        (None, {}, "prompt must be a string or a list of strings, got None"),
        (b"a", {}, "prompt must be a string or a list of strings, got b'a'"),
        ("a", {"negative_prompt": 3}, "negative_prompt must be a string or a list of strings, got 3"),
        ("a", {"generator": 3}, "generator must be one of NumPy or torch, got 3; or give a seed"),
        ("a", {"latents": 3}, "latents are given by frame number, as in .*, got a int"),
    ],
)
def test_refused(prompt: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        requests_of_call(prompt, options)


def test_options_of_a_request_ask_for_it_again() -> None:
    (request,) = requests_of_call("a", {"seed": 3, "guidance_renorm": False, "image": "a.png"})
    options = options_of(request)
    assert requests_of_call(options.pop("prompt"), options) == [request]
