"""What a checkpoint says that it was trained on: the tasks, givings, strides, sizes and frames of the stages so far."""

from collections.abc import Iterable, Sequence
from typing import Any

from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults, TrainedOn
from stiv_deploy.stiv_ref.data.open_source import strides_of
from stiv_deploy.stiv_ref.recipe import Recipe, Stage
from stiv_deploy.stiv_ref.tasks import TASKS, Task


def stage_strides(recipe: Recipe, stage: Stage) -> Sequence[int]:
    """Frame strides of ``stage``'s clips; stills have 1."""
    if stage.frames == 1:
        return (1,)
    return _each(stride for part in recipe.parts_of(stage.data).values() for stride in strides_of(part))


def trained_on(recipe: Recipe, number: int) -> TrainedOn:
    """What the model of stage ``number``, counted from 1, has seen: in the stages so far that are of its kind."""
    last = recipe.stages[number - 1]
    seen = [stage for stage in recipe.stages[:number] if stage.kind.video == last.kind.video]
    return TrainedOn(
        tasks=_each(task for stage in seen for task in recipe.tasks_of(stage)),
        givings=_each(name for stage in seen for kind in _kinds(recipe, stage) for name in kind.mix),
        strides=_each(stride for stage in seen for stride in stage_strides(recipe, stage)),
        sizes=_each(size for stage in seen for size in stage.sizes),
        frames=_each(stage.frames for stage in seen),
    )


def _kinds(recipe: Recipe, stage: Stage) -> list[Task]:
    _, *others = recipe.tasks_of(stage)
    return [stage.kind, *(TASKS[task] for task in others)]


def _each(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def sampling_of(recipe: Recipe, number: int) -> SamplingDefaults:
    """The recipe's sampling settings with a stride; stage ``number`` says which if the recipe does not.

    That is the smallest of its strides, for which most clips are long enough. Stills have 1.
    """
    strides = stage_strides(recipe, recipe.stages[number - 1])
    asked = recipe.sampling.stride if recipe.stages[number - 1].frames > 1 else None
    return recipe.sampling.model_copy(update={"stride": asked or min(strides)})
