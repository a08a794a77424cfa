"""``stiv tune``: what it finds, keeps and draws, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from stiv_deploy.runtime import GenerationRequest, Solver, StivPipeline
from stiv_deploy.runtime.bundle.bundle import Bundle, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.tuned import Tuned
from stiv_deploy.runtime.command.tuning_plot import pareto_svg
from stiv_deploy.runtime.pipeline.tuning import TuneReport

Run = Callable[..., tuple[int, str, str]]
FEW = ("--prompt", "digit three", "--count", 4, "--evaluations", 5, "--evaluations", 3)
FEW += ("--solver", "ab2", "--solver", "euler", "--time-shift", 1, "--time-shift", 2, "--tolerance", 0.1)


@pytest.fixture
def tuned(run: Run, own_bundle: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A bundle that was tuned, and the folder of its picture and report."""
    files = ("--out", tmp_path / "tuning.svg", "--json", tmp_path / "tuning.json")
    code, out, err = run("tune", own_bundle, *FEW, *files)
    assert (code, "Traceback" in err) == (0, False), err
    assert "the best are its defaults now" in out
    assert "guidance that ends early" in out
    return own_bundle, tmp_path


def planned(bundle: Path, **values: Any) -> tuple[Solver, int, float, float, Any]:
    with StivPipeline.from_bundle(bundle, "onnxruntime", threads=1) as pipe:
        (video,) = pipe.plan(GenerationRequest(prompt="digit", **values)).videos
    settings = video.settings
    return settings.solver, settings.steps, settings.time_shift, settings.late_stretch, settings.solver_weights


def test_a_number_of_steps_then_means_the_best_of_it(tuned: tuple[Path, Path], run: Run) -> None:
    bundle, folder = tuned
    manifest = Bundle.open(bundle).manifest
    assert manifest.tuned is not None
    assert manifest.tuned.bundle == manifest.bundle_hash
    report = TuneReport.model_validate_json((folder / "tuning.json").read_text())
    for steps in (3, 5):
        mine = [each for each in report.tried if each.evaluations == steps]
        grid = min(mine, key=lambda each: each.tried).grid
        weights = grid.solver_weights
        assert weights, "they were fitted"
        wanted = (grid.solver, steps, grid.time_shift, grid.late_stretch, weights)
        assert planned(bundle, num_inference_steps=steps) == wanted
        euler = min((each for each in mine if each.grid.solver == "euler"), key=lambda each: each.tried).grid
        assert planned(bundle, num_inference_steps=steps, solver="euler")[2] == euler.time_shift
    own = manifest.sampling
    assert planned(bundle, num_inference_steps=3, time_shift=7)[2:] == (7, own.late_stretch, ()), "its own"
    assert planned(bundle, num_inference_steps=3, late_stretch=2)[2:] == (own.time_shift, 2, ())
    mine = [each for each in report.tried if each.evaluations == 5 and not each.grid.solver_weights]
    ruled = min(mine, key=lambda each: each.tried).grid
    nearest = planned(bundle, num_inference_steps=6)
    assert nearest == (ruled.solver, 6, ruled.time_shift, ruled.late_stretch, ()), "weights are of five steps alone"
    assert planned(bundle, solver="heun") == (Solver.HEUN, own.steps, own.time_shift, 1, ()), "it was not tried"
    words = run("inspect", bundle)[1]
    best = manifest.tuned.grid(own.steps)
    assert best is not None
    assert f"--solver {best.solver} --time-shift {best.time_shift:g}" in " ".join(words.split())
    assert "Defaults by steps ('stiv tune', 4 clips" in words


def test_what_was_there_stays_and_hashes_hold(tuned: tuple[Path, Path], bundle_path: Path) -> None:
    before, after = read_manifest(bundle_path), read_manifest(tuned[0])
    assert after.model_copy(update={"tuned": None}) == before
    assert after.bundle_hash == before.bundle_hash
    assert {each.name for each in tuned[0].iterdir()} == {each.name for each in bundle_path.iterdir()}


def test_the_picture_shows_every_grid(tuned: tuple[Path, Path]) -> None:
    root = ElementTree.parse(tuned[1] / "tuning.svg").getroot()
    report = TuneReport.model_validate_json((tuned[1] / "tuning.json").read_text())
    dots = root.findall("{*}circle")
    assert len(dots) == len(report.tried) + 1 + (report.own.grid.solver == "euler")
    for dot in dots:
        assert 70 <= float(dot.get("cx", "")) <= 700
        assert 60 <= float(dot.get("cy", "")) <= 400
    written = {each.text for each in root.findall("{*}text")}
    assert {str(each.evaluations) for each in (*report.tried, report.own)} <= written


def test_a_picture_of_errors_of_nothing(tuned: tuple[Path, Path]) -> None:
    report = TuneReport.model_validate_json((tuned[1] / "tuning.json").read_text())
    point = report.own.model_copy(update={"tried": 0.0, "error": 0.0})
    nothing = report.model_copy(update={"tried": (point,), "own": point, "reference_error": 0.0})
    assert ElementTree.fromstring(pareto_svg(nothing)).tag.endswith("svg")


def test_nothing_is_kept_where_nothing_shall_be(run: Run, own_bundle: Path) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    code, out, _ = run("tune", own_bundle, *FEW, "--no-record", "--json")
    assert code == 0
    assert json.loads(out)["clips"] == 4
    assert (own_bundle / "manifest.json").read_bytes() == before


WRONG = {
    "no prompt": ((), "no prompt given; give --prompt"),
    "one clip": (("--prompt", "digit"), "tuning needs 2 clips or more, got 1: half of them choose, the others judge"),
    "no evaluation": ((*FEW, "--evaluations", 0), "budgets are one or more ascending numbers from 1 to 10000, got 0"),
    "solver": ((*FEW, "--solver", "rk4"), "rk4"),
    "shift": ((*FEW, "--time-shift", "nan"), "shifts are one or more ascending numbers"),
    "tolerance": ((*FEW, "--tolerance", 0), "tolerance must be above 0 and below 1"),
    "name": ((*FEW, "--out", "tuning.png"), "the picture is an SVG file; give a name that ends in .svg"),
    "backend": ((*FEW, "--backend", "tensorrt"), "backend tensorrt does not work here"),
    "guidance": ((*FEW, "--guidance", "inf"), "guidance_scale"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_tuned_is_one_line(run: Run, own_bundle: Path, case: str) -> None:
    before = (own_bundle / "manifest.json").read_bytes()
    options, words = WRONG[case]
    code, _, err = run("tune", own_bundle, *options)
    assert code == 2
    assert words in " ".join(err.split())
    assert (own_bundle / "manifest.json").read_bytes() == before


def test_pictures_and_reports_have_places_of_their_own(run: Run, own_bundle: Path, tmp_path: Path) -> None:
    for options, words in (
        (("--out", own_bundle / "a.svg"), "holds its own files only"),
        (("--out", tmp_path / "no" / "a.svg"), "does not exist; make it first"),
        (("--out", tmp_path / "a.svg", "--json", tmp_path / "a.svg"), "named by both --out and --json"),
    ):
        code, _, err = run("tune", own_bundle, *FEW, *options)
        assert (code, words in " ".join(err.split())) == (2, True), err


def test_tuned_defaults_of_another_bundle_are_refused(run: Run, own_bundle: Path) -> None:
    grid = {"solver": "ab2", "steps": 4, "time_shift": 2, "tried": 0.1, "error": 0.1}
    other = Tuned.model_validate({"bundle": "0" * 64, "clips": 2, "reference_error": 0, "grids": [grid]})
    write_manifest(own_bundle, read_manifest(own_bundle).model_copy(update={"tuned": other}))
    code, _, err = run("inspect", own_bundle)
    assert code == 2
    assert "its tuned defaults are of the bundle '000000000000', this is" in " ".join(err.split())
