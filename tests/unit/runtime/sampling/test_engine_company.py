"""One clip and many in the engine: who runs beside a clip must not be seen in it."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_clips import (
    FRAMES,
    LATENTS,
    MODES,
    make_engine,
    reference_latents,
    run,
    sample_of,
    settings_of,
    tokens,
    tolerance,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS
from stiv_deploy.runtime.sampling.engine import StepEngine
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import Solver

WORDS = [np.array([a, b, 2, 0, 0]) for a in (3, 4, 5) for b in (6, 7)]


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    """Any clip; no two drawn seeds share their noise."""
    chosen = settings_of(
        draw(st.sampled_from(list(MODES))),
        steps=draw(st.integers(1, 5)),
        solver=draw(st.sampled_from(list(Solver))),
        guidance_scale=draw(st.sampled_from([0.0, 1.0, 3.0, 4.5])),
        image_scale=draw(st.sampled_from([1.0, 1.5])),
        renorm=draw(st.booleans()),
        time_shift=draw(st.sampled_from([1.0, 2.0, 3.5])),
        guidance_from=draw(st.sampled_from([0.0, 0.0, 0.2, 0.5])),
        guidance_until=draw(st.sampled_from([1.0, 1.0, 0.5, 0.7])),
    )
    frames = draw(st.sets(st.integers(0, FRAMES - 1)))
    text, negative = (tokens(draw(st.sampled_from(WORDS))) for _ in range(2))
    return sample_of(chosen, sorted(frames), draw(st.integers(0, 999)), text=text, negative=negative)


arrivals = st.lists(st.tuples(st.integers(0, 6), samples()), min_size=1, max_size=6)
SLOTS = 3


def scheduled(engine: StepEngine, arriving: list[tuple[int, Sample]]) -> Iterator[tuple[Sample, np.ndarray]]:
    """Run all, each as soon after its tick as it fits; clips with their latents as they finish."""
    waiting, running, now = sorted(arriving, key=lambda each: each[0]), {}, 0
    while waiting or engine.running:
        while waiting and waiting[0][0] <= now and engine.fits(waiting[0][1]):
            sample = waiting.pop(0)[1]
            running[engine.admit(sample)] = sample
        if engine.running:
            tick = engine.tick()
            assert not tick.failed
            yield from ((running.pop(slot), latents) for slot, latents in tick.finished.items())
        now += 1


@pytest.fixture(scope="module")
def shared(bundle_path: Path) -> tuple[Bundle, dict[str, StepEngine]]:
    """Engines that are made once: one rung, a ladder of rungs, and one clip alone at the first one's rung."""
    bundle = Bundle.open(bundle_path)
    backend = OnnxRuntimeBackend(bundle, threads=1)
    top = SLOTS * SAMPLE_ROWS
    ladder = {"one": (top,), "ladder": (1, 2, 4, top), "alone": (top,)}
    return bundle, {name: make_engine(bundle, SLOTS, rungs, backend=backend) for name, rungs in ladder.items()}


def check_schedule(shared: tuple[Bundle, dict[str, StepEngine]], toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    """A clip is bit-equal alone and among others at the same rung, and near the reference's whatever the rung."""
    bundle, engines = shared
    alone = {id(sample): run(engines["alone"], sample) for _, sample in arriving}
    for sample, latents in scheduled(engines["one"], arriving):
        np.testing.assert_array_equal(latents, alone[id(sample)])
        np.testing.assert_array_equal(latents[sample.frame_mask], sample.clean[sample.frame_mask])
    for sample, latents in scheduled(engines["ladder"], arriving):
        wanted = reference_latents(bundle, toy, sample)
        # 4.5 instead of 3 is the largest weight here, and shift or renormalization do not enlarge a velocity.
        np.testing.assert_allclose(latents, wanted, rtol=0, atol=1.5 * tolerance(5))


quick = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
thorough = settings(quick, max_examples=200)


@quick
@given(arriving=arrivals)
def test_company_is_not_seen(shared: Any, toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    check_schedule(shared, toy, arriving)


@pytest.mark.slow
@thorough
@given(arriving=arrivals)
def test_company_is_not_seen_in_many_schedules(shared: Any, toy: Any, arriving: list[tuple[int, Sample]]) -> None:
    check_schedule(shared, toy, arriving)


def test_a_clip_that_leaves_or_fails_is_not_seen_in_the_others(toy_bundle: Bundle) -> None:
    kept, other = sample_of(settings_of("jit"), seed=5), sample_of(settings_of("sit"), [0], seed=7)
    bad = dataclasses.replace(other, noise=np.full(LATENTS, np.nan, dtype=np.float32))
    wanted = run(make_engine(toy_bundle, slots=3), kept)
    engine = make_engine(toy_bundle, slots=3)
    failing, leaving, staying = engine.admit(bad), engine.admit(other), engine.admit(kept)
    first = engine.tick()
    engine.evict(leaving)
    ticks = [first]
    while engine.running:
        ticks.append(engine.tick())
    assert list(ticks[-1].failed) == [failing]
    np.testing.assert_array_equal(ticks[-1].finished[staying], wanted)
