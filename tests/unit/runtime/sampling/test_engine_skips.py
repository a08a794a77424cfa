"""Steps of the engine that skip the blocks, beside others and by themselves."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_clips import finish, make_engine, reference_latents, run, sample_of, settings_of, tolerance

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.solvers import evaluations

SKIPPED = (2, 4, 5, 7)
"""One alone, two in a row (along one line), and the last but one of nine steps."""


@pytest.fixture(scope="module")
def toy_and_bundle(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    from toys import Toy, make_bundle

    toy = Toy(slope=0.8, skips=True)
    return toy, Bundle.open(make_bundle(tmp_path_factory.mktemp("skips") / "bundle", toy))


@pytest.fixture
def skipper(toy_and_bundle: tuple[Any, Bundle]) -> Any:
    return toy_and_bundle[0]


@pytest.fixture
def bundle(toy_and_bundle: tuple[Any, Bundle]) -> Bundle:
    return toy_and_bundle[1]


def skipping(mode: str = "jit", **changes: Any) -> SamplingSettings:
    plain = {"solver": Solver.AB2, "steps": 9, "time_shift": 2.0, "skipped_steps": SKIPPED}
    return settings_of(mode, **(plain | changes))


class Calls:
    """Names of the graphs that an engine runs."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, name: str, call: Any) -> Any:
        def run() -> None:
            self.made.append(name)
            call()

        return run


def whole(bundle: Bundle, settings: SamplingSettings, **options: Any) -> np.ndarray:
    return run(make_engine(bundle, **options), sample_of(settings, [0]))


@pytest.mark.parametrize("mode", ["none", "jit", "sit"])
@pytest.mark.parametrize("solver", [Solver.EULER, Solver.AB2])
def test_the_loop_is_the_references(skipper: Any, bundle: Bundle, mode: str, solver: Solver) -> None:
    """The line through the last two residuals has weights of 4 and -3 at most here: errors grow seven times at most."""
    chosen = skipping(mode, solver=solver, steps=5, time_shift=1.0, skipped_steps=(2, 3, 4))
    latents, allowed = run(make_engine(bundle), sample_of(chosen, [0])), 7 * tolerance(5)
    wanted = reference_latents(bundle, skipper, sample_of(chosen, [0]))
    np.testing.assert_array_equal(latents[0], sample_of(chosen, [0]).clean[0])
    np.testing.assert_allclose(latents, wanted, rtol=0, atol=allowed)
    without = run(make_engine(bundle), sample_of(dataclasses.replace(chosen, skipped_steps=()), [0]))
    assert np.abs(latents - without).max() > 5 * allowed


def test_a_skipped_step_runs_no_block(bundle: Bundle) -> None:
    calls = Calls()
    engine = make_engine(bundle, hook=calls)
    engine.admit(sample_of(skipping()))
    blocks = [engine.tick().blocks for _ in range(9)]
    assert blocks == [step not in SKIPPED for step in range(9)]
    assert calls.made.count("block_00") == 5
    assert calls.made.count("extrapolate") == 8  # not in the last step, after which none is skipped
    assert calls.made.count("residual") == 4
    assert calls.made.count("head") == 9


def test_no_block_is_bound_for_calls_without_any(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each binding of an engine takes a context, which TensorRT-RTX compiles kernels for."""
    bound: list[str] = []
    bind = OnnxRuntimeBackend.bind
    monkeypatch.setattr(
        OnnxRuntimeBackend, "bind", lambda own, name, *each: (bound.append(name), bind(own, name, *each))[1]
    )
    engine = make_engine(bundle)
    assert (bound.count("head"), bound.count("block_00")) == (1, 1)  # none for skips that nobody wants
    run(engine, sample_of(skipping()))
    assert (bound.count("head"), bound.count("block_00")) == (3, 2)


def test_clips_that_skip_nothing_run_as_ever(bundle: Bundle) -> None:
    calls = Calls()
    run(make_engine(bundle, hook=calls), sample_of(settings_of()))
    assert not {"residual", "extrapolate"} & {*calls.made}


@pytest.mark.parametrize("late", [0, 1, 3])
def test_a_clip_is_the_same_beside_others(bundle: Bundle, late: int) -> None:
    """Beside one that skips nothing, and one that skips other steps and leaves before it: rows move into its places."""
    own, plain = skipping(), settings_of("sit", steps=6)
    other = skipping(steps=5, skipped_steps=(2, 4))
    alone = [run(make_engine(bundle, slots=3), sample_of(each, [0], seed=5)) for each in (own, plain, other)]
    engine = make_engine(bundle, slots=3)
    slots = [engine.admit(sample_of(each, [0], seed=5)) for each in (other, plain)]
    made: dict[int, np.ndarray] = {}
    for _ in range(late):
        made |= engine.tick().finished
    slots.insert(0, engine.admit(sample_of(own, [0], seed=5)))
    made |= finish(engine)
    for slot, wanted in zip(slots, (alone[0], alone[2], alone[1]), strict=True):
        np.testing.assert_array_equal(made[slot], wanted)


@pytest.mark.parametrize("ticks", range(1, 9))
def test_a_clip_goes_on_from_a_pause_bit_by_bit(bundle: Bundle, ticks: int) -> None:
    sample, engine = sample_of(skipping("sit"), [0]), make_engine(bundle)
    slot = engine.admit(sample)
    for _ in range(ticks):
        engine.tick()
    pause = engine.pause(slot)
    assert (pause.residuals is None) == (ticks == 8)  # behind the last that is skipped nothing is looked at
    second = make_engine(bundle, slots=2)
    second.admit(sample_of(skipping(), seed=7))
    wanted, slot = whole(bundle, skipping("sit")), second.admit(sample, pause)
    np.testing.assert_array_equal(finish(second)[slot], wanted)
    np.testing.assert_array_equal(finish(engine)[0], wanted)


def test_residuals_are_not_kept_where_two_more_are_to_come(bundle: Bundle) -> None:
    engine = make_engine(bundle)
    slot = engine.admit(sample_of(skipping(steps=9, skipped_steps=(6,))))
    kept = []
    for _ in range(8):
        engine.tick()
        kept.append(engine.pause(slot).residuals is not None)
    assert kept == [False] * 4 + [True, True, False, False]


def test_a_changed_clip_goes_on_by_the_residuals_that_it_has(skipper: Any, bundle: Bundle) -> None:
    """From its own latents as if nobody had asked."""
    engine = make_engine(bundle)
    slot = engine.admit(sample_of(skipping(), [0]))
    for _ in range(4):
        engine.tick()
        engine.change(slot, engine.read()[slot])
    np.testing.assert_array_equal(finish(engine)[slot], whole(bundle, skipping()))


def test_with_guidance_that_ends_early(skipper: Any, bundle: Bundle) -> None:
    """Rows leave, and others move into their places with their residuals."""
    chosen = skipping(guidance_until=0.5, skipped_steps=(3, 8), steps=10, time_shift=1.0)
    sample = sample_of(chosen, [0])
    wanted = reference_latents(bundle, skipper, sample)
    engine = make_engine(bundle, slots=2)
    engine.admit(sample_of(settings_of("sit", steps=4), seed=3))
    slot = engine.admit(sample)
    np.testing.assert_allclose(finish(engine)[slot], wanted, rtol=0, atol=4 * tolerance(10))


def test_an_interval_without_guidance_keeps_no_step_from_skipping(skipper: Any, bundle: Bundle) -> None:
    chosen = skipping("none", guidance_until=0.3, skipped_steps=(3, 4, 7), time_shift=1.0)
    assert chosen.times()[3] > 0.3 > chosen.times()[2]
    sample = sample_of(chosen, [0])
    wanted = reference_latents(bundle, skipper, sample)
    np.testing.assert_allclose(run(make_engine(bundle), sample), wanted, rtol=0, atol=4 * tolerance(9))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"solver": Solver.HEUN}, "one evaluation a step"),
        ({"skipped_steps": (4, 3)}, "ascending numbers from 0 to 8"),
        ({"skipped_steps": (3, 3)}, "ascending"),
        ({"skipped_steps": (9,)}, "another number of steps"),
        ({"skipped_steps": (1,)}, "step 1 cannot be skipped"),
        ({"skipped_steps": (2, 3), "guidance_until": 0.2, "time_shift": 1.0}, "step 2 cannot be skipped"),
    ],
)
def test_steps_that_cannot_be_skipped(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        skipping(**changes)


def test_ten_thousand_steps_are_planned_at_once() -> None:
    """Not in an hour, as by looks at all steps for each of them; and what is wrong with them is told in a line."""
    start = time.monotonic()
    many = skipping(steps=10_000, skipped_steps=tuple(range(2, 10_000)))
    assert sum(each.residuals is None for each in evaluations(many)) == 2
    assert time.monotonic() - start < 10
    with pytest.raises(RequestError) as caught:
        skipping(skipped_steps=tuple(range(10_000)))
    assert len(str(caught.value)) < 300


def test_the_references_settings_are_these(skipper: Any, bundle: Bundle) -> None:
    from stiv_deploy.stiv_ref.sampler import SamplingSettings as Reference

    assert {each.name for each in dataclasses.fields(Reference)} == {
        each.name for each in dataclasses.fields(SamplingSettings)
    }


def test_there_are_no_buffers_for_residuals_before_a_clip_skips(toy_bundle: Bundle, bundle: Bundle) -> None:
    engines: list[StepEngine] = [make_engine(each) for each in (toy_bundle, bundle)]
    assert [each.denoiser.skips for each in engines] == [False, True]
    for each in engines:
        run(each, sample_of(settings_of()))
        assert "residuals" not in vars(each.denoiser)
    run(engines[1], sample_of(skipping()))
    assert "residuals" in vars(engines[1].denoiser)


def test_the_graphs_are_no_part_of_a_bundles_hash(skipper: Any, bundle: Bundle, tmp_path: Path) -> None:
    from toys import make_bundle

    plain = Bundle.open(make_bundle(tmp_path / "bundle", dataclasses.replace(skipper, skips=False)))
    assert plain.hash == bundle.hash
    assert (plain.manifest.skips, bundle.manifest.skips) == (False, True)
