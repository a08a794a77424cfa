"""How far a correct backend of 8 or 4 bits may be from the truth: measured from several correct ones, not assumed.

Rounding to 8 bits is not continuous. Two right implementations differ by about the unit roundoff u of the 16-bit type
in every value; a value that close to the middle of two codes gets the other code, and is then off by a whole step
instead of u. With P the share of such values the implementations differ by sqrt(12 P) of the quantization error e
(a step is sqrt(12) times its rms error): P of 1 % makes 0.35 e. Measured on the small model (float16, two PyTorch
implementations, one of them in float32): 0.25 to 0.5 e after a block, 0.4 to 0.95 e after a step, e after a free run.

But a code that flips turns an error of half a step up into half a step down, so that the *size* of e barely changes:
its spread is the distance divided by the root of the number of independent errors that it sums. Measured, standard
deviation over implementations: 0.5 to 1.5 % of e after a block, 1 to 8 % in one step, 0.4 to 0.8 % over 10 steps, 12 to
22 % after a free run, whose error has few directions (where the digit is).

So every gate takes :data:`DRAWS` right implementations, in the same run and on the same inputs: the fake-quantized
reference in the bundle's precision, and in float32 on the same grid, its inputs wiggled by :data:`WIGGLE`. With m and s
the mean and standard deviation of their errors the gate is ``1.1 m + 5.08 s + u``: 1.1 is the project's promise, 5.08 s
what an implementation that loses nothing more exceeds once in a thousand (Student's t, 7 degrees of freedom, times
sqrt(1 + 1 / 8): prediction interval of one more draw), u what is rounded outside the quantizers. The same rule gates
the distance to the first draw itself, with the distances of the other draws to it.
"""

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from stiv_deploy.calibration.layers import LARGEST
from stiv_deploy.calibration.plan import PrecisionPlan
from stiv_deploy.calibration.quantize import fake_quantized
from stiv_deploy.calibration.scales import Scales, scale_of
from stiv_deploy.stiv_ref.model import Stiv

UNIT_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
WIGGLE = UNIT_ROUNDING | {"float32": 2.0**-18}
"""Relative changes of inputs that stand for another implementation's rounding. In 16 bits that of the values outweighs
that of float32 sums; in float32 it is the sums, in another order: sqrt(n) u, 64 u for the 4608 terms of a wide FFN."""
QUANTIZED_FACTOR = 1.1
DRAWS = 8
SPREADS = 4.785 * math.sqrt(1 + 1 / DRAWS)
"""Standard deviations of :data:`DRAWS` draws above their mean that one more draw exceeds with probability 0.001."""
EXACT = ("timestep", "guidance", "target_time", "micro", "text_mask")
"""Graph inputs that are not wiggled: u in a time turns the angles of its embedding by u * 1000."""


def rel_l2(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error in fp64; NaN anywhere gives NaN, which no gate passes."""
    got, truth = got.double(), truth.double()
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


def quantized_gate(precision: str, errors: Sequence[float]) -> float:
    """The largest relative L2 error that passes, from ``errors`` of right implementations; see the module's text."""
    spread = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return QUANTIZED_FACTOR * statistics.fmean(errors) + SPREADS * spread + UNIT_ROUNDING[precision]


def on_grid(scales: Scales, dtype: torch.dtype) -> Scales:
    """``scales`` whose ranges are those that scales rounded to ``dtype`` span, for a model of a wider type.

    Those of NVFP4 are float32 for every type, and stay.
    """
    if scales.quantization == "nvfp4":
        return scales
    largest = LARGEST[scales.quantization]

    def rounded(name: str, value: Tensor) -> Tensor:
        if name.endswith(".smooth"):
            return value
        return (scale_of(value, scales.quantization, dtype).double() * largest).float()

    return replace(scales, amax={name: rounded(name, value) for name, value in scales.amax.items()})


def fake_quantized_wide(model: Stiv, dtype: torch.dtype, scales: Scales, plan: PrecisionPlan) -> Stiv:
    """A copy of ``model`` with the weights and the 8-bit grid of one in ``dtype``, that computes in float32."""
    return fake_quantized(copy.deepcopy(model).to(dtype).float(), on_grid(scales, dtype), plan)
