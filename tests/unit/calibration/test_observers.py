import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.calibration.observers import (
    BAND_EDGES,
    BANDS,
    BINS,
    REQUEST,
    Clock,
    Statistic,
    band_names,
    band_of,
    bin_counts,
    percentile,
    share_beyond,
    upper_edge,
)

floats = st.floats(-(2.0**90), 2.0**90, width=32)


def filled(values: torch.Tensor, row: int = 0) -> Statistic:
    statistic = Statistic(Clock(row), histogram=True)
    statistic(values)
    return statistic


def test_bands_cover_the_unit_interval_and_the_last_one_includes_its_end() -> None:
    assert [band_of(time) for time in BAND_EDGES] == [0, 1, 2, 3, 4, 4]
    assert band_of(0.0999) == 0
    assert band_of(0.9999) == 4
    assert band_names() == ("0-0.1", "0.1-0.25", "0.25-0.5", "0.5-0.75", "0.75-1", "request")


@given(st.lists(floats, min_size=6, max_size=24).filter(lambda found: len(found) % 3 == 0))
@settings(deadline=None)
def test_amax_is_the_largest_magnitude_by_row_and_channel(values: list[float]) -> None:
    array = np.array(values, np.float32).reshape(-1, 3)
    statistic = Statistic(Clock(), histogram=False)
    for row, part in enumerate(np.array_split(array, 2)):
        statistic.clock.row = row
        statistic(torch.from_numpy(part))
    for row, part in enumerate(np.array_split(array, 2)):
        np.testing.assert_array_equal(statistic.amax[row].numpy(), np.abs(part).max(axis=0))
    assert not statistic.amax[2:].any()
    np.testing.assert_array_equal(statistic.largest.numpy(), np.abs(array).max(axis=0))
    assert not statistic.counts.numel()


@given(st.lists(floats, min_size=4, max_size=40), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_order_and_batching_change_no_bit(values: list[float], random: object) -> None:
    whole = filled(torch.tensor(values)[:, None])
    random.shuffle(values)  # type: ignore[attr-defined]
    parts = Statistic(Clock(0), histogram=True)
    for part in torch.tensor(values)[:, None].split(3):
        parts(part)
    assert torch.equal(whole.amax, parts.amax)
    assert torch.equal(whole.counts, parts.counts)


def test_text_projections_are_counted_apart() -> None:
    assert Clock().row == REQUEST == BANDS
    statistic = filled(torch.ones(2, 3), REQUEST)
    assert statistic.amax[REQUEST].tolist() == [1, 1, 1]
    assert not statistic.amax[:REQUEST].any()


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_value_lies_in_its_bin(value: float) -> None:
    (index,) = bin_counts(torch.tensor([value])).nonzero().flatten().tolist()
    assert upper_edge(index - 1) <= value < upper_edge(index)
    assert upper_edge(index) <= upper_edge(index - 1) * (1 + 2**-6), "a bin is 1.6 % wide at most"


def test_zeros_and_the_largest_number_have_a_bin() -> None:
    counts = bin_counts(torch.tensor([0.0, torch.finfo(torch.float32).max]))
    assert counts[0] == 1
    assert counts[BINS - 1] == 1
    assert counts.sum() == 2


@pytest.mark.parametrize("percent", [50.0, 90.0, 99.0, 99.9])
def test_percentile_is_that_of_numpy_to_a_bin(percent: float) -> None:
    values = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    found = percentile(filled(values), percent)
    exact = np.percentile(values.abs().numpy(), percent, method="inverted_cdf")
    assert exact <= found <= exact * (1 + 2**-6)


def test_clipping_rate_is_the_share_of_values_beyond_the_range() -> None:
    values = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    statistic = filled(values)
    for percent in (90.0, 99.9, 100.0):
        limit = percentile(statistic, percent)
        share = share_beyond(statistic, limit)
        assert share == pytest.approx((values.abs() > limit).float().mean().item(), abs=1e-9)
        assert share <= 1 - percent / 100 + 1e-12
    assert percentile(statistic, 100.0) == statistic.amax.max().item()


def test_values_of_large_tensors_are_binned_in_parts() -> None:
    values = torch.randn(10_000, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(filled(values).counts, bin_counts(values.abs()))
