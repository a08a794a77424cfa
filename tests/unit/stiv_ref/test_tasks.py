"""Tasks: each is a mix of givings, and there are no others."""

from typing import get_args

import pytest
import torch

from stiv_deploy.stiv_ref.tasks import MIX, TASKS, Task, TaskName


def test_every_name_has_its_task() -> None:
    assert set(get_args(TaskName)) == {*TASKS, MIX}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_shares_add_up(task: Task) -> None:
    assert sum(task.mix.values()) == pytest.approx(1)
    assert set(task.givings) == set(task.mix)


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("t2i", [[]]),
        ("t2v", [[]]),
        ("ti2v", [[0]]),
        ("views", [[0]]),
        ("predict", [[0, 1, 2, 3]]),
        ("interpolate", [[0, 2, 4]]),
        ("keyframes", [[0], [0, 5]]),
    ],
)
def test_given_frames(name: str, given: list[list[int]]) -> None:
    task = TASKS[name]
    masks = [task.shown(number, 6).nonzero().flatten().tolist() for number in range(2 * len(given))]
    assert masks == given * 2
    drawn = {
        tuple(task.draw(6, torch.Generator().manual_seed(seed)).nonzero().flatten().tolist()) for seed in range(40)
    }
    assert drawn == {tuple(each) for each in given}
    assert task.conditioned == any(given)


def test_all_shows_every_giving_and_a_random_one_stays_the_same() -> None:
    first, again = ([TASKS["all"].shown(number, 6).tolist() for number in range(6)] for _ in range(2))
    assert first == again
    assert [sum(each) for each in first[:5]] == [0, 1, 4, 3, 2]
    assert 0 < sum(first[5]) < 6


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("t2i", 1),
        ("t2v", 2),
        ("ti2v", 2),
        ("predict", 5),
        ("interpolate", 2),
        ("keyframes", 3),
        ("views", 2),
        ("all", 5),
    ],
)
def test_least_frames_leave_one_to_make(name: str, least: int) -> None:
    assert TASKS[name].least_frames == least
