"""A training run in memory: everything that training changes, and where it is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from stiv_deploy.stiv_ref.checkpoint import AnyVae, finite
from stiv_deploy.stiv_ref.checkpoint import load_vae as load_checkpoint_vae
from stiv_deploy.stiv_ref.files import replaced_file, write_text
from stiv_deploy.stiv_ref.lora import is_factor
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.pretrained.vae import load_pretrained_vae
from stiv_deploy.stiv_ref.recipe import FrozenVae, Recipe, Stage, TrainedVae
from stiv_deploy.stiv_ref.text import load_tokenizer
from stiv_deploy.stiv_ref.training.averages import Averages
from stiv_deploy.stiv_ref.training.optimizer import moments
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.text_conditions import TextConditions, make_text
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig
from stiv_deploy.stiv_ref.weights import fill, load_tensors, save_tensors

VAE_STAGE = 0
"""Stages are numbered from 1; 0 is the training of the VAE."""
VAE_FILE, TOKENIZER_FILE = "vae.safetensors", "tokenizer.json"


@dataclass(kw_only=True)
class Run:
    """Components of the running stage, sharded over ``team``: what :mod:`~stiv_deploy.stiv_ref.training.state` stores.

    In stage 0 there is no ``model`` yet and the optimizer is that of the VAE. ``teacher`` is what a stage that distills
    learns from: frozen, and part of the state, so that it is the same to the end whatever becomes of its checkpoint. So
    are the weights of the model that a LoRA is trained of; ``base`` is the hash of their checkpoint.
    """

    recipe: Recipe
    out: Path
    team: Team
    text: TextConditions
    vae: AnyVae
    model: Stiv | None = None
    teacher: Stiv | None = None
    base: str | None = None
    stage: int = VAE_STAGE
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None
    averages: Averages = field(default_factory=dict)

    @property
    def current(self) -> Stage:
        """The recipe's words for the running stage."""
        return self.recipe.stages[self.stage - 1]

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What the running stage trains."""
        if self.stage == VAE_STAGE:
            return {"vae": self.vae}
        assert self.model is not None
        return {"model": self.model, **({"text_encoder": self.text.encoder} if self.text.trained else {})}

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: of a LoRA its factors."""
        every = self._every_parameter()
        return every if self.recipe.lora is None else {name: each for name, each in every.items() if is_factor(name)}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """What a LoRA leaves of its model, by name; of any other training nothing."""
        if self.recipe.lora is None:
            return {}
        return {name: each.detach() for name, each in self._every_parameter().items() if not is_factor(name)}

    def _every_parameter(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": each for part, module in self.modules.items() for name, each in module.named_parameters()
        }

    def tensors(self) -> dict[str, Tensor]:
        """All that a later process needs to go on, by name; writing to them changes the run."""
        assert self.optimizer is not None
        parameters = self.parameters
        teacher = {} if self.teacher is None else dict(self.teacher.named_parameters())
        return {
            **{f"teacher.{name}": parameter.detach() for name, parameter in teacher.items()},
            **{f"base.{name}": weight for name, weight in self.frozen.items()},
            **{f"weights.{name}": parameter.detach() for name, parameter in parameters.items()},
            **{f"ema.{name}": average for name, average in self.averages.items()},
            **{f"optimizer.{name}": value for name, value in moments(self.optimizer, parameters).items()},
        }


def make_vae(recipe: Recipe, device: torch.device) -> AnyVae:
    """The frozen VAE that the recipe names, or a new one to be trained, initialized from the recipe's seed."""
    if isinstance(recipe.vae, FrozenVae):
        pretrained = recipe.vae.kind == "pretrained"
        vae: AnyVae = load_pretrained_vae(recipe.vae.path) if pretrained else load_checkpoint_vae(recipe.vae.path)
        return vae.to(device).eval().requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = VaeConfig(latent_channels=recipe.vae.latent_channels, channels=recipe.vae.channels)
        return Vae(config).to(device)


def save_vae(run: Run) -> None:
    """Write the trained VAE, which no later stage changes, to the run's folder."""
    with replaced_file(run.out / VAE_FILE) as temporary:
        save_tensors(finite(run.vae.cpu(), torch.float32, "the trained VAE"), temporary)


def load_vae(run: Run) -> None:
    """Read and freeze what :func:`save_vae` wrote, if this run trains its VAE.

    Raises :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`.
    """
    if isinstance(run.recipe.vae, TrainedVae):
        fill(run.vae, load_tensors(run.out / VAE_FILE), run.out / VAE_FILE)
    run.vae.to(run.team.device).eval().requires_grad_(False)


def new_run(recipe: Recipe, out: Path, team: Team, words: Sequence[str], *, resumed: bool = False) -> Run:
    """A run at its very start, or one that is about to be ``resumed``: then its words are those that it began with."""
    tokenizer = load_tokenizer(out / TOKENIZER_FILE) if resumed else None
    text = make_text(recipe, words, tokenizer, team.device)
    return Run(recipe=recipe, out=out, team=team, text=text, vae=make_vae(recipe, team.device))


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Keep the words of the run: its data may have others when it is resumed."""
    write_text(out / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
