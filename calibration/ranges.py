"""Ranges from statistics: what goes into the scale file, and how much of the values it clips."""

import torch
from torch import Tensor

from stiv_deploy.calibration.collect import CalibrationSettings, Statistics
from stiv_deploy.calibration.layers import Layer, model_layers
from stiv_deploy.calibration.observers import Statistic, percentile
from stiv_deploy.calibration.scales import tensor_names
from stiv_deploy.stiv_ref.model import Stiv


def activation_range(statistic: Statistic, settings: CalibrationSettings) -> Tensor:
    """The calibrated range [] of one operand: its largest magnitude, or a percentile of magnitudes."""
    if settings.calibrator == "percentile":
        return torch.tensor(percentile(statistic, settings.percentile))
    return statistic.amax.max()


def weight_range(weight: Tensor, per_channel: bool) -> Tensor:
    """Largest magnitude of ``weight`` [out, in], [] or by output channel [out].

    A channel of zeros has no range of its own; it gets the tensor's, zeros being exact in any.
    """
    magnitudes = weight.detach().float().abs()
    if not per_channel:
        return magnitudes.max()
    rows = magnitudes.amax(1)
    return torch.where(rows > 0, rows, rows.max())


def smoothing(activation: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's factors [in] (arXiv 2211.10438, eq. 4): max|x_j|^alpha / max|w_j|^(1 - alpha).

    ``activation`` [in] and the columns of ``weight`` [out, in] give the two maxima. A channel in which either is zero
    is left alone.
    """
    columns = weight.detach().float().abs().amax(0)
    factors = activation.pow(alpha) / columns.pow(1 - alpha)
    return torch.where((activation > 0) & (columns > 0), factors, torch.ones_like(factors))


def ranges_of(
    model: Stiv,
    statistics: Statistics,
    settings: CalibrationSettings,
    *,
    per_channel: bool,
    smooth: float | None = None,
) -> dict[str, Tensor]:
    """All ranges of the scale file by tensor name. ``smooth`` is SmoothQuant's alpha (with max calibration only)."""
    found: dict[str, Tensor] = {}
    for layer in model_layers(model.config):
        if layer.kind == "attention":
            names = tensor_names(layer)
            found |= {name: activation_range(statistics[name], settings) for name in names}
            continue
        weight, seen = _weight(model, layer), statistics[f"{layer.name}.input"]
        if smooth is None:
            found[f"{layer.name}.input"] = activation_range(seen, settings)
        else:
            factors = smoothing(seen.largest, weight, smooth)
            found[f"{layer.name}.smooth"], weight = factors, weight * factors
            found[f"{layer.name}.input"] = (seen.largest / factors).max()
        found[f"{layer.name}.weight"] = weight_range(weight, per_channel)
    return found


def _weight(model: Stiv, layer: Layer) -> Tensor:
    weight = model.get_submodule(layer.module).weight
    assert isinstance(weight, Tensor)
    return weight
