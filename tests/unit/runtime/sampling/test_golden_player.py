"""Runs of golden answers: the step engine gives what the reference's sampler does, and what is wrong in it is found."""

from pathlib import Path

import numpy as np
import pytest

from stiv_deploy.runtime.backends.onnxruntime import OnnxRuntimeBackend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.golden import read_golden
from stiv_deploy.runtime.errors import BackendError
from stiv_deploy.runtime.sampling import engine, golden_player
from stiv_deploy.runtime.sampling.golden_player import run_rows
from stiv_deploy.runtime.sampling.golden_run import VerifyRow
from stiv_deploy.runtime.sampling.sample import Sample

OUTPUTS = {"without guidance": 1, "sit by heun": 3, "forced jit": 5, "jit by ab2": 5}


def rows_of(folder: Path) -> list[VerifyRow]:
    bundle = Bundle.open(folder)
    with OnnxRuntimeBackend(bundle, threads=1) as backend:
        return run_rows(backend, bundle, read_golden(bundle))


def test_right_runs_pass(sampled: Path) -> None:
    rows = rows_of(sampled)
    assert [row.subject for row in rows if not row.passed] == []
    assert {name: sum(row.subject == f"sampling {name}" for row in rows) for name in OUTPUTS} == OUTPUTS
    assert max(row.error for row in rows) < 1e-6


def test_a_bundle_without_runs_has_no_rows(proven: Path) -> None:
    assert rows_of(proven) == []


def test_what_is_wrong_is_found_by_the_runs_that_have_it(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = engine.row_mask
    monkeypatch.setattr(engine, "row_mask", lambda branch, mask: seen(branch._replace(image=not branch.image), mask))
    wrong = {row.subject for row in rows_of(sampled) if not row.passed}
    assert wrong == {"sampling forced jit", "sampling sit by heun", "sampling jit by ab2"}, "one has no given frames"


def test_a_clip_that_is_not_finite_fails_alone(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Sample.start

    def bad(self: Sample, mask: np.ndarray) -> np.ndarray:
        return start(self, mask) * np.float32(np.nan if self.settings.guidance_mode == "none" else 1)

    monkeypatch.setattr(Sample, "start", bad)
    failed = [row for row in rows_of(sampled) if not row.passed]
    assert {row.subject for row in failed} == {"sampling without guidance"}
    assert failed[0].fault is not None
    assert "the generated latents are not finite" in failed[0].fault


def test_what_does_not_run_fails_everywhere(sampled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise BackendError("out of memory")

    monkeypatch.setattr(golden_player, "_engine", refused)
    rows = rows_of(sampled)
    assert len(rows) == sum(OUTPUTS.values())
    assert {(row.passed, row.fault) for row in rows} == {(False, "out of memory")}
