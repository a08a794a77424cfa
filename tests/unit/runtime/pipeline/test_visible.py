"""How much a clip is enlarged where nobody says: enough to be seen, no more than a screen, and nothing that is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.pipeline.visible import LARGEST, SMALL, VISIBLE, WATCHED, upscale_for


@pytest.mark.parametrize(
    ("name", "height", "width", "factor"),
    [
        ("a.mp4", 32, 32, 8),
        ("a.gif", 48, 80, 6),
        ("a.WEBP", 127, 127, 3),
        ("a.mp4", 128, 512, 1),
        ("a.mp4", 8, 1024, 2),
        ("a.mp4", 8, 4000, 1),
        ("a.png", 32, 32, 1),
        ("frames", 32, 32, 1),
    ],
)
def test_by_hand(name: str, height: int, width: int, factor: int) -> None:
    assert upscale_for(name, height, width) == upscale_for(name, width, height) == factor


@given(st.sampled_from(WATCHED), st.integers(1, 5000), st.integers(1, 5000))
def test_the_factor_is_the_smallest_that_makes_it_visible(suffix: str, height: int, width: int) -> None:
    factor, short, long = upscale_for(f"a{suffix}", height, width), min(height, width), max(height, width)
    if short >= SMALL or 2 * long > LARGEST:
        assert factor == 1
    else:
        assert long * factor <= LARGEST
        assert short * factor >= VISIBLE or long * (factor + 1) > LARGEST
        assert short * (factor - 1) < VISIBLE


@given(st.sampled_from(["a.mp4", "a.png", "a"]), st.integers(1, 20))
def test_what_is_asked_for_is_taken(name: str, asked: int) -> None:
    assert upscale_for(name, 8, 8, asked) == asked
