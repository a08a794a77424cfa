"""The stage of tuning on the toy bundle: what it tries, what it tells, and what it refuses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Toy, make_bundle

from stiv_deploy.runtime import GenerationRequest, RequestError, Solver, StivPipeline
from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.errors import BundleError
from stiv_deploy.runtime.pipeline import tuning
from stiv_deploy.runtime.pipeline.tuning import BUDGETS, TuneReport, TuneRequest, tune, tuned
from stiv_deploy.runtime.sampling.tuning import FITTED, STRETCHED, UNTIL, Grid, Point, Skip, relative_errors

CLIPS = (
    GenerationRequest(prompt="digit three", seed=3, count=2, num_inference_steps=4, solver="euler"),
    GenerationRequest(prompt="left", seed=8, num_inference_steps=4, solver="euler", guidance_mode="none"),
)


def asked(bundle: Path, **changes: Any) -> TuneRequest:
    few = {
        "budgets": (3, 6),
        "solvers": (Solver.EULER, Solver.AB2),
        "shifts": (1.0, 2.0),
        "requests": CLIPS,
        "record": False,
    }
    return TuneRequest(bundle=bundle, **few | changes)


def test_a_report_tells_all_that_was_tried(bundle_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report = tune(asked(bundle_path), lambda *news: told.append(news))
    assert report.clips == 3
    assert report.reference_error <= 2e-3
    assert report.reference.solver is Solver.AB2
    assert (report.own.grid.solver, report.own.grid.steps, report.own.evaluations) == (Solver.EULER, 4, 4)
    assert {(each.grid.solver, each.evaluations) for each in report.tried} == {
        (solver, budget) for solver in (Solver.EULER, Solver.AB2) for budget in (3, 6)
    }
    ruled = [each for each in report.tried if not each.grid.solver_weights]
    assert len(ruled) == 2 * 2 * (2 + 1 + len(STRETCHED)), "all shifts, one between, longer late steps"
    fitted = [each.grid for each in report.tried if each.grid.solver_weights]
    assert {each.solver for each in fitted} == {Solver.AB2}
    assert {each.steps for each in fitted} == {3, 6}
    assert {each.late_stretch for each in fitted} >= {stretch for _, stretch in FITTED}
    assert set(report.best) <= {*report.tried, report.own}
    assert report.best[-1].grid.solver is Solver.AB2
    # Two of the three clips are guided, with two rows a step.
    assert {each.point.grid.guidance_until for each in report.intervals} <= {*UNTIL}
    assert report.intervals
    for each in report.intervals:
        assert each.fewer in report.best
        assert each.point.grid.steps < each.rows < 5 / 3 * each.point.grid.steps
    assert TuneReport.model_validate_json(report.model_dump_json()) == report
    assert told[0] == ("loading", 0, 1)
    assert all(0 <= done <= total for _, done, total in told)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_student_is_tuned_without_guidance_intervals(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "student", Toy(student=Student(guidance=(2.0, 6.0))))
    report = tune(asked(bundle, budgets=(3,), requests=CLIPS[:1], tolerance=0.1))
    assert report.tried
    assert not report.intervals


def test_a_flow_map_is_not_tuned(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "map", Toy(student=Student(guidance=(2.0, 6.0), flow_map=True)))
    with pytest.raises(RequestError, match="a flow map has its steps in it"):
        tune(asked(bundle))


def test_an_error_is_that_of_the_clips_themselves(bundle_path: Path) -> None:
    report = tune(asked(bundle_path, budgets=(3,), solvers=(Solver.AB2,), shifts=(1.0,)))
    (point,) = (each for each in report.tried if (each.grid.late_stretch, each.grid.solver_weights) == (1, ()))

    def made(pipe: StivPipeline, **grid: Any) -> np.ndarray:
        return pipe.run(pipe.plan([each.changed(**grid) for each in CLIPS]), output_type="latent").latents

    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        shift = report.reference.time_shift
        exact = made(pipe, solver="ab2", num_inference_steps=report.reference.steps, time_shift=shift)
        errors = relative_errors(made(pipe, solver="ab2", num_inference_steps=3, time_shift=1.0), exact)
    # Threads may change the last bits of a sum, far below these errors.
    assert (point.tried, point.error) == pytest.approx((errors[[0, 2]].mean(), errors[1]), rel=1e-3)


@pytest.mark.parametrize(
    "guidance", [({}, {}), ({"guidance_from": 0.3, "guidance_until": 0.8},) * 2, ({"guidance_until": 0.5}, {})]
)
def test_fitted_weights_are_found_and_their_error_is_that_of_a_run_with_them(
    bundle_path: Path, guidance: tuple[dict[str, float], ...]
) -> None:
    """Where guidance begins or ends too, with which AB2 starts anew: in all clips at once or in some."""
    clips = tuple(each.changed(**own) for each, own in zip(CLIPS, guidance, strict=True))
    report = tune(asked(bundle_path, requests=clips, budgets=(4,), solvers=(Solver.AB2,), shifts=(1.0,)))
    ruled, fitted = (
        [each for each in report.tried if bool(each.grid.solver_weights) == wanted] for wanted in (False, True)
    )
    assert min(each.tried for each in fitted) < min(each.tried for each in ruled)
    assert min(fitted, key=lambda each: each.tried) in report.best
    kept = tuned(report).grid(4, "ab2")
    assert kept is not None
    assert kept.solver_weights == report.best[-1].grid.solver_weights

    def made(pipe: StivPipeline, **grid: Any) -> np.ndarray:
        return pipe.sample(pipe.plan([each.changed(solver="ab2", **grid) for each in clips]))

    own = kept.model_dump(include={"time_shift", "late_stretch", "solver_weights"})
    with StivPipeline.from_bundle(bundle_path, "onnxruntime", threads=1) as pipe:
        shift = report.reference.time_shift
        exact = made(pipe, num_inference_steps=report.reference.steps, time_shift=shift)
        errors = relative_errors(made(pipe, num_inference_steps=4, **own), exact)
    assert (kept.tried, kept.error) == pytest.approx((errors[[0, 2]].mean(), errors[1]), rel=1e-3)


def test_one_clip_that_chooses_is_too_few_to_fit_to(bundle_path: Path) -> None:
    report = tune(asked(bundle_path, requests=CLIPS[:1], budgets=(3,), solvers=(Solver.AB2,), tolerance=0.5))
    assert report.clips == 2
    assert not any(each.grid.solver_weights for each in report.tried)


def test_one_step_has_no_weights_to_fit(bundle_path: Path) -> None:
    report = tune(asked(bundle_path, budgets=(1,), solvers=(Solver.AB2,), shifts=(1.0,), tolerance=0.5))
    assert not any(each.grid.solver_weights for each in report.tried)


def test_guidance_that_somebody_chose_stays(bundle_path: Path) -> None:
    chosen = tuple(each.changed(guidance_from=0.5) for each in CLIPS)
    few = asked(bundle_path, requests=chosen, budgets=(3,), solvers=(Solver.EULER,), shifts=(1.0,), tolerance=0.1)
    assert tune(few).intervals == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"requests": ()}, "tuning needs 2 clips or more, got 0"),
        ({"requests": CLIPS[1:]}, "tuning needs 2 clips or more, got 1"),
        ({"requests": (CLIPS[0], GenerationRequest(prompt="left"))}, "a request to tune on has no seed; give each one"),
        ({"solvers": ()}, "no solver to try; give some of euler, heun, ab2"),
        ({"budgets": ()}, "budgets are one or more ascending numbers from 1 to 10000, got none"),
        ({"budgets": (0, 4)}, "budgets are one or more ascending numbers from 1 to 10000, got 0, 4"),
        ({"budgets": (8, 4)}, "ascending numbers from 1 to 10000, got 8, 4"),
        ({"shifts": (1.0, 1.0)}, "shifts are one or more ascending numbers from 0.001 to 1000, got 1, 1"),
        ({"shifts": (1.0, float("nan"))}, "shifts are one or more ascending numbers"),
        ({"tolerance": 0.0}, "tolerance must be above 0 and below 1, got 0"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_is_opened(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        asked(Path("no-such-bundle"), **changes)
    assert "\n" not in str(caught.value)


def test_requests_of_different_grids_are_refused(bundle_path: Path) -> None:
    with pytest.raises(RequestError, match="different solvers, steps or times; give all the same"):
        tune(asked(bundle_path, requests=(CLIPS[0], CLIPS[1].changed(time_shift=2))))


def test_by_default_the_requests_own_number_of_evaluations_is_tried_too(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "BUDGETS", (2,))
    report = tune(asked(bundle_path, budgets=None, solvers=(Solver.AB2,), shifts=(0.5,), tolerance=0.5))
    assert {each.evaluations for each in report.tried} == {2, 4}
    assert {each.grid.time_shift for each in report.tried} >= {0.5, 1.0}, "and their own time shift"
    assert min(BUDGETS) == 4
    assert max(BUDGETS) == 30


def test_the_best_of_each_solver_and_number_of_steps_is_kept(bundle_path: Path) -> None:
    report = tune(asked(bundle_path, budgets=(3, 4), tolerance=0.5))
    kept = tuned(report)
    assert [(each.steps, each.solver, each.weights) for each in kept.grids] == [
        (steps, solver, weights)
        for steps in (3, 4)
        for solver, weights in (("ab2", "fitted"), ("ab2", "its own"), ("euler", "its own"))
    ]
    for each in kept.grids:
        mine = [
            point
            for point in report.tried
            if (point.grid.steps, point.grid.solver, point.grid.weights) == (each.steps, each.solver, each.weights)
        ]
        assert each.tried == min(point.tried for point in mine)
    worse = report.model_copy(update={"own": report.own.model_copy(update={"tried": 0.0})})
    assert tuned(worse).grid(4) == next(each for each in tuned(worse).grids if each.tried == 0), "its own was better"
    elsewhere = worse.own.grid.model_copy(update={"steps": 9})
    alone = worse.model_copy(update={"own": worse.own.model_copy(update={"grid": elsewhere})})
    assert tuned(alone) == kept, "nothing else had so many steps"


def test_what_others_wrote_meanwhile_stays(own_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search, changed = tuning._search, read_manifest(own_bundle).model_copy(update={"checkpoint": "1" * 64})

    def slow(*arguments: Any) -> TuneReport:
        write_manifest(own_bundle, changed)
        return search(*arguments)

    monkeypatch.setattr(tuning, "_search", slow)
    report = tune(asked(own_bundle, record=True, budgets=(3,), tolerance=0.5))
    assert read_manifest(own_bundle) == changed.model_copy(update={"tuned": tuned(report)})


def test_another_bundle_in_the_place_is_not_given_these_defaults(
    own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, other = tuning._search, read_manifest(own_bundle).model_copy(update={"precision": "float16"})

    def slow(*arguments: Any) -> TuneReport:
        report = search(*arguments)
        write_manifest(own_bundle, other)
        return report

    monkeypatch.setattr(tuning, "_search", slow)
    with pytest.raises(BundleError, match="another bundle was put there while this one was tuned"):
        tune(asked(own_bundle, record=True, budgets=(3,), tolerance=0.5))
    assert read_manifest(own_bundle) == other


FEW = {"solvers": (Solver.AB2,), "shifts": (1.0,), "tolerance": 0.1}


def test_skips_are_tried_at_equal_evaluations_and_their_error_is_that_of_a_run(skipping_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    report = tune(asked(skipping_path, budgets=(4, 6), **FEW), lambda *news: told.append(news))
    assert report.skips
    for each in report.skips:
        grid = each.point.grid
        assert grid.skipped_steps
        assert len(grid.solver_weights) == grid.steps - 1, "fitted"
        assert each.point.evaluations == grid.steps - len(grid.skipped_steps)
        assert each.fewer in report.best
        assert each.fewer.evaluations <= each.point.evaluations
    assert not any(each.grid.skipped_steps for each in (*report.tried, *report.best, report.own))
    assert any("skipped" in words for words, _, _ in told)
    assert all(0 <= done <= total for _, done, total in told)
    assert TuneReport.model_validate_json(report.model_dump_json()) == report
    point = report.skips[-1].point

    def made(pipe: StivPipeline, grid: Grid) -> np.ndarray:
        return pipe.sample(pipe.plan([tuning._changed(each, grid) for each in CLIPS]))

    with StivPipeline.from_bundle(skipping_path, "onnxruntime", threads=1) as pipe:
        errors = relative_errors(made(pipe, point.grid), made(pipe, report.reference))
    assert (point.tried, point.error) == pytest.approx((errors[[0, 2]].mean(), errors[1]), rel=1e-3)


def test_where_nothing_can_skip_nothing_is_tried(bundle_path: Path, skipping_path: Path) -> None:
    assert tune(asked(bundle_path, budgets=(4,), **FEW)).skips == ()
    two = asked(skipping_path, budgets=(4,), **FEW | {"requests": CLIPS[:1]})
    assert tune(two).skips == (), "one clip that chooses is too few to fit to"
    ends = tuple(each.changed(guidance_until=0.5) for each in CLIPS)
    assert tune(asked(skipping_path, budgets=(6,), **FEW | {"requests": ends})).skips == ()


@pytest.mark.parametrize(
    "values",
    [
        {"num_inference_steps": 6, "solver": None, "skip_blocks": True},
        {"num_inference_steps": 9, "solver": "ab2", "skipped_steps": (2, 4, 6, 8)},
    ],
)
def test_requests_that_skip_are_tuned_on_as_others_are(skipping_path: Path, values: dict[str, Any]) -> None:
    """Their own grid is measured, but stands for nothing that skips none, whatever its error."""
    clips = tuple(each.changed(**values) for each in CLIPS)
    report = tune(asked(skipping_path, requests=clips, budgets=(2, 3), **FEW))
    assert report.own.grid.skipped_steps
    assert report.own.evaluations == report.own.grid.steps - len(report.own.grid.skipped_steps)
    assert not any(each.point.grid.skipped_steps for each in report.intervals)
    best = report.model_copy(update={"own": report.own.model_copy(update={"tried": 0.0})})
    assert report.own not in report.best
    assert tuned(best) == tuned(report)


def skip_of(steps: int, tried: float, fewer: Point) -> Skip:
    grid = fewer.grid.model_copy(
        update={"steps": steps, "solver_weights": ((1.5, -0.5),) * (steps - 1), "skipped_steps": (steps - 1,)}
    )
    return Skip(point=Point(grid=grid, evaluations=steps - 1, tried=tried, error=tried), fewer=fewer)


def test_skips_that_are_worthwhile_are_kept_beside_the_others_and_no_others(bundle_path: Path) -> None:
    report = tune(asked(bundle_path, budgets=(3, 4), **FEW))
    fewer = report.best[-1]
    near, nearest, far = (skip_of(5, fewer.tried * part, fewer) for part in (0.5, 0.25, 2.0))
    other = skip_of(4, fewer.tried / 2, fewer)
    kept = tuned(report.model_copy(update={"skips": (other, far, near, nearest)}))
    plain = tuned(report)
    assert [each for each in kept.grids if not each.skipped_steps] == list(plain.grids)
    assert [(each.steps, each.tried) for each in kept.skipping()] == [(5, nearest.point.tried), (4, other.point.tried)]
    assert kept.grid(4) == plain.grid(4)
    assert tuned(report.model_copy(update={"skips": (far,)})) == plain


def test_what_was_found_to_skip_is_what_a_request_that_asks_for_it_gets(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle", Toy(slope=0.8, skips=True))
    report = tune(asked(path, budgets=(6,), **FEW))
    found = report.skips[-1]
    worthwhile = found.model_copy(update={"point": found.point.model_copy(update={"tried": 0.0, "error": 0.0})})
    tuning._record(path, report.model_copy(update={"skips": (worthwhile,)}))
    with StivPipeline.from_bundle(path, "onnxruntime", threads=1) as pipe:
        steps = found.point.grid.steps
        asks = GenerationRequest(prompt="digit", num_inference_steps=steps, skip_blocks=True)
        (video,) = pipe.plan(asks).videos
    wanted = found.point.grid.model_dump(exclude={"guidance_until"})
    assert {name: getattr(video.settings, name) for name in wanted} == wanted
