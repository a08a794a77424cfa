"""Students: one row a step, whose condition is the clip's own scale; what they were not trained for is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_clips import finish, make_engine, reference_latents, run, sample_of, settings_of, tolerance
from toys import Toy, make_bundle

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.guidance import GuidanceMode
from stiv_deploy.runtime.sampling.settings import SamplingSettings, Solver
from stiv_deploy.runtime.sampling.student import one_row

STUDENT = Student(guidance=(2.0, 6.0))
FLOW_MAP = Student(guidance=(2.0, 6.0), flow_map=True)
TOY = Toy(student=STUDENT)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(make_bundle(tmp_path_factory.mktemp("student") / "bundle", TOY))


def chosen(scale: float, **changes: Any) -> SamplingSettings:
    return one_row(settings_of("jit", guidance_scale=scale, **changes), STUDENT)


@pytest.mark.parametrize("solver", list(Solver))
def test_a_clip_is_the_references(bundle: Bundle, solver: Solver) -> None:
    sample = sample_of(chosen(5.0, solver=solver, time_shift=2.0), [0])
    np.testing.assert_allclose(
        run(make_engine(bundle), sample), reference_latents(bundle, TOY, sample), rtol=0, atol=tolerance(5)
    )


def test_clips_side_by_side_have_their_own_scales(bundle: Bundle) -> None:
    """Also once the first has ended and the second has come into its row."""
    engine = make_engine(bundle, slots=2, rungs=(1, 2))
    samples = [sample_of(chosen(2.0, steps=2)), sample_of(chosen(6.0), seed=3)]
    slots = [engine.admit(each) for each in samples]
    assert engine.used_rows == 2
    made = finish(engine)
    for slot, sample in zip(slots, samples, strict=True):
        np.testing.assert_allclose(made[slot], reference_latents(bundle, TOY, sample), rtol=0, atol=tolerance(5))
    other = sample_of(dataclasses.replace(samples[1].settings, guidance_scale=2.0), seed=3)
    assert not np.allclose(made[slots[1]], run(engine, other), atol=0.1)


def test_a_flow_map_is_told_where_each_step_ends(tmp_path: Path) -> None:
    toy = Toy(student=FLOW_MAP)
    bundle = Bundle.open(make_bundle(tmp_path / "bundle", toy))
    for steps in (1, 4):
        sample = sample_of(one_row(settings_of("jit", steps=steps, time_shift=3.0), FLOW_MAP), [0])
        wanted = reference_latents(bundle, toy, sample)
        np.testing.assert_allclose(run(make_engine(bundle), sample), wanted, rtol=0, atol=tolerance(5))


@pytest.mark.parametrize("solver", [Solver.HEUN, Solver.AB2])
def test_a_flow_map_has_no_other_solver(solver: Solver) -> None:
    with pytest.raises(RequestError, match=f"solver {solver}: a flow map goes from time to time by itself"):
        one_row(settings_of("jit", solver=solver), FLOW_MAP)


def test_guidance_becomes_one_row() -> None:
    settings = settings_of("jit", guidance_scale=3.0)
    assert one_row(settings, None) == settings
    assert one_row(settings, STUDENT) == dataclasses.replace(settings, guidance_mode=GuidanceMode.NONE)
    assert one_row(one_row(settings, STUDENT), STUDENT) == one_row(settings, STUDENT)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_mode": GuidanceMode.SIT}, "guidance_mode sit"),
        ({"guidance_scale": 1.9}, "guidance_scale 1.9: this student was trained for 2 to 6"),
        ({"guidance_from": 0.1}, "at all times"),
        ({"guidance_until": 0.9}, "at all times"),
        ({"renorm": False}, "guidance_renorm"),
    ],
)
def test_what_it_was_not_trained_for_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said) as caught:
        one_row(settings_of("jit", **changes), STUDENT)
    assert "\n" not in str(caught.value)


def test_one_scale_is_said_as_one() -> None:
    with pytest.raises(RequestError, match=r"guidance_scale 3: this student was trained for 4; give that"):
        one_row(settings_of("jit"), Student(guidance=(4.0, 4.0)))
    with pytest.raises(ValueError, match="from the least scale to the greatest"):
        Student(guidance=(4.0, 2.0))
