"""Skips against fewer steps: which grids are compared, and what is told of it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from toys import Toy, make_bundle

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.tuning import TuneReport, TuneRequest, tune
from stiv_deploy.runtime.sampling.settings import Solver


class StandInExam:
    about = "prompts of a test"

    def __init__(self, samples: int) -> None:
        self.prompts = ["digit three"] * samples
        self.first_frames = np.linspace(-1, 1, samples * 3 * 64, dtype=np.float32).reshape(samples, 3, 8, 8)


@pytest.fixture(scope="module")
def script(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("skipped_blocks")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("skipped") / "bundle", Toy(slope=0.8, skips=True))


@pytest.fixture(scope="module")
def report(bundle: Path) -> TuneReport:
    requests = tuple(GenerationRequest(prompt="digit three", seed=seed) for seed in range(3))
    search: dict[str, Any] = {"budgets": (4, 6), "solvers": (Solver.AB2,), "shifts": (1.0, 2.0), "most": 60}
    return tune(TuneRequest(bundle=bundle, requests=requests, record=False, threads=1, **search))


def test_the_best_of_each_number_of_evaluations(script: ModuleType, report: TuneReport) -> None:
    found = list(script.pairs(report))
    assert [skips.evaluations for _, skips in found] == sorted({each.point.evaluations for each in report.skips})
    for fewer, skips in found:
        rivals = [each.point.tried for each in report.skips if each.point.evaluations == skips.evaluations]
        assert skips.tried == min(rivals)
        assert fewer.tried == min(each.tried for each in report.best if each.evaluations <= skips.evaluations)
        assert not fewer.grid.skipped_steps


def test_where_nothing_skips_there_is_nothing_to_compare(script: ModuleType, report: TuneReport) -> None:
    with pytest.raises(RequestError, match="exported with --skips"):
        list(script.pairs(report.model_copy(update={"skips": ()})))


def test_a_run_in_small(
    script: ModuleType, bundle: Path, report: TuneReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are those of the grids themselves, by clip; both tasks have a row for each number of evaluations."""
    config = type("Config", (), {"sampling": None})
    monkeypatch.setattr(script, "exam_of", lambda _folder, _sampling, samples: StandInExam(samples))
    monkeypatch.setattr(script, "open_checkpoint", lambda _: type("Opened", (), {"config": config, "sha256": "0" * 64}))
    monkeypatch.setattr(sys, "argv", ["skipped_blocks.py"])
    tuning, out = tmp_path / "tuning.json", tmp_path / "skips.json"
    tuning.write_text(report.model_dump_json())
    script.main(tmp_path, bundle, tuning, out, samples=3, exact=40)
    result = json.loads(out.read_text())
    assert [(row["task"], row["evaluations"]) for row in result["rows"]] == [
        (task, skips.evaluations) for task in ("t2v", "ti2v") for _, skips in script.pairs(report)
    ]
    for row in result["rows"]:
        fewer, skips = (np.array(row["errors"][name]) for name in ("fewer", "skips"))
        assert (len(fewer), len(skips)) == (3, 3)
        assert (fewer > 0).all()
        assert row["ratio"] == pytest.approx(np.exp(np.log(skips / fewer).mean()))
    assert "| evaluations |" in out.with_suffix(".md").read_text()
    assert "skipped" in out.with_suffix(".md").read_text()
