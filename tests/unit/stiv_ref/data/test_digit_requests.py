"""What is asked of models of moving digits, and the real clips that answer it."""

from collections import Counter

import pytest
import torch

from stiv_deploy.stiv_ref.data.digit_requests import balanced_requests, real_clips


@pytest.mark.parametrize("count", [40, 80])
def test_requests_are_balanced(count: int) -> None:
    requests = balanced_requests(count, moving=True)
    pairs = Counter(zip(requests.digits, requests.directions, strict=True))
    assert len(pairs) == 40
    assert set(pairs.values()) == {count // 40}
    assert len(balanced_requests(100, moving=True).prompts) == 100
    assert set(Counter(balanced_requests(100, moving=True).digits).values()) == {10}


def test_requests_for_stills() -> None:
    requests = balanced_requests(2, moving=False)
    assert requests.prompts == ["digit zero", "digit one"]
    assert requests.directions == [None, None]


def test_real_clips_match_their_requests() -> None:
    requests = balanced_requests(12, moving=True)
    clips = real_clips(requests, 3)
    assert clips.shape == (12, 3, 3, 32, 32)
    steps = {"left": (0, -2), "right": (0, 2), "up": (-2, 0), "down": (2, 0)}
    for clip, direction in zip(clips, requests.directions, strict=True):
        assert torch.equal(clip[1], clip[0].roll(steps[str(direction)], (-2, -1)))
    assert torch.equal(clips, real_clips(requests, 3))
    assert not torch.equal(clips, real_clips(requests, 3, seed=1))
    assert real_clips(requests, 3, size=64).shape == (12, 3, 3, 64, 64)
