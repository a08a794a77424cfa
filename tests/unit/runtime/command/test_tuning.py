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
from stiv_deploy.runtime.command import tuning
from stiv_deploy.runtime.command.tuning_plot import LEFT, RIGHT, pareto_svg
from stiv_deploy.runtime.pipeline.tuning import TuneReport
from stiv_deploy.runtime.sampling.tuning import Grid, Point, Skip

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


def point(solver: Solver, steps: int, error: float, **grid: Any) -> Point:
    own = Grid(solver=solver, steps=steps, time_shift=2.5, **grid)
    return Point(grid=own, evaluations=own.evaluations, tried=error, error=error)


FITTED = ((1.5, -0.5),) * 6
TRIED = (
    *(point(solver, 4, error) for solver, error in ((Solver.EULER, 0.5), (Solver.HEUN, 0.4), (Solver.AB2, 0.25))),
    point(Solver.AB2, 5, 0.1875, solver_weights=FITTED[:4]),
)
SKIP = Skip(point=point(Solver.AB2, 7, 0.125, solver_weights=FITTED, skipped_steps=(3, 5)), fewer=TRIED[-1])
FAR = SKIP.model_copy(update={"point": SKIP.point.model_copy(update={"tried": 0.2})})


def report_of(*found: Skip) -> TuneReport:
    points = {"own": TRIED[0], "tried": TRIED, "best": TRIED[2:], "intervals": (), "skips": found}
    return TuneReport(bundle="0" * 64, clips=4, reference=TRIED[2].grid, reference_error=0.01, seconds=1.0, **points)


def test_the_picture_has_grids_that_skip_and_names_that_lie_apart() -> None:
    root = ElementTree.fromstring(pareto_svg(report_of(SKIP)))
    titles = [each.text or "" for each in root.iterfind(".//{*}title")]
    assert "ab2, 7 steps, shift 2.5, 2 skipped, fitted weights: 1.25e-01" in titles
    legend = [each for each in root.findall("{*}text") if each.get("y") == "44"]
    names = [each.text for each in legend]
    assert names[:-1] == ["euler", "heun", "ab2", "ab2, fitted", "ab2, fitted, skips"]
    ends = [float(LEFT)]
    for each in legend:  # 12 pixels high; letters are 0.56 times as wide in DejaVu Sans, less in others
        width, x = 0.56 * 12 * len(each.text or ""), float(each.get("x", ""))
        start = x - width if each.get("text-anchor") == "end" else x
        assert start >= ends[-1]
        ends.append(start + width)
    assert ends[-1] <= RIGHT + 1
    assert "ab2, fitted, skips" not in pareto_svg(report_of())


def test_what_is_gained_by_skips_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    tuning._show_skips(report_of(SKIP, FAR))
    rows = [[each for each in line.split() if each not in "│|"] for line in capsys.readouterr().out.splitlines()]
    assert rows.count(["5", "7", "2", "2.5", "1", "1.25e-01", "1.88e-01"]) == 1, "not the one that is farther"
    tuning._show_skips(report_of(FAR))
    assert "skipped blocks (1 tried) are nowhere nearer than as many evaluations without" in capsys.readouterr().out


def test_a_bundle_that_can_skip_is_told_what_that_gains(run: Run, skipping_path: Path) -> None:
    few = ("--prompt", "digit three", "--count", 4, "--evaluations", 5, "--solver", "ab2", "--time-shift", 1)
    code, out, err = run("tune", skipping_path, *few, "--tolerance", 0.1, "--no-record")
    assert code == 0, err
    assert ("every second late step skips the blocks" in out) != ("skipped blocks (3 tried)" in out)
