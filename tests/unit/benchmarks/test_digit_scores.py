"""The measurement itself, on sources whose score is known."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from stiv_deploy.stiv_ref.data.digit_requests import DigitRequests, balanced_requests, real_clips

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def scores() -> ModuleType:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import digit_scores
    finally:
        sys.path.remove(str(BENCHMARKS))
    return digit_scores


class KnownSource:
    """Answers every request with a real clip of what was asked, at ``good`` only; else with that clip reversed."""

    def __init__(self, requests: DigitRequests, good: float, frames: int = 4) -> None:
        self.frames, self.good = frames, good
        self.prompts, self.clips = requests.prompts, real_clips(requests, frames).numpy()
        self.calls: list[tuple[Any, dict[int, np.ndarray] | None]] = []

    def describe(self) -> dict[str, str]:
        return {"sampler": "known"}

    def generate(self, prompts: Sequence[str], seeds: range, settings: Any, given: Any) -> np.ndarray:
        self.calls.append((settings, given))
        chosen = self.clips[seeds.start : seeds.start + len(prompts)]
        assert list(prompts) == self.prompts[seeds.start : seeds.start + len(prompts)]
        return chosen if settings.scale == self.good else chosen[:, ::-1]

    def reconstruct(self, video: np.ndarray) -> np.ndarray:
        return np.clip(video + 0.02, -1, 1)


REQUESTS = balanced_requests(12, moving=True)


@pytest.mark.slow
def test_right_and_reversed_clips_score_as_they_must(scores: ModuleType) -> None:
    source = KnownSource(REQUESTS, good=3.0)
    experiment, best = scores.measure(source, REQUESTS, [2.0, 3.0], scores.Settings(steps=1, scale=1.0), batch=5)
    by_run = {(row["task"], row["mode"], row["scale"], row["renorm"]): row for row in experiment.rows}
    assert best is by_run["t2v", "jit", 3.0, True]
    assert best["direction"] == 100
    assert best["digit"] >= 90
    wrong = by_run["t2v", "jit", 2.0, True]
    assert wrong["direction"] == wrong["both"] == 0
    assert wrong["digit"] == best["digit"]
    assert set(by_run) >= {("t2v", "jit", 3.0, False), ("t2v", "none", 1.0, False), ("ti2v", "jit", 3.0, True)}


def test_every_setting_gets_the_same_requests_and_ti2v_the_first_frames(scores: ModuleType) -> None:
    source = KnownSource(REQUESTS, good=3.0)
    experiment, _ = scores.measure(source, REQUESTS, [3.0], scores.Settings(steps=1, scale=1.0), batch=5)
    assert len(source.calls) == 3 * len(experiment.rows)  # 12 requests in batches of 5
    given = [pictures[0] for _, pictures in source.calls if pictures is not None]
    np.testing.assert_array_equal(np.concatenate(given[:3]), source.clips[:, 0])
    image_row = next(row for row in experiment.rows if row["task"] == "ti2v")
    assert image_row["first_frame_psnr_db"] > 100  # the very clip: no error
    assert image_row["rest_psnr_db"] > 100


@pytest.mark.slow
def test_scorers_are_validated_beside(scores: ModuleType) -> None:
    result = scores.validate(KnownSource(REQUESTS, good=3.0))
    assert result["real"]["digit"] >= 97
    assert result["real"]["direction"] >= 99
    assert result["through_vae"]["psnr_db"] == pytest.approx(10 * np.log10(4 / 0.02**2), abs=0.5)


def test_psnr(scores: ModuleType) -> None:
    black = np.full((2, 1, 3, 4, 4), -1.0)
    assert scores.psnr(black + 0.2, black) == pytest.approx(20.0)  # 10 log10(4 / 0.04)


def test_table_names_command_and_every_row(scores: ModuleType) -> None:
    source = KnownSource(REQUESTS, good=3.0)
    experiment, best = scores.measure(source, REQUESTS, [3.0], scores.Settings(steps=7, scale=1.0), batch=12)
    report = {
        "command": "python x",
        "date": "2024-01-01",
        "cpu": "some cpu",
        "source": source.describe(),
        "samples": 12,
        "steps": 7,
        "time_shift": None,
        "scorers": {"clips": 3, "real": {"digit": 99.0, "direction": 100.0, "both": 99.0}},
        "best": best,
        "rows": experiment.rows,
    }
    text = scores.markdown(report)
    assert "`python x`" in text
    assert "some cpu" in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 1 + len(experiment.rows)
    marks = {row.mark for row in scores.sheet_rows(experiment, best)}
    assert "right" in marks


def test_missing_checkpoint_is_one_line(scores: ModuleType, tmp_path: Path) -> None:
    from stiv_deploy.stiv_ref.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no checkpoint here"):
        scores.open_source(tmp_path / "nothing", "onnxruntime", 1)
