"""Tasks: every set of given frames has a name, and the reference's patterns have their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.pipeline.tasks import TASKS, giving_frames, task_of
from stiv_deploy.stiv_ref import tasks as reference
from stiv_deploy.stiv_ref.givings import giving


@pytest.mark.parametrize(
    ("shown", "frames", "name"),
    [
        ([], 1, "t2i"),
        ([], 8, "t2v"),
        ([0], 8, "ti2v"),
        ([0], 1, "ti2v"),
        ([1, 0], 8, "predict"),
        ([0, 1, 2, 3], 8, "predict"),
        ([0, 7], 8, "interpolate"),
        ([4, 0, 2, 6], 8, "interpolate"),
        ([0, 1, 7], 8, "interpolate"),
        ([7], 8, "frames"),
        ([2, 3], 8, "frames"),
    ],
)
def test_task_of_given_frames(shown: list[int], frames: int, name: str) -> None:
    assert task_of(shown, frames).name == name


@given(frames=st.integers(1, 12), data=st.data())
def test_leading_tasks_are_given_the_beginning_and_nothing_else(frames: int, data: st.DataObject) -> None:
    shown = data.draw(st.sets(st.integers(0, frames - 1)))
    assert task_of(shown, frames).leading == (shown == set(range(len(shown))))


@pytest.mark.parametrize("name", ["t2i", "t2v", "ti2v", "predict", "interpolate"])
def test_what_the_reference_trains_for_has_the_same_name(name: str) -> None:
    task = reference.TASKS[name]
    frames = 9 if task.video else 1
    assert task_of(task.shown(0, frames).nonzero().flatten().tolist(), frames).name == name


@given(frames=st.integers(1, 12), number=st.integers(2, 14))
def test_givings_give_what_the_reference_gives(frames: int, number: int) -> None:
    unused = torch.Generator()
    for name in ("none", "first", "ends", f"first {number}", f"every {number}"):
        assert giving_frames(name, frames) == giving(name).frames(frames, unused)
    assert giving_frames("random", frames) is None


def test_names_differ_and_the_last_fits_everything() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS)
    assert all(TASKS[-1].fits(shown, 4) for shown in ([], [0], [3], [0, 3]))
