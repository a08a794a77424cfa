"""Rows of fewer evaluations: what they ask for, what is measured of them, what is kept."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from toys import Toy, make_bundle, tuned_to_skip

from stiv_deploy.runtime.bundle.bundle import read_manifest, write_manifest
from stiv_deploy.runtime.bundle.tuned import Tuned, TunedGrid
from stiv_deploy.runtime.errors import RequestError


@pytest.fixture(scope="module")
def few(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("few_evaluations")


class StandInExam:
    about = "prompts of a test"
    judged = ("motion", "right")

    def __init__(self, samples: int, side: int) -> None:
        self.prompts = ["digit three"] * samples
        self.first_frames = np.zeros((samples, 3, side, side), np.float32)

    def verdicts(self, clips: np.ndarray, *, image: bool) -> list[list[bool | None]]:
        assert np.isfinite(clips).all()
        return [[None, image]] * len(clips)


def test_errors_and_spreads(few: ModuleType) -> None:
    random = np.random.default_rng(0)
    exact = random.standard_normal((3, 4, 5))
    assert few.relative_error(1.1 * exact, exact) == pytest.approx(0.1)
    wide = 2 + 3 * random.standard_normal((2, 8, 40_000))
    assert few.spread(wide) == pytest.approx(3, rel=0.01)
    assert few.spread(np.repeat(wide[:, :1], 8, axis=1)) < 1e-12


def test_ratios_are_within_a_round(few: ModuleType) -> None:
    """A machine that is twice as slow in one round changes nothing."""
    assert few.ratios({"a": [1.0, 2.0, 1.0], "b": [0.5, 1.0, 0.5]}) == {"a": 1.0, "b": 0.5}


def test_a_name_and_a_bundle(few: ModuleType) -> None:
    assert few.named_bundles(["fp8=out/a=b"], "--also") == {"fp8": Path("out/a=b")}
    with pytest.raises(RequestError, match="--also fp8: want NAME=BUNDLE"):
        few.named_bundles(["fp8"], "--also")


@pytest.fixture
def tuned_path(bundle_path: Path, tmp_path: Path) -> Path:
    """A bundle with fitted weights of three steps."""
    own = copytree(bundle_path, tmp_path / "tuned")
    manifest = read_manifest(own)
    grids = [
        TunedGrid(solver="ab2", steps=steps, time_shift=2, solver_weights=weights, tried=0.1, error=0.1)
        for steps, weights in ((3, ((1.75, -0.75), (1.25, -0.25))), (4, ()))
    ]
    tuned = Tuned(bundle=manifest.bundle_hash, clips=4, reference_error=0.0, grids=tuple(grids))
    write_manifest(own, manifest.model_copy(update={"tuned": tuned}))
    return own


@pytest.mark.parametrize("steps", ["4", "3,5"])
def test_weights_that_nobody_has_fitted_are_asked_for(few: ModuleType, tuned_path: Path, steps: str) -> None:
    with pytest.raises(RequestError, match=f"has no fitted weights of {steps[-1]} steps; run: stiv tune"):
        few.fitted_grids(tuned_path, steps)


def test_grids_that_skip_have_rows_of_their_own(few: ModuleType, tmp_path: Path) -> None:
    skipping = tuned_to_skip(make_bundle(tmp_path / "skipping", Toy(skips=True)))
    plain = make_bundle(tmp_path / "plain", Toy())
    found = few.skipping_grids([plain, skipping], "6")
    assert found[plain] == []
    (grid,) = found[skipping]
    (row,) = few.fitted_rows("teacher", [grid], 2.0)
    assert row.name == f"AB2, 6 steps, {len(grid.skipped_steps)} skipped, fitted weights"
    assert row.options["skipped_steps"] == grid.skipped_steps
    with pytest.raises(RequestError, match="7 steps skip no blocks"):
        few.skipping_grids([plain, skipping], "6,7")


def test_the_smallest_run_is_kept_and_goes_on(
    few: ModuleType, bundle_path: Path, tuned_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stand_in(_folder: Path, sampling: Any, samples: int) -> StandInExam:
        return StandInExam(samples, sampling.height)

    manifest = few.StivPipeline.from_bundle(bundle_path, "onnxruntime", 1).bundle.manifest
    config = type("Config", (), {"sampling": manifest.sampling})
    monkeypatch.setattr(few, "exam_of", stand_in)
    monkeypatch.setattr(few, "open_checkpoint", lambda _: type("Opened", (), {"config": config, "sha256": "0" * 64}))
    monkeypatch.setattr(sys, "argv", ["few_evaluations.py"])
    monkeypatch.setattr(few, "STUDENT_STEPS", (1, 2))
    numbers: dict[str, Any] = {"samples": 5, "clips": 2, "prompts": 1, "exact": 4, "rounds": 1}
    numbers |= {"steps": "2", "fitted": "3"}
    options = {"time_shift": 2.0, "late_stretch": 3.0, "until": 0.4, "guidance": 2.0, "threads": 1}
    files = {"out": tmp_path / "few.json", "work": tmp_path / "work"}

    def run() -> dict[str, Any]:
        few.main(
            tmp_path,
            tuned_path,
            student=bundle_path,
            one_row=tuned_path,
            also=[f"again={bundle_path}"],
            also_student=None,
            also_one_row=[f"again={bundle_path}"],
            **numbers,
            **options,
            **files,
        )
        return json.loads(files["out"].read_text())

    report = run()
    rows = {row["name"]: row for row in report["rows"]}
    assert [row["rows"] for row in report["rows"]] == [60, 4, 4, 6, 2, 4, 6, 60, 4, 4, 6, 6]
    assert rows["AB2, 2 steps"]["error"] == rows["AB2, 2 steps, again"]["error"] > 0
    assert rows["AB2, 3 steps, fitted weights"]["options"]["solver_weights"] == [[1.75, -0.75], [1.25, -0.25]]
    assert rows["AB2, 2 steps"]["scores"]["ti2v"] == {"motion": 0.0, "right": 100.0}
    assert report["rows"][0]["time"] == 1.0
    assert "| Euler, 30 steps | 60 | 1.000 |" in files["out"].with_suffix(".md").read_text()
    monkeypatch.setattr(few.Measurement, "row", None)
    assert [row["error"] for row in run()["rows"]] == [row["error"] for row in report["rows"]]
