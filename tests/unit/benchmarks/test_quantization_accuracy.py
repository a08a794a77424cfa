"""The comparison of precisions: what it counts, what it keeps, what it writes."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.stiv_ref.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[3]
BENCHMARKS, CHECKPOINTS = ROOT / "benchmarks", ROOT / "checkpoints"
NAMES = ("quantization_accuracy", "trajectories", "precisions", "exams")
JUDGED = ("digit", "direction", "both")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def accuracy(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["quantization_accuracy"]


@pytest.fixture(scope="module")
def trajectories(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["trajectories"]


def errors(size: float) -> dict[str, Any]:
    return {"times": [0.0, 0.5], "velocity": [size, size], "latents": [size, size], "bands": {"0-0.1": size}}


def row(name: str, verdicts: list[list[bool]], size: float = 0.1) -> dict[str, Any]:
    columns = zip(JUDGED, zip(*verdicts, strict=True), strict=True)
    scores = {name: round(100 * sum(flags) / len(flags), 1) for name, flags in columns} | {"verdicts": verdicts}
    return {
        "name": name,
        "how": "somehow",
        "best_scale": 2.0,
        "t2v": {"2": scores},
        "ti2v": {"2": scores},
        "errors": {task: errors(size) for task in ("t2v", "ti2v")},
        "seconds": 1.0,
    }


RIGHT, WRONG_DIGIT, WRONG_WAY = [True, True, True], [False, True, False], [True, False, False]
BASE = [*[RIGHT] * 97, *[WRONG_DIGIT] * 3]


def test_points_are_differences_and_changed_counts_clips_either_way(accuracy: ModuleType) -> None:
    other = [WRONG_WAY, WRONG_DIGIT, *[RIGHT] * 95, *[WRONG_DIGIT] * 2, RIGHT]
    found = accuracy.compared(row("fp8", other), row("fp32", BASE), "t2v", JUDGED)
    assert found["digit"] == {"percent": 97.0, "points": 0.0, "changed": 2, "chance": 1.4}
    assert found["direction"] == {"percent": 99.0, "points": -1.0, "changed": 1, "chance": 1.0}
    assert found["both"] == {"percent": 96.0, "points": -1.0, "changed": 3, "chance": 1.7}


@pytest.mark.parametrize(("lost", "within"), [(0, True), (2, True), (3, False)])
def test_within_2_points_of_fp32(accuracy: ModuleType, lost: int, within: bool) -> None:
    rows = [row("fp32", BASE), row("fp8", [*[WRONG_WAY] * lost, *BASE[lost:]]), row("fp8 everything", BASE)]
    found = accuracy.within(rows, JUDGED)
    assert found["fp8"]["t2v"] == found["fp8"]["ti2v"] == {"digit": True, "direction": within, "both": within}
    assert "fp8 everything" not in found


def test_best_scale_is_the_smallest_of_equals(accuracy: ModuleType) -> None:
    assert accuracy.best_scale({"2": {"both": 99.0}, "4": {"both": 99.0}, "6": {"both": 98.0}}, "both") == 2.0


def test_what_a_prompt_leaves_open_is_not_counted(accuracy: ModuleType) -> None:
    verdicts = [[True, None], [False, None], [True, False]]
    assert accuracy.percentages(("colour", "motion"), verdicts) == {"colour": 66.7, "motion": 0.0}
    scored = ([[None], [True], [False]], 50.0), ([[None], [False], [False]], 0.0)
    mine, base = (
        {"best_scale": 2.0, "t2v": {"2": {"m": percent, "verdicts": verdicts}}} for verdicts, percent in scored
    )
    assert accuracy.compared(mine, base, "t2v", ("m",)) == {
        "m": {"percent": 50.0, "points": 50.0, "changed": 1, "chance": 50.0}
    }


def test_the_exam_is_in_what_the_checkpoint_was_trained_on(benchmarks: dict[str, ModuleType]) -> None:
    for name, kind in (("world", "WorldExam"), ("tiny", "DigitExam")):
        folder = CHECKPOINTS / name
        exam = benchmarks["exams"].exam_of(folder, load_checkpoint(folder).config.sampling, 2)
        assert type(exam).__name__ == kind
        assert len(exam.prompts) == len(exam.first_frames) == 2
        assert -1 <= exam.first_frames.min() <= exam.first_frames.max() <= 1


def test_true_clips_of_the_world_pass_its_exam(benchmarks: dict[str, ModuleType]) -> None:
    exams = benchmarks["exams"]
    sampling = load_checkpoint(CHECKPOINTS / "world").config.sampling
    exam = exams.exam_of(CHECKPOINTS / "world", sampling, 4)
    truth = exams.as_video(np.stack([clip.frames for clip in exam.clips]))
    assert all(flag is not False for verdict in exam.verdicts(truth, image=True) for flag in verdict)
    assert not any(verdict[-1] for verdict in exam.verdicts(truth[::-1], image=False))


def test_parts_are_kept_and_belong_to_their_run(accuracy: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert accuracy.kept(work, "fp8 everything", "run") is None
    accuracy.keep(work, "fp8 everything", "run", {"a": 1})
    assert accuracy.kept(work, "fp8 everything", "run") == {"a": 1}
    assert accuracy.kept(work, "fp8 everything", "another run") is None
    assert accuracy.kept(work, "fp8", "run") is None


def test_fp32_is_always_run_and_unknown_precisions_are_refused(accuracy: ModuleType) -> None:
    assert accuracy.chosen_names("int8,fp8 everything") == ["fp32", "int8", "fp8 everything"]
    assert accuracy.chosen_names(None)[0] == "fp32"
    with pytest.raises(RequestError, match="--only fp4: no such precision; there are: fp32, bf16"):
        accuracy.chosen_names("fp4")


def test_table_has_the_command_and_a_row_for_every_precision(accuracy: ModuleType) -> None:
    report = {
        "command": "python x",
        "date": "2024-01-01",
        "cpu": "some cpu",
        "checkpoint": "c" * 64,
        "scales": {"fp8": "a" * 64, "int8": "b" * 64},
        "samples": 100,
        "prompts": "balanced prompts",
        "judged": JUDGED,
        "steps": 30,
        "solver": "euler",
        "rows": [row("fp32", BASE), row("int8", [WRONG_WAY, *BASE[1:]], 0.25)],
    }
    text = accuracy.markdown(report)
    assert "`python x`" in text
    assert "| int8 | 97 (+0 ± 0) | 99 (-1 ± 1) | 96 (-1 ± 1) |" in text
    assert "| int8 | 2.5e-01 | 2.5e-01 |" in text
    json.dumps(accuracy.within(report["rows"], JUDGED))


def test_errors_of_a_band_are_of_its_steps_together(trajectories: ModuleType) -> None:
    want = [torch.tensor([3.0]), torch.tensor([4.0]), torch.tensor([1.0])]
    got = [torch.tensor([3.5]), torch.tensor([4.5]), torch.tensor([1.0])]
    found = trajectories.by_band(got, want, [0.02, 0.05, 0.8])
    assert found == {"0-0.1": pytest.approx(0.5**0.5 / 5), "0.75-1": 0.0}


def test_the_truth_against_itself_in_float32_is_off_by_rounding(
    benchmarks: dict[str, ModuleType], checkpoint: Path
) -> None:
    from stiv_deploy.stiv_ref.sampler import SamplingSettings

    loaded, trajectories = load_checkpoint(checkpoint), benchmarks["trajectories"]
    clips = trajectories.Clips(prompts=["digit one moving up"], seeds=range(1), images=None)
    settings = SamplingSettings(steps=2, guidance_scale=2.0)
    truth = trajectories.true_run(benchmarks["precisions"].exact(loaded), clips, settings)
    found = trajectories.measure(loaded, truth)
    assert all(0 < value < 1e-4 for value in (*found["velocity"], *found["latents"]))
    half = trajectories.measure(benchmarks["precisions"].cast_to(loaded, "bf16"), truth)
    assert all(1e-3 < value < 0.2 for value in half["velocity"])


def test_plot_of_every_precision(trajectories: ModuleType, benchmarks: dict[str, ModuleType], tmp_path: Path) -> None:
    found = {name: {task: errors(0.1) for task in ("t2v", "ti2v")} for name in benchmarks["precisions"].NAMES}
    trajectories.plot(found, tmp_path / "errors.png")
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["errors.png"]
