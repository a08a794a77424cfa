"""Is a VAE in 16 bits good enough? Its second form, emulated on the CPU, against the reference in float32."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from stiv_deploy.export.errors import CheckError
from stiv_deploy.export.graphs.check import HALF_FACTOR, relative_error
from stiv_deploy.export.graphs.draws import UNIT_ROUNDING
from stiv_deploy.export.graphs.emulation import emulated
from stiv_deploy.runtime.bundle.contract import Reduced
from stiv_deploy.stiv_ref.decibels import decibels

LEAST_PSNR = 50.0
"""Decibels of a decoded video against the float32 decode: an rms error of 0.8 of the 255 levels that leave the device,
and 7.7 times the power of the rounding to them."""


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Of videos in [-1, 1], all values of them together, in dB."""
    return float(decibels(np.square(np.asarray(video, np.float64) - np.asarray(truth, np.float64)).mean(), 2))


def reduced_session(path: Path, precision: Reduced) -> onnxruntime.InferenceSession:
    """A session that computes the graph in ``path``, a form in ``precision``, rounding as it says.

    Without optimizations, which would take the roundings out.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    model = emulated(path, precision).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def check_reduced(
    name: str, path: Path, precision: Reduced, reference: nn.Module, plain: nn.Module, inputs: Mapping[str, Tensor]
) -> None:
    """Hold the form in ``precision`` of the graph ``name``, in ``path``, against its float32 module ``reference``.

    Its relative L2 error may be that of ``plain``, the module in this type, times
    :data:`~stiv_deploy.export.graphs.check.HALF_FACTOR`, and one rounding; of a decoder the PSNR at least
    :data:`LEAST_PSNR`. Raises :class:`CheckError`.
    """
    feed = {key: value.numpy() for key, value in inputs.items()}
    (found,) = reduced_session(path, precision).run(None, feed)
    wanted, own = (_run(module, inputs) for module in (reference, plain))
    gate = HALF_FACTOR * relative_error(own, wanted) + UNIT_ROUNDING[precision]
    error, reached = relative_error(found, wanted), psnr(found, wanted)
    if not error <= gate:
        raise CheckError(
            f"graph {name}.{precision} differs from the reference: relative L2 error {error:.1e}, at most {gate:.1e} "
            "allowed; check the versions of torch and onnxruntime, or export with --vae-precision float32"
        )
    if name == "decoder" and not reached >= LEAST_PSNR:
        raise CheckError(
            f"the decoder in {precision} is {reached:.1f} dB from that in float32, at least {LEAST_PSNR:.0f} wanted; "
            "export with --vae-precision float32"
        )


@torch.no_grad()
def _run(module: nn.Module, inputs: Mapping[str, Tensor]) -> np.ndarray:
    dtype = next(module.parameters()).dtype
    result: Tensor = module(*(value.to(dtype) for value in inputs.values()))
    return result.float().numpy()
