"""Plans of clips that skip blocks: what tuning found, named step by step, and what cannot be skipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import SKIPPED_TIMES, SKIPPED_WEIGHTS, Toy, make_bundle

from stiv_deploy.runtime import Bundle, GenerationRequest, RequestError, Solver, StivPipeline
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.bundle.tuned import TunedGrid
from stiv_deploy.runtime.pipeline.plan import PlannedVideo, plan_generation

TUNED = {"num_inference_steps": 6, "skip_blocks": True}


@pytest.fixture
def bundle(skipping_path: Path) -> Bundle:
    return Bundle.open(skipping_path)


def planned(bundle: Bundle, **values: Any) -> PlannedVideo:
    (video,) = plan_generation(bundle, GenerationRequest(prompt="digit", seed=1, **values)).videos
    return video


def test_all_that_was_tuned_together_is_taken(bundle: Bundle) -> None:
    used = planned(bundle, **TUNED).settings
    assert (used.solver, used.steps, used.skipped_steps) == (Solver.AB2, 6, (3, 5))
    assert (used.time_shift, used.late_stretch) == (SKIPPED_TIMES["time_shift"], SKIPPED_TIMES["late_stretch"])
    assert used.solver_weights == SKIPPED_WEIGHTS
    euler = planned(bundle, num_inference_steps=8, solver="euler", skip_blocks=True).settings
    assert (euler.solver, euler.skipped_steps, euler.time_shift, euler.solver_weights) == (Solver.EULER, (4, 6), 2, ())
    assert planned(bundle, num_inference_steps=8, skip_blocks=True).settings == euler


@pytest.mark.parametrize("skip", [None, False])
def test_nobody_skips_who_did_not_ask_for_it(bundle: Bundle, skip: bool | None) -> None:
    used = planned(bundle, num_inference_steps=6, skip_blocks=skip).settings
    assert (used.skipped_steps, used.time_shift, used.solver_weights) == ((), 3.0, ())
    assert bundle.manifest.recommended(6).skipped_steps is None
    assert bundle.manifest.recommended(8).skipped_steps is None
    found = bundle.manifest.skipping(6)
    assert found is not None
    assert found.frames == bundle.manifest.sampling.frames


@pytest.mark.parametrize(
    "values", [TUNED, {"num_inference_steps": 5, "skipped_steps": [2, 4], "solver": "euler"}, {"skipped_steps": []}]
)
def test_a_resolved_request_names_the_steps_and_plans_to_itself(bundle: Bundle, values: dict[str, Any]) -> None:
    video = planned(bundle, **values)
    assert video.request.skip_blocks is None
    assert video.request.skipped_steps == video.settings.skipped_steps
    written = video.request.to_json()
    assert "skip_blocks" not in written
    (again,) = plan_generation(bundle, GenerationRequest.from_json(written)).videos
    assert again.settings == video.settings
    assert again.request == video.request


def test_steps_named_one_by_one_are_skipped(bundle: Bundle) -> None:
    used = planned(bundle, num_inference_steps=5, solver="euler", time_shift=2, skipped_steps=[2, 4]).settings
    assert (used.skipped_steps, used.time_shift) == ((2, 4), 2)
    assert planned(bundle, num_inference_steps=6, skipped_steps=(2,)).settings.skipped_steps == (2,)


OWN = "skip_blocks comes with its own"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_inference_steps": 7}, "tuned to skip blocks in 6 steps of ab2, 8 steps of euler; ask for one of these"),
        ({}, "in 6 steps of ab2, 8 steps of euler; ask for one of these, name skipped_steps, or run 'stiv tune' on a"),
        ({**TUNED, "solver": "heun"}, "tuned to skip blocks in 6 steps of ab2"),
        ({**TUNED, "time_shift": 2}, f"{OWN} time_shift; leave out one or the other"),
        ({**TUNED, "late_stretch": 1}, f"{OWN} late_stretch; leave"),
        ({**TUNED, "skipped_steps": [3]}, f"{OWN} skipped_steps; leave"),
        ({**TUNED, "skipped_steps": []}, f"{OWN} skipped_steps; leave"),
        ({**TUNED, "solver_weights": []}, f"{OWN} solver_weights; leave"),
        ({**TUNED, "solver_weights": SKIPPED_WEIGHTS, "time_shift": 2}, f"{OWN} time_shift, solver_weights; leave"),
        ({**TUNED, "guidance_until": 0.3}, "cannot be skipped: it goes on along the last 2 steps that were not"),
        ({**TUNED, "skip_blocks": False, "skipped_steps": [1]}, "step 1 cannot be skipped"),
        ({**TUNED, "skip_blocks": None, "skipped_steps": [2, 6]}, "skipped_steps are ascending numbers from 0 to 5"),
        ({"skipped_steps": [2], "solver": "heun", "skip_blocks": None}, "solvers with one evaluation a step"),
    ],
)
def test_what_cannot_be_skipped_is_one_line(bundle: Bundle, values: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        planned(bundle, **{"skip_blocks": True} | values)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_the_graphs_says_how_to_have_them(toy_bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="skipped_steps: this bundle has no graphs for that; make .* --skips', or"):
        planned(toy_bundle, skipped_steps=[2])
    with pytest.raises(RequestError, match="tuned to skip blocks in none; ask for one of these, name skipped_steps"):
        planned(toy_bundle, skip_blocks=True)
    assert planned(toy_bundle, skipped_steps=[]).settings.skipped_steps == ()


def test_a_flow_map_skips_no_blocks(tmp_path: Path) -> None:
    toy = Toy(student=Student(guidance=(2.0, 6.0), flow_map=True), skips=True)
    with pytest.raises(RequestError, match="a flow map skips no blocks; leave skipped_steps out"):
        planned(Bundle.open(make_bundle(tmp_path / "map", toy)), solver="euler", skipped_steps=[2])


def test_a_pipeline_samples_as_planned(skipping_path: Path) -> None:
    """What skips differs from what does not, and the resolved request makes it again, bit by bit."""
    with StivPipeline.from_bundle(skipping_path, "onnxruntime", threads=1) as pipe:
        plan = pipe.plan(GenerationRequest(prompt="digit", seed=1, **TUNED))
        latents = pipe.sample(plan)
        written = plan.videos[0].request
        np.testing.assert_array_equal(pipe.sample(pipe.plan(written)), latents)
        whole = pipe.sample(pipe.plan(written.changed(skipped_steps=None)))
    assert np.abs(whole - latents).max() > 1e-4


def test_several_devices_share_no_clip_that_skips(tmp_path: Path) -> None:
    from mixing_toys import mixing_graphs

    path = make_bundle(tmp_path / "both", Toy(skips=True), mixing_graphs())
    request = GenerationRequest(prompt="digit", seed=1, num_inference_steps=4, solver="euler")
    with StivPipeline.from_bundle(path, "onnxruntime", devices=["cpu", "cpu"], threads=1) as pipe:
        with pytest.raises(RequestError, match="^skipped steps are for one device; leave them out, or give one device"):
            pipe.sample(pipe.plan(request.changed(skipped_steps=[2])))
        pipe.plan(request)


def test_named_steps_have_no_weights_or_times_that_were_tuned_without(bundle: Bundle) -> None:
    assert bundle.manifest.tuned is not None
    whole = TunedGrid(solver="ab2", steps=6, time_shift=0.25, solver_weights=SKIPPED_WEIGHTS, tried=0, error=0)
    tuned = bundle.manifest.tuned.model_copy(update={"grids": (whole,)})
    fitted, own = Bundle(bundle.folder, bundle.manifest.model_copy(update={"tuned": tuned})), bundle.manifest.sampling

    def used(**values: Any) -> tuple[Any, ...]:
        chosen = planned(fitted, num_inference_steps=6, **values).settings
        return chosen.time_shift, chosen.solver_weights

    assert used() == used(skipped_steps=[]) == (0.25, SKIPPED_WEIGHTS)
    assert used(skipped_steps=[2, 4]) == (own.time_shift, ())
    assert used(skipped_steps=[2, 4], solver="ab2", solver_weights=SKIPPED_WEIGHTS)[1] == SKIPPED_WEIGHTS


def test_an_interval_that_ends_no_row_keeps_no_step_from_skipping(bundle: Bundle) -> None:
    times = planned(bundle, **TUNED).settings.times()
    until = float(times[3]) - 1e-3
    assert planned(bundle, **TUNED, guidance_mode="none", guidance_until=until).settings.skipped_steps == (3, 5)
    with pytest.raises(
        RequestError, match="step 3 cannot be skipped.* or guidance_from, guidance_until or skip_blocks"
    ):
        planned(bundle, **TUNED, guidance_until=until)
