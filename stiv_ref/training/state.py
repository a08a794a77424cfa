"""The resumable state of a run: one format for one process and for many, only safetensors and JSON.

``state/`` holds shards written by ``torch.distributed.checkpoint``, each process its own part, and ``position.json``,
which is written last. Any number of processes can read it, also another one than wrote it. A process may be killed at
any moment: a state is written under another name, and the old one goes only when the new one has its place.
"""

import json
import shutil
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from stiv_deploy.stiv_ref.config import FrozenConfig, read_config
from stiv_deploy.stiv_ref.errors import CheckpointError, DivergedError
from stiv_deploy.stiv_ref.files import is_file
from stiv_deploy.stiv_ref.quiet import quiet
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.parallel import local
from stiv_deploy.stiv_ref.training.run import VAE_STAGE, Run
from stiv_deploy.stiv_ref.weights import check_finite, not_finite

STATE, PARTIAL, OLD = "state", "state.partial", "state.old"
POSITION = "position.json"
Tensors = dict[str, Tensor]


class Position(FrozenConfig):
    """Contents of ``position.json``: where the run is, by which recipe, and the sizes of the shards in bytes."""

    format: Literal["stiv-training-state"] = "stiv-training-state"
    format_version: Literal[1] = 1
    stage: int = Field(ge=0)
    step: int = Field(ge=0)
    processes: int = Field(gt=0)
    recipe: Recipe
    base: str | None = None
    """Hash of the checkpoint that a LoRA is trained of."""
    files: dict[str, int]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stage > len(self.recipe.stages):
            raise ValueError(f"stage {self.stage} is not in its recipe")
        return self


def find_state(out: Path) -> Path | None:
    """The folder of the newest whole state of the run in ``out``, ``None`` if there is none yet."""
    return next((out / name for name in (STATE, OLD) if is_file(out / name / POSITION)), None)


def check_trained(run: Run) -> None:
    """:class:`DivergedError`, in all processes together, if anything that is trained is not finite."""
    if not run.team.any(bool(not_finite({name: local(tensor) for name, tensor in run.tensors().items()}))):
        return
    what = "the VAE" if run.stage == VAE_STAGE else f"stage {run.stage} ({run.current.name})"
    raise DivergedError(
        f"the weights of {what} are not finite after step {run.step - 1}; the last saved state is kept. Lower "
        "learning_rate in the recipe and train into another --out"
    )


def save_state(run: Run) -> None:
    """Write the state of ``run``; all processes must call it together.

    Raises :class:`DivergedError`, and keeps the state that there is, where a value is not finite.
    """
    check_trained(run)
    partial = run.out / PARTIAL
    if run.team.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    run.team.barrier()
    try:
        _write_shards(run, partial)
        run.team.barrier()
        if run.team.first:
            _write_position(run, partial)
            replace_state(run.out)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    run.team.barrier()


def _write_shards(run: Run, partial: Path) -> None:
    """This process's part of the state; ``OSError`` if it cannot be written."""
    try:
        with quiet("torch.distributed.checkpoint"):  # it remarks on a single process
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            save(dict(run.tensors()), storage_writer=writer, no_dist=run.team.world == 1)
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        raise (first if isinstance(first, OSError) else OSError(str(first))) from None


def _write_position(run: Run, partial: Path) -> None:
    position = Position(
        stage=run.stage,
        step=run.step,
        processes=run.team.world,
        recipe=run.recipe,
        base=run.base,
        files={file.name: file.stat().st_size for file in sorted(partial.iterdir())},
    )
    (partial / POSITION).write_text(json.dumps(position.model_dump(mode="json"), indent=1), encoding="utf-8")


def replace_state(out: Path) -> None:
    """Put the whole ``state.partial`` into the place of ``state``: after every single operation one can be found."""
    if (out / STATE).exists():
        shutil.rmtree(out / OLD, ignore_errors=True)
        (out / STATE).rename(out / OLD)
    (out / PARTIAL).rename(out / STATE)
    shutil.rmtree(out / OLD, ignore_errors=True)


def read_position(folder: Path) -> Position:
    """Where the state in ``folder`` is; :class:`CheckpointError` unless all its shards are there in full length."""
    position = read_config(Position, folder / POSITION)
    for name, size in position.files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes of {size}"
            raise CheckpointError(
                f"{folder}: the state is damaged, {name} {what}; restore it, or delete the folder to start anew"
            )
    return position


def load_tensors_into(tensors: Tensors, folder: Path, *, alone: bool) -> None:
    """Fill ``tensors`` in place from the state in ``folder``; raises :class:`CheckpointError`.

    ``alone``: this process reads without the others.
    """
    try:
        with quiet("torch.distributed.checkpoint"):  # it remarks on a single process
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=alone)
    except (CheckpointException, SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder}: the state cannot be read ({reason}); delete the folder to start anew"
        ) from None


def load_state(run: Run, folder: Path) -> None:
    """Fill the components of ``run``, which is in the right stage, from ``folder``; all processes together."""
    tensors = run.tensors()
    load_tensors_into(tensors, folder, alone=run.team.world == 1)
    remedy = "it has diverged; delete the folder to start anew"
    check_finite({name: local(tensor) for name, tensor in tensors.items()}, folder, remedy)


FREE = ("threads", "save_every", "logging", "efficiency", "sampling")
"""What of a recipe may change from one start to the next: nothing of it changes what is computed."""


def _maths(recipe: Recipe, begun: int) -> dict[str, Any]:
    """``recipe`` without what may change when it goes on from its stage ``begun``, counted from 1; 0 is the VAE's."""
    kept = recipe.model_dump(mode="json", exclude=set(FREE))
    stages = kept["stages"][: max(1, begun)]  # the VAE is trained on the data of the first, or on its own
    named = [stage["data"] for stage in stages] + [kept["vae"].get("data") or stages[0]["data"]]
    data = {part: kept["data"][part] for name in named for part in (name, *recipe.parts_of(name))}
    return {**kept, "data": data, "stages": stages, "precision": recipe.efficiency.precision}


def _first_difference(there: Any, here: Any, where: str = "") -> str:
    """Name and values of the first leaf in which two recipes differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        return _first_difference(there.get(names[0]), here.get(names[0]), f"{where}.{names[0]}" if where else names[0])
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        number = next(index for index, pair in enumerate(zip(there, here, strict=True)) if pair[0] != pair[1])
        return _first_difference(there[number], here[number], f"{where}.{number}")
    return f"{where} is {str(there)[:60]} there, {str(here)[:60]} here"


def check_recipe(position: Position, recipe: Recipe, folder: Path) -> None:
    """:class:`CheckpointError` unless the state was trained by ``recipe``.

    Stages that it has not come to may differ, and so may what is :data:`FREE`: threads, logging, how often it is saved,
    micro-batches and other switches that only change speed, and how the result is sampled from.
    """
    there, here = (_maths(each, position.stage) for each in (position.recipe, recipe))
    if there != here:
        raise CheckpointError(
            f"{folder}: this state belongs to another recipe; choose another --out or delete it "
            f"({_first_difference(there, here)})"
        )
