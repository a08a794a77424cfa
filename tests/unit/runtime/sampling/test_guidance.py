import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import BRANCHES, GuidanceMode, branch_weights, guidance_rows
from stiv_deploy.stiv_ref import guidance as reference

scales = st.floats(-20, 20, width=32)


@given(text=scales, image=scales, seed=st.integers(0, 1000))
def test_weighted_sum_is_the_reference_rule(text: float, image: float, seed: int) -> None:
    v = np.random.default_rng(seed).standard_normal((3, 16)).astype(np.float32)
    a, b, c = torch.from_numpy(v).double()
    rules = {
        GuidanceMode.NONE: ([0], a),
        GuidanceMode.JIT: ([0, 2], reference.jit_cfg(a, c, text)),
        GuidanceMode.SIT: ([0, 1, 2], reference.sit_cfg(a, b, c, text, image)),
    }
    for mode, (used, wanted) in rules.items():
        weights = branch_weights(mode, text, image)
        guided = weights.astype(np.float64) @ v[used]
        # Each weight is rounded to fp32 once; its error weighs at most |w| * |v|.
        bound = np.finfo(np.float32).eps * (np.abs(weights).astype(np.float64) @ np.abs(v[used])).max() + 1e-12
        np.testing.assert_allclose(guided, wanted.numpy(), rtol=0, atol=bound)


@given(text=scales, image=scales)
def test_weights_sum_to_one(text: float, image: float) -> None:
    for mode in GuidanceMode:
        weights = branch_weights(mode, text, image)
        assert len(weights) == len(BRANCHES[mode])
        assert weights.dtype == np.float32
        # The sum is exact but for the rounding of each weight.
        assert abs(weights.sum(dtype=np.float64) - 1) <= np.finfo(np.float32).eps * np.abs(weights).sum()


@given(text=st.sampled_from([0.0, 1.0, 2.5, 7.5]), image=st.sampled_from([0.0, 1.0, 1.5, 7.5]))
def test_rows_are_the_branches_of_some_weight(text: float, image: float) -> None:
    for mode in GuidanceMode:
        weights = branch_weights(mode, text, image)
        rows = guidance_rows(mode, weights)
        assert rows[0].branch == BRANCHES[mode][0]
        left_out = [branch for branch in BRANCHES[mode] if branch not in [row.branch for row in rows]]
        assert all(weights[BRANCHES[mode].index(branch)] == 0 for branch in left_out)
        assert all(row.weight == weights[BRANCHES[mode].index(row.branch)] for row in rows)
        assert all(row.weight != 0 for row in rows[1:])


def test_branches_run_from_most_to_least_conditioned() -> None:
    assert [(b.text, b.image) for b in BRANCHES[GuidanceMode.SIT]] == [(True, True), (False, True), (False, False)]
    assert [(b.text, b.image) for b in BRANCHES[GuidanceMode.JIT]] == [(True, True), (False, False)]
    assert [(b.text, b.image) for b in BRANCHES[GuidanceMode.NONE]] == [(True, True)]


def test_names_are_those_of_the_reference() -> None:
    assert [str(mode) for mode in GuidanceMode] == [str(mode) for mode in reference.GuidanceMode]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_must_be_finite(bad: float) -> None:
    with pytest.raises(RequestError, match="^guidance_scale must be finite"):
        branch_weights(GuidanceMode.JIT, bad, 1.0)
    with pytest.raises(RequestError, match="^image_guidance_scale must be finite"):
        branch_weights(GuidanceMode.SIT, 1.0, bad)
