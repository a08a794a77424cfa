"""``stiv tune`` of a checkpoint: what is kept beside it, and what becomes of that in bundles."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stiv_deploy.export import tuned_checkpoint
from stiv_deploy.export.graphs.tuned import TUNED, read_tuned
from stiv_deploy.runtime import Solver
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.pipeline.tuning import TuneReport, TuneRequest
from stiv_deploy.runtime.progress import Progress
from stiv_deploy.runtime.sampling.tuning import Grid, Point
from stiv_deploy.stiv_ref.checkpoint import open_checkpoint

Run = Callable[..., tuple[int, str]]
FEW = ("--prompt", "digit three", "--count", 2, "--evaluations", 3)
BEST = Point(grid=Grid(solver=Solver.AB2, steps=3, time_shift=2.0), evaluations=3, tried=0.1, error=0.2)


def found_at_once(request: TuneRequest, progress: Progress) -> TuneReport:
    """In the place of the search, which has tests of its own."""
    del progress
    assert not request.record
    bundle = Bundle.open(request.bundle)
    assert bundle.manifest.tuned is None
    exact = BEST.grid.model_copy(update={"steps": 30})
    points = {"own": BEST, "tried": (BEST,), "best": (BEST,), "intervals": ()}
    return TuneReport(bundle=bundle.hash, clips=2, reference=exact, reference_error=0.01, seconds=0.0, **points)


@pytest.fixture(autouse=True)
def _found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_checkpoint, "tune", found_at_once)


@pytest.fixture
def own(micro_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(micro_path, tmp_path / "checkpoint"))


def test_every_bundle_of_it_has_what_was_found(own: Path, tmp_path: Path, stiv: Run) -> None:
    before = open_checkpoint(own).sha256
    code, err = stiv("tune", own, *FEW)
    assert code == 0, err
    found = read_tuned(open_checkpoint(own))
    assert found is not None
    assert open_checkpoint(own).sha256 == before
    assert stiv("export", own, "--out", tmp_path / "bundle", "--no-check")[0] == 0
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.manifest.tuned is not None
    assert bundle.manifest.tuned.grids == found.grids
    (best,) = found.best()
    assert bundle.manifest.tuned.grid(3) == best


def test_another_checkpoints_are_refused_and_can_be_made_anew(own: Path, tmp_path: Path, stiv: Run) -> None:
    assert stiv("tune", own, *FEW)[0] == 0
    kept = json.loads((own / TUNED).read_text())
    (own / TUNED).write_text(json.dumps(kept | {"checkpoint": "0" * 64}))
    code, err = stiv("export", own, "--out", tmp_path / "bundle")
    assert (code, err.count("\n")) == (2, 1)
    assert f"is of the checkpoint 000000000000, this is {open_checkpoint(own).sha256[:12]}; remove it, or run: " in err
    assert not (tmp_path / "bundle").exists()
    assert stiv("tune", own, *FEW)[0] == 0
    assert json.loads((own / TUNED).read_text()) == kept


def test_a_file_that_is_something_else_is_one_line(own: Path, tmp_path: Path, stiv: Run) -> None:
    (own / TUNED).write_text('{"format": "stiv-tuned"}')
    code, err = stiv("export", own, "--out", tmp_path / "bundle")
    assert (code, err.count("\n")) == (2, 1)
    assert TUNED in err


def test_nothing_is_kept_where_that_was_not_wanted(own: Path, stiv: Run) -> None:
    assert stiv("tune", own, *FEW, "--no-record")[0] == 0
    assert not (own / TUNED).exists()
