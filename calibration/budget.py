"""Mixed precision: which layers stay high so that the velocity's error keeps to a budget."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from stiv_deploy.calibration.layers import Layer, model_layers
from stiv_deploy.calibration.observers import BANDS
from stiv_deploy.calibration.plan import PrecisionPlan
from stiv_deploy.calibration.sensitivity import BandErrors
from stiv_deploy.stiv_ref.config import StivConfig

MARGIN = 0.95
"""What a missed target is lowered by beyond the ratio that it was missed by."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A plan within a budget, with its velocity errors by band as the sweep adds them up and as measured."""

    plan: PrecisionPlan
    high: tuple[str, ...]
    """Layers that the budget keeps high, first kept first."""
    estimated: BandErrors
    measured: BandErrors


def multiply_adds(config: StivConfig, layer: Layer) -> int:
    """Multiply-adds of a layer of a block for one token: what quantizing it makes cheaper.

    Attention is counted at the model's base grid.
    """
    if layer.kind == "attention":
        return 2 * math.prod(config.base_grid) * config.width
    ratio = {"spatial.qkv": 3, "temporal.qkv": 3, "ffn.up": config.mlp_ratio, "ffn.down": config.mlp_ratio}
    return ratio.get(layer.name.partition(".")[2], 1) * config.width**2


def estimated_errors(velocity: Mapping[str, BandErrors], quantized: Collection[str]) -> BandErrors:
    """Errors of all ``quantized`` groups together: rounding errors are independent, so their squares add up."""
    return tuple(math.sqrt(sum(velocity[name][band] ** 2 for name in quantized)) for band in range(BANDS))


def keep_high(velocity: Mapping[str, BandErrors], cost: Mapping[str, int], target: float) -> list[str]:
    """Layers to keep high, of those in ``cost``, until the estimated error of every band is at most ``target``.

    Greedy: in the worst band, the layer that removes most squared error for its multiply-adds.
    """
    quantized, high = dict(cost), []
    while quantized:
        errors = estimated_errors(velocity, quantized)
        worst = max(range(BANDS), key=lambda band: errors[band])
        if errors[worst] <= target:
            break
        best = max(quantized, key=lambda name: velocity[name][worst] ** 2 / quantized[name])
        high.append(best)
        del quantized[best]
    return high


def with_high(plan: PrecisionPlan, high: Collection[str]) -> PrecisionPlan:
    """``plan`` with the layers ``high`` kept in the high type."""
    layers = {name: "high" if name in high else choice for name, choice in plan.layers.items()}
    return plan.model_copy(update={"layers": layers})


def fit(
    config: StivConfig,
    velocity: Mapping[str, BandErrors],
    plan: PrecisionPlan,
    budget: float,
    measure: Callable[[PrecisionPlan], BandErrors],
) -> Fitted:
    """The plan that keeps as much of ``plan`` in 8 bits as ``budget`` allows, as ``measure`` confirms.

    The estimate is only that: where the plan's measured error misses the budget, the target is lowered and the choice
    made again. (With every layer high the error is zero, so this ends.)
    """
    cost = {layer.name: multiply_adds(config, layer) for layer in model_layers(config) if plan.quantized(layer.name)}
    target, previous = budget, None
    while True:
        high = keep_high(velocity, cost, target)
        if high != previous:
            chosen = with_high(plan, high)
            measured = measure(chosen)
            if max(measured) <= budget or len(high) == len(cost):
                estimated = estimated_errors(velocity, cost.keys() - set(high))
                return Fitted(plan=chosen, high=tuple(high), estimated=estimated, measured=measured)
        target *= MARGIN if high == previous else MARGIN * budget / max(measured)
        previous = high
