"""The base checkpoints that the studies start from: mini T2I and mini T2V, one pair per seed.

    python benchmarks/studies/base.py [--ground world] [--seeds 0,1,2]

T2I learns stills; T2V starts from its weights (new temporal attention at zero gate) and learns 8 frames. Kept in
``out/studies/base``, those of the world in ``out/studies/world/base``, as safetensors with what they were trained by;
made when a study first needs them.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import above  # noqa: F401  # isort: split
import command
import torch
import typer
from ground import Ground
from grounds import DIGITS, Stand, folder_of
from harness import Frozen, Training, carry_over, frozen_parts, mini, t2i, train, video
from records import WORK, seeds_of
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stiv_deploy.stiv_ref.files import replaced_file
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.weights import load_tensors

TIME_SHIFTS = (20.0, 3.0)
"""Of the two halves of T2V."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the bases are trained."""

    t2i: Training
    t2v: Training

    def name(self, frozen: Frozen) -> str:
        """Hash over the recipe and the frozen parts: another recipe is another base."""
        return hashlib.sha256(f"{self!r} {frozen.hash}".encode()).hexdigest()[:8]


def recipe_on(ground: Ground, *, smallest: bool = False) -> Recipe:
    """The recipe of the bases of ``ground``; or a few steps."""
    size = ground.shape.size
    if smallest:
        images, videos = t2i(2, batch=4, size=size), (video("t2v", 2, batch=2, size=size),)
    else:
        images, videos = t2i(700, size=size), tuple(video("t2v", 400, time_shift=s, size=size) for s in TIME_SHIFTS)
    return Recipe(t2i=Training(phases=(images,), stage=1), t2v=Training(phases=videos, stage=2))


def kept_or_made(path: Path, make: Any) -> dict[str, Tensor]:
    """Weights in ``path``; if it is not there, those that ``make`` returns with its notes, written whole."""
    if not path.is_file():
        tensors, notes = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with replaced_file(path) as temporary:
            save_file(whole, temporary, {"notes": json.dumps(notes)})
    return load_tensors(path)


def notes_of(path: Path) -> dict[str, Any]:
    """What is noted beside the weights: losses and seconds."""
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("notes", "{}"))


def file_digest(path: Path) -> str:
    """First 12 hex digits of the file's SHA-256."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def base_path(task: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path) -> Path:
    """Where the base is kept."""
    return work / "base" / f"{task}-{recipe.name(frozen)}-{seed}.safetensors"


def train_with_notes(
    model: Stiv, training: Training, frozen: Frozen, seed: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train ``model``: its averaged weights, and losses and seconds."""
    started = time.perf_counter()
    losses = train(model, training, frozen, seed, **options)
    notes = {"losses": [round(loss, 5) for loss in losses], "seconds": round(time.perf_counter() - started, 1)}
    return dict(model.state_dict()), notes


def base(task: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path) -> dict[str, Tensor]:
    """Weights of the base ``task`` ('t2i' or 't2v') of ``seed``."""

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        if task == "t2i":
            return train_with_notes(mini(frozen.ground, temporal=False, seed=seed), recipe.t2i, frozen, seed)
        model = mini(frozen.ground, seed=seed)
        carry_over(base("t2i", seed, frozen, recipe, work), model)
        return train_with_notes(model, recipe.t2v, frozen, seed)

    return kept_or_made(base_path(task, seed, frozen, recipe, work), make)


def base_model(seed: int, frozen: Frozen, recipe: Recipe, work: Path) -> Stiv:
    """The T2V base of ``seed``, for evaluation."""
    model = mini(frozen.ground, seed=seed)
    model.load_state_dict(base("t2v", seed, frozen, recipe, work))
    return model.eval().requires_grad_(False)


def base_name(task: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path) -> str:
    """File name and hash of a base, for a result file."""
    path = base_path(task, seed, frozen, recipe, work)
    return f"{path.name} {file_digest(path)}"


def main(
    seeds: Annotated[str, typer.Option(help="Seeds, with commas.")] = "0,1,2",
    smallest: Annotated[bool, typer.Option(help="A few steps: shows that it runs.")] = False,
    ground: Stand = DIGITS,
    work: Annotated[Path, typer.Option(help="Folder of finished parts.")] = WORK,
) -> None:
    """Train the base checkpoints of all studies."""
    torch.set_num_threads(1)
    frozen = frozen_parts(ground)
    recipe, work = recipe_on(frozen.ground, smallest=smallest), folder_of(frozen.ground, work)
    for seed in seeds_of(seeds):
        for task in ("t2i", "t2v"):
            base(task, seed, frozen, recipe, work)
            path = base_path(task, seed, frozen, recipe, work)
            notes = notes_of(path)
            last = notes["losses"][-50:]
            typer.echo(f"{path.name} {file_digest(path)}: loss {sum(last) / len(last):.4f}, {notes['seconds']:.0f} s")


if __name__ == "__main__":
    command.run(main)
