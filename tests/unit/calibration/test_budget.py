import pytest
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.calibration.budget import estimated_errors, fit, keep_high, multiply_adds, with_high
from stiv_deploy.calibration.layers import block_layers, model_layers
from stiv_deploy.calibration.observers import BANDS
from stiv_deploy.calibration.plan import PrecisionPlan, checked_plan, default_plan
from stiv_deploy.stiv_ref.config import CONFIGS

CONFIG = CONFIGS["tiny"].model_copy(update={"blocks": 1})
PLAN = default_plan(CONFIG, "int8")
NAMES = [name for name in PLAN.layers if PLAN.quantized(name)]


def errors(*values: float) -> dict[str, tuple[float, ...]]:
    """The same errors in every band for layers a, b, ..."""
    return {name: (value,) * BANDS for name, value in zip("abcdef", values, strict=False)}


def test_errors_add_up_as_squares_band_by_band() -> None:
    velocity = {"a": (3.0, 0, 0, 0, 1), "b": (4.0, 0, 0, 2, 0)}
    assert estimated_errors(velocity, ["a", "b"]) == (5, 0, 0, 2, 1)
    assert estimated_errors(velocity, ["a"]) == (3, 0, 0, 0, 1)
    assert estimated_errors(velocity, []) == (0,) * BANDS


def test_nothing_is_kept_high_within_the_target() -> None:
    assert keep_high(errors(3, 4), {"a": 1, "b": 1}, 5.0) == []
    assert keep_high(errors(3, 4), {"a": 1, "b": 1}, 4.9) == ["b"]


def test_a_cheap_layer_goes_before_a_dear_one_of_equal_error() -> None:
    assert keep_high(errors(3, 3), {"a": 4, "b": 1}, 4.0) == ["b"]


def test_the_worst_band_decides() -> None:
    velocity = {"a": (9.0, 0, 0, 0, 0), "b": (0, 0, 0, 0, 10.0), "c": (8.0, 0, 0, 0, 0)}
    assert keep_high(velocity, dict.fromkeys("abc", 1), 9.5) == ["a", "b"]


@given(st.lists(st.lists(st.floats(0, 1), min_size=BANDS, max_size=BANDS), min_size=1, max_size=8), st.floats(0, 2))
def test_the_rest_is_within_the_target(values: list[list[float]], target: float) -> None:
    velocity = {str(index): tuple(each) for index, each in enumerate(values)}
    high = keep_high(velocity, dict.fromkeys(velocity, 1), target)
    rest = velocity.keys() - set(high)
    assert not rest or max(estimated_errors(velocity, rest)) <= target
    assert len(set(high)) == len(high)


def test_multiply_adds_are_the_weights_sizes() -> None:
    found = {layer.name.partition(".")[2]: multiply_adds(CONFIG, layer) for layer in block_layers(CONFIG, 0)}
    width = CONFIG.width**2
    assert found["spatial.qkv"] == found["temporal.qkv"] == 3 * width
    assert found["cross.q"] == found["spatial.out"] == width
    assert found["ffn.up"] == found["ffn.down"] == 4 * width
    assert found["spatial.attention"] == 2 * 16 * CONFIG.width


def test_a_fitted_plan_fits_model_and_budget() -> None:
    velocity = {name: (0.01 * (index + 1),) * BANDS for index, name in enumerate(NAMES)}

    def measure(plan: PrecisionPlan) -> tuple[float, ...]:
        """Twice what the estimate says: the sweep was too hopeful."""
        return tuple(2 * each for each in estimated_errors(velocity, [name for name in NAMES if plan.quantized(name)]))

    fitted = fit(CONFIG, velocity, PLAN, 0.1, measure)
    assert max(fitted.measured) <= 0.1
    assert max(fitted.estimated) == pytest.approx(max(fitted.measured) / 2)
    assert 0 < len(fitted.high) < len(NAMES)
    assert {name for name in NAMES if not fitted.plan.quantized(name)} == set(fitted.high)
    assert checked_plan(fitted.plan, CONFIG, "int8", "test") == fitted.plan
    assert all(fitted.plan.layers[layer.name] == "high" for layer in model_layers(CONFIG) if layer.group == "edge")


def test_an_impossible_budget_keeps_everything_high() -> None:
    velocity = dict.fromkeys(NAMES, (0.1,) * BANDS)
    fitted = fit(CONFIG, velocity, PLAN, 1e-6, lambda plan: (1e-3,) * BANDS)
    assert set(fitted.high) == set(NAMES)


def test_keeping_high_touches_nothing_else() -> None:
    changed = with_high(PLAN, [NAMES[0]])
    assert changed.layers == {**PLAN.layers, NAMES[0]: "high"}
    assert PLAN.quantized(NAMES[0])
