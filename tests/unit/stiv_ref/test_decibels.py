"""PSNR against values worked out by hand."""

import numpy as np

from stiv_deploy.stiv_ref.decibels import MOST, decibels


def test_decibels() -> None:
    """An error of a tenth of the span is 20 dB, of a hundredth 40; none at all is the most that is told."""
    found = decibels(np.array([[0.04, 0.0004], [0.0, np.nan]]), 2)
    np.testing.assert_allclose(found, [[20, 40], [MOST, np.nan]], rtol=1e-12)
    assert decibels(0.01, 1) == 20
