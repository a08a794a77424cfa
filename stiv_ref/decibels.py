"""Peak signal-to-noise ratios of pictures and clips."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST = 126.0
"""What is told of equal pictures, in dB: root mean square errors below 5e-7 of the span are float32's roundings."""


def decibels(error: ArrayLike, span: float) -> NDArray[np.float64]:
    """PSNR in dB, of the shape of ``error``: mean squared errors of values that lie within ``span`` of each other.

    At most :data:`MOST`; NaN stays.
    """
    with np.errstate(divide="ignore"):
        return np.minimum(10 * np.log10(span**2 / np.asarray(error, np.float64)), MOST)
