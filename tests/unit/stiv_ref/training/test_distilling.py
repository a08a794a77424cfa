"""Stages that distill: a frozen teacher, a frozen text encoder, and a run that goes on bit by bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint, open_checkpoint
from stiv_deploy.stiv_ref.config import Student
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.generation import settings_of
from stiv_deploy.stiv_ref.recipe import Recipe, Stage
from stiv_deploy.stiv_ref.sampler import check_student
from stiv_deploy.stiv_ref.training.stages import check_origins
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train


def distilled(recipe: Recipe, **changes: Any) -> Recipe:
    """``recipe`` with its last stage, a stage that distills that one, and its flow map."""
    values = recipe.model_dump()
    first = {**recipe.stages[-1].model_dump(), "steps": 2}
    second = {**first, "name": "student", "steps": 3, "distill": "guidance", "guidance": [2.0, 6.0], **changes}
    third = {**second, "name": "map", "distill": "flow-map", "guidance": None}
    return Recipe.model_validate({**values, "stages": [first, second, third]})


@pytest.fixture(scope="module")
def _student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("student") / "run"


@pytest.fixture
def student_run(_student_run: Path, recipe: Recipe) -> Path:
    """A finished run whose last stage distills, made once; do not write into it."""
    if not (_student_run / "checkpoint").exists():
        train(TrainRequest(recipe=distilled(recipe), out=_student_run))
    return _student_run


@pytest.mark.parametrize("stage", [2, 3])
def test_a_stopped_run_goes_on_bit_by_bit(
    student_run: Path, recipe: Recipe, tmp_path: Path, runs: Any, before_step: Callable[..., None], stage: int
) -> None:
    """Although its teacher's checkpoint is gone by then."""
    out = tmp_path / "run"
    before_step((stage, 2), runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(TrainRequest(recipe=distilled(recipe), out=out))
    gone = out / "stages" / distilled(recipe).stages[stage - 2].name
    gone.rename(tmp_path / "elsewhere")
    train(TrainRequest(recipe=distilled(recipe), out=out))
    (tmp_path / "elsewhere").rename(gone)
    runs.assert_same(out, student_run)


def test_only_the_student_is_trained(student_run: Path, recipe: Recipe) -> None:
    names = [stage.name for stage in distilled(recipe).stages]
    teacher, student, flow_map = (load_checkpoint(student_run / "stages" / name) for name in names)
    assert (teacher.config.model.student, student.config.model.student) == (None, Student(guidance=(2.0, 6.0)))
    assert flow_map.config.model.teacher == student.config.model
    assert flow_map.model.singleton.target_time.outer.weight.abs().max() > 0
    same = zip(teacher.text_encoder.parameters(), student.text_encoder.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    assert not torch.equal(teacher.model.patch.weight, student.model.patch.weight)
    assert student.model.singleton.guidance.outer.weight.abs().max() > 0
    check_student(student.config.model.student, settings_of(student.config.sampling))


@pytest.mark.parametrize(
    ("origin", "distill", "scales", "said"),
    [
        ("stages/student", "guidance", [2.0, 6.0], "its guidance is distilled already"),
        ("stages/student", None, None, "it is a student"),
        ("stages/student", "flow-map", [3.0, 6.0], "its guidance scales are 2 to 6, the stage has 3 to 6"),
        ("stages/2-ti2v", "flow-map", [2.0, 6.0], "its guidance takes rows of its own; distill it first"),
        ("checkpoint", "flow-map", [2.0, 6.0], "it is a flow map already"),
    ],
)
def test_folders_that_a_stage_cannot_start_from(
    student_run: Path, recipe: Recipe, origin: str, distill: str | None, scales: list[float] | None, said: str
) -> None:
    changes = {"spatial_from": str(student_run / origin), "distill": distill, "guidance": scales}
    stage = Stage.model_validate({**recipe.stages[-1].model_dump(), **changes})
    alone = Recipe.model_validate({**recipe.model_dump(), "stages": [stage.model_dump()]})
    with pytest.raises(CheckpointError, match=said):
        check_origins(alone)
    assert open_checkpoint(student_run / "checkpoint").config.trained is not None
