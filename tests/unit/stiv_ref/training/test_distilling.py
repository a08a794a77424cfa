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
    """``recipe`` with its last stage, and a stage that distills that one."""
    values = recipe.model_dump()
    first = {**recipe.stages[-1].model_dump(), "steps": 2}
    last = {**first, "name": "student", "steps": 3, "distill": "guidance", "guidance": [2.0, 6.0], **changes}
    return Recipe.model_validate({**values, "stages": [first, last]})


@pytest.fixture(scope="module")
def _student_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("student") / "run"


@pytest.fixture
def student_run(_student_run: Path, recipe: Recipe) -> Path:
    """A finished run whose last stage distills, made once; do not write into it."""
    if not (_student_run / "checkpoint").exists():
        train(TrainRequest(recipe=distilled(recipe), out=_student_run))
    return _student_run


def test_a_stopped_run_goes_on_bit_by_bit(
    student_run: Path, recipe: Recipe, tmp_path: Path, runs: Any, before_step: Callable[..., None]
) -> None:
    """Although its teacher's checkpoint is gone by then."""
    out = tmp_path / "run"
    before_step((2, 2), runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(TrainRequest(recipe=distilled(recipe), out=out))
    (gone,) = (out / "stages").iterdir()
    gone.rename(tmp_path / "elsewhere")
    train(TrainRequest(recipe=distilled(recipe), out=out))
    (tmp_path / "elsewhere").rename(gone)
    runs.assert_same(out, student_run)


def test_only_the_student_is_trained(student_run: Path, recipe: Recipe) -> None:
    teacher, student = (load_checkpoint(student_run / "stages" / each.name) for each in distilled(recipe).stages)
    assert (teacher.config.model.student, student.config.model.student) == (None, Student(guidance=(2.0, 6.0)))
    same = zip(teacher.text_encoder.parameters(), student.text_encoder.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in same)
    assert not torch.equal(teacher.model.patch.weight, student.model.patch.weight)
    assert student.model.singleton.guidance.outer.weight.abs().max() > 0
    check_student(student.config.model.student, settings_of(student.config.sampling))


@pytest.mark.parametrize(("distill", "said"), [("guidance", "its guidance is distilled already"), (None, "a student")])
def test_a_students_folder_is_no_origin(student_run: Path, recipe: Recipe, distill: str | None, said: str) -> None:
    origin = {"spatial_from": str(student_run / "checkpoint"), "distill": distill}
    guidance = {"guidance": [2.0, 6.0] if distill else None}
    stage = Stage.model_validate({**recipe.stages[-1].model_dump(), **origin, **guidance})
    alone = Recipe.model_validate({**recipe.model_dump(), "stages": [stage.model_dump()]})
    with pytest.raises(CheckpointError, match=said):
        check_origins(alone)
    assert open_checkpoint(student_run / "checkpoint").config.trained is not None
