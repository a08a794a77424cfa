"""Which bucket a video goes to, and that resizing and cropping cut where they say they do."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.data.buckets import draw_crop, fit, micro_conditions, nearest_bucket, resized

sides = st.integers(8, 400)
sizes = st.tuples(sides, sides)


@given(sizes, st.lists(sizes, min_size=1, max_size=6))
def test_nearest_bucket_has_the_nearest_aspect_ratio(size: tuple[int, int], buckets: list[tuple[int, int]]) -> None:
    chosen = buckets[nearest_bucket(size, buckets)]

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[0] * size[1] / (bucket[1] * size[0])))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-8


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((300, 300), (256, 256)),
        ((64, 64), (64, 64)),
        ((40, 40), (64, 64)),
        ((600, 600), (512, 512)),
        ((90, 160), (72, 128)),
    ],
)
def test_of_one_aspect_ratio_the_largest_that_needs_no_enlarging(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    buckets = [(512, 512), (64, 64), (256, 256), (72, 128), (128, 72)]
    assert buckets[nearest_bucket(size, buckets)] == wanted


def test_wide_and_tall_are_equally_far() -> None:
    assert nearest_bucket((100, 200), [(100, 100), (100, 400)]) == nearest_bucket((200, 100), [(100, 100), (400, 100)])


@given(sizes, sizes, st.integers(0, 2**31))
def test_resized_covers_the_bucket_and_crops_stay_inside(
    size: tuple[int, int], bucket: tuple[int, int], seed: int
) -> None:
    found = resized(size, bucket)
    assert all(there >= wanted for there, wanted in zip(found, bucket, strict=True))
    assert found[0] == bucket[0] or found[1] == bucket[1]
    # Both sides are scaled alike, up to rounding to whole pixels.
    factor = max(bucket[0] / size[0], bucket[1] / size[1])
    assert all(abs(there - factor * side) <= 1 for there, side in zip(found, size, strict=True))
    top, left = draw_crop(size, bucket, torch.Generator().manual_seed(seed))
    assert 0 <= top <= found[0] - bucket[0]
    assert 0 <= left <= found[1] - bucket[1]


def test_every_crop_position_is_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    assert {draw_crop((8, 12), (8, 8), generator) for _ in range(100)} == {(0, left) for left in range(5)}


def test_fit_without_resizing_only_cuts() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    video = fit(frames, (8, 8), (0, 3))
    wanted = torch.from_numpy(frames[:, :, 3:11]).permute(0, 3, 1, 2).double() / 127.5 - 1
    assert video.dtype == torch.float32
    torch.testing.assert_close(video.double(), wanted, rtol=0, atol=2**-23)
    assert video.min() >= -1
    assert video.max() <= 1


def test_fit_keeps_what_is_where_when_it_shrinks() -> None:
    """Four flat quarters, shrunk to half and cropped by one pixel: their colours are still in their places."""
    frames = np.zeros((1, 32, 64, 3), np.uint8)
    frames[:, :16, :32, 0], frames[:, 16:, 32:, 1] = 255, 255
    video = fit(frames, (16, 16), (0, 8))  # resized to 16 x 32, cut from column 8: the edge is at 8
    assert video.shape == (1, 3, 16, 16)
    assert torch.equal(video[0, 0, :6, :6], torch.ones(6, 6))
    assert torch.equal(video[0, 1, 10:, 10:], torch.ones(6, 6))
    assert torch.equal(video[0, 2], -torch.ones(16, 16))
    assert torch.equal(video[0, 0, 10:, 10:], -torch.ones(6, 6))


def test_shrinking_averages_instead_of_picking() -> None:
    """A checkerboard of single pixels becomes grey: without antialiasing it would stay black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    frames = np.repeat(board[None, :, :, None], 3, axis=3).astype(np.uint8)
    assert fit(frames, (16, 16), (0, 0)).abs().max() < 0.1


def test_micro_conditions_have_the_order_of_the_model() -> None:
    micro = micro_conditions((720, 1280), (3, 40), 2, 8)
    assert micro.dtype == torch.float32
    assert micro.tolist() == [720, 1280, 3, 40, 2, 8]
