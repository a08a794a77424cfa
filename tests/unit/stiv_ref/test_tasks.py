"""Tasks: each is a pattern of given frames, and there are no others."""

from typing import get_args

import pytest

from stiv_deploy.stiv_ref.tasks import TASKS, TaskName


def test_every_name_has_its_task() -> None:
    assert set(get_args(TaskName)) == set(TASKS)


@pytest.mark.parametrize(
    ("name", "frames", "given"),
    [
        ("t2i", 1, []),
        ("t2v", 6, []),
        ("ti2v", 6, [0]),
        ("predict", 6, [0, 1, 2, 3]),
        ("interpolate", 6, [0, 2, 4]),
        ("interpolate", 5, [0, 2, 4]),
    ],
)
def test_given_frames(name: TaskName, frames: int, given: list[int]) -> None:
    assert TASKS[name].given_frames(frames) == given
    assert TASKS[name].conditioned == bool(given)


@pytest.mark.parametrize(("name", "least"), [("t2i", 1), ("t2v", 2), ("ti2v", 2), ("predict", 5), ("interpolate", 2)])
def test_least_frames_leave_one_to_make(name: TaskName, least: int) -> None:
    task = TASKS[name]
    assert task.least_frames == least
    assert len(task.given_frames(least)) < least
    assert least - 1 < (2 if task.video else 1) or len(task.given_frames(least - 1)) == least - 1
