"""Sketches tell errors, and draws are those of the published generator."""

import numpy as np
import pytest

from stiv_deploy.runtime.bundle.sketch import (
    BUCKETS,
    bits,
    integers,
    normal,
    packed,
    seed_of,
    sketch,
    uniform,
    unpacked,
)


def test_bits_are_those_of_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert bits(0, 3, 0).tolist() == published
    assert bits(2, 1, 0).tolist() == published[2:]


def test_draws_have_their_moments() -> None:
    drawn, even, whole = normal((200, 500), 1), uniform((100_000,), 2), integers(7, (70_000,), 3)
    assert abs(drawn.mean()) < 0.02
    assert abs(drawn.std() - 1) < 0.02
    assert abs(even.mean() - 0.5) < 0.005
    assert 0 <= even.min() <= even.max() < 1
    assert np.bincount(whole).min() > 9_500
    assert len({seed_of("a", 1), seed_of("a", 2), seed_of("b", 1), seed_of("a/1")}) == 3


def test_the_sketch_of_a_difference_tells_its_norm() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((40, 300)).astype(np.float32)
    ratios = []
    for _ in range(40):
        error = random.standard_normal(values.shape) * 1e-4
        found = np.linalg.norm(sketch(values + error) - sketch(values))
        ratios.append(found / np.linalg.norm(error))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.std(ratios) == pytest.approx(1 / np.sqrt(2 * BUCKETS), rel=0.4)


def test_one_wrong_element_stands_in_full() -> None:
    values = np.zeros((3, 700_000), np.float32)
    other = values.copy()
    other[2, 650_000] = 0.25
    assert np.linalg.norm(sketch(other) - sketch(values)) == 0.25
    other[0, 0] = np.nan
    assert np.isnan(sketch(other)).any()


def test_sketches_are_text() -> None:
    sums = np.arange(BUCKETS) / 3
    assert np.array_equal(unpacked(packed(sums)), sums)
    with pytest.raises(ValueError, match="a sketch has 64 numbers"):
        unpacked(packed(sums[1:]))
