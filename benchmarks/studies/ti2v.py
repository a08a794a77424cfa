"""Mini TI2V models: every way of showing the image, and every image dropout, from the same T2V base.

The studies of image conditioning and of motion staleness share them; they are kept in ``out/studies/ti2v``.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import above  # noqa: F401  # isort: split
from base import Recipe, base, kept_or_made, train_with_notes
from ground import Ground
from harness import Adapt, Frozen, Training, as_is, carry_over, mini, video
from variants import ImageCrossStiv, LargeImageCrossStiv, by_both, by_cross_attention

from stiv_deploy.stiv_ref.model import Stiv

STEPS = 200


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train TI2V."""

    build: type[Stiv] = Stiv
    adapt: Adapt = as_is
    image_dropout: float = 0.1

    def training(self, ground: Ground, steps: int, batch: int) -> Training:
        """The training of this arm."""
        phase = video("ti2v", steps, image_dropout=self.image_dropout, batch=batch, size=ground.shape.size)
        return Training(phases=(phase,), stage=3)


ARMS = {
    "frame replacement": Arm(),
    "cross-attention": Arm(build=ImageCrossStiv, adapt=by_cross_attention),
    "cross-attention, large projection": Arm(build=LargeImageCrossStiv, adapt=by_cross_attention),
    "both": Arm(build=ImageCrossStiv, adapt=by_both),
    "no image dropout": Arm(image_dropout=0.0),
    "image dropout 0.5": Arm(image_dropout=0.5),
}


def arm_path(name: str, seed: int, training: Training, frozen: Frozen, recipe: Recipe, work: Path) -> Path:
    """Where the arm's weights are kept; another training or base is another file."""
    digest = hashlib.sha256(f"{training!r} {recipe.name(frozen)}".encode()).hexdigest()[:8]
    return work / "ti2v" / f"{name.replace(',', '').replace(' ', '-')}-{digest}-{seed}.safetensors"


def ti2v_model(
    name: str, seed: int, frozen: Frozen, recipe: Recipe, work: Path, *, steps: int, batch: int = 16
) -> Stiv:
    """The trained model of the arm ``name``, for evaluation."""
    arm = ARMS[name]
    training = arm.training(frozen.ground, steps, batch)

    def fresh() -> Stiv:
        model = mini(frozen.ground, seed=seed, build=arm.build)
        carry_over(base("t2v", seed, frozen, recipe, work), model)
        return model

    path = arm_path(name, seed, training, frozen, recipe, work)
    tensors = kept_or_made(path, lambda: train_with_notes(fresh(), training, frozen, seed, adapt=arm.adapt))
    model = mini(frozen.ground, seed=seed, build=arm.build)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)
