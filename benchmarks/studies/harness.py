"""A compact training loop that all studies share: AdamW, warm-up and cosine, EMA, every draw fixed by a seed.

The *mini* model (4 blocks, width 96, 1.06 M parameters) learns in the latent space of the checkpoint of a *ground*
(``grounds.py``: moving digits, or the drawn world), whose text encoder and VAE stay frozen, as the paper's pretrained
encoders do. Arms of a study get the same data, noise, times and dropouts: they differ in what the study asks about and
in nothing else.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from ground import FRAMES, Ground, Shape
from grounds import DIGITS, GroundName, ground_of
from torch import Tensor, nn

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.data.buckets import micro_conditions
from stiv_deploy.stiv_ref.digit_canvas import SIZE
from stiv_deploy.stiv_ref.errors import DivergedError
from stiv_deploy.stiv_ref.generation import settings_of
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import Objective, draw, drop_text, sample_generator, training_loss
from stiv_deploy.stiv_ref.sampler import SamplingSettings
from stiv_deploy.stiv_ref.text import TextStates, tokenize
from stiv_deploy.stiv_ref.vae import Vae

MINI = StivConfig(
    name="mini", blocks=4, width=96, heads=3, text_width=96, base_frames=FRAMES, base_grid=(4, 4), rope_theta=100.0
)
TOKEN = 8
"""Pixels of a token each way: a 4x VAE, a 2x patch."""
IMAGE_COST = 0.8
"""Work of an image token against a video token: 16 D^2 against 20 D^2 multiplications a block."""
MINI_SAYS = "Mini model (4 blocks, width 96)"

Adapt = Callable[[Stiv, TextStates, Tensor, Tensor], tuple[TextStates, Tensor]]
"""How an arm shows the image: (model, text, clean latents [B, T, C, h, w], given bool [B, T]) -> (text, frames that are
replaced in the model's input, bool [B, T])."""
Batch = tuple[Tensor, TextStates, Tensor]
"""Latents [B, T, C, h, w], text states, micro-conditions [B, 6]."""


def as_is(model: Stiv, text: TextStates, clean: Tensor, given: Tensor) -> tuple[TextStates, Tensor]:
    """Frame replacement, the model's own way."""
    return text, given


@dataclass(frozen=True)
class Frozen:
    """What is frozen: the checkpoint of a ground, for its text encoder and VAE, and captions that it has encoded."""

    ground: Ground
    checkpoint: Checkpoint
    known: dict[str, TextStates] = field(default_factory=dict)

    @property
    def vae(self) -> Vae:
        """The checkpoint's."""
        return self.checkpoint.vae

    @property
    def hash(self) -> str:
        """First 12 hex digits of the checkpoint's hash."""
        return self.checkpoint.sha256[:12]

    def sampling(self, steps: int) -> SamplingSettings:
        """The checkpoint's own settings, in ``steps`` steps."""
        return replace(settings_of(self.checkpoint.config.sampling), steps=steps)

    def text(self, captions: Sequence[str]) -> TextStates:
        """Text states [B, L, Dt] of ``captions``, L that of the ground's longest; each is encoded once."""
        new = [one for one in dict.fromkeys(captions) if one not in self.known]
        if new:
            self.known.update(zip(new, map(TextStates._make, zip(*self._encoded(new), strict=True)), strict=True))
        return TextStates(*map(torch.stack, zip(*(self.known[one] for one in captions), strict=True)))

    @torch.no_grad()
    def _encoded(self, captions: Sequence[str]) -> TextStates:
        states, mask, pooled = self.checkpoint.text_encoder(*tokenize(self.checkpoint.tokenizer, captions))
        longest = self.ground.caption_tokens
        assert not mask[:, longest:].any(), f"a caption of more than {longest} tokens"
        return TextStates(states[:, :longest], mask[:, :longest], pooled)


def frozen_parts(name: GroundName = DIGITS) -> Frozen:
    """The checkpoint of a ground."""
    ground = ground_of(name)
    frozen = Frozen(ground, load_checkpoint(ground.checkpoint))
    frozen.text(ground.captions())
    return frozen


def conditions(count: int, shape: Shape) -> Tensor:
    """Micro-conditions fp32 [count, 6] of whole clips of that shape, of stride 1."""
    return micro_conditions((shape.size, shape.size), (0, 0), 1, shape.frames).repeat(count, 1)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """``steps`` with one objective on batches of ``batch`` clips of ``frames`` frames, ``size`` pixels."""

    objective: Objective
    steps: int
    batch: int = 16
    frames: int = FRAMES
    size: int = SIZE

    @property
    def shape(self) -> Shape:
        """Of the clips."""
        return Shape(self.frames, self.size)

    @property
    def tokens(self) -> int:
        """Spatial tokens of one frame."""
        return (self.size // TOKEN) ** 2

    @property
    def step_cost(self) -> float:
        """Compute of one step in video-token updates; an image token counts :data:`IMAGE_COST`."""
        weight = 1.0 if self.objective.kind.video else IMAGE_COST
        return weight * self.batch * self.frames * self.tokens

    @property
    def cost(self) -> float:
        """Compute of the phase in video-token updates."""
        return self.steps * self.step_cost


@dataclass(frozen=True, kw_only=True)
class Training:
    """Phases under one schedule of the learning rate. ``stage`` keeps the draws of different trainings apart."""

    phases: tuple[Phase, ...]
    stage: int
    learning_rate: float = 2e-3
    warmup: int = 40
    ema: float = 0.99

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    @property
    def cost(self) -> float:
        """Compute in video-token updates."""
        return sum(phase.cost for phase in self.phases)

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to a twentieth of the full rate."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return self.learning_rate * warm * (0.05 + 0.475 * (1 + math.cos(math.pi * step / max(1, self.steps))))

    def schedule(self) -> Iterator[Phase]:
        """The phase of every step."""
        for phase in self.phases:
            yield from [phase] * phase.steps


def t2i(steps: int, *, batch: int = 64, size: int = SIZE) -> Phase:
    """A phase of text-to-image on stills."""
    objective = Objective(task="t2i", logit_normal=True)
    return Phase(objective=objective, steps=steps, batch=batch, frames=1, size=size)


def video(
    task: str, steps: int, *, time_shift: float = 3.0, image_dropout: float = 0.1, size: int = SIZE, batch: int = 16
) -> Phase:
    """A phase of text-to-video or text-and-image-to-video; uniform times, shifted toward noise.

    The word of direction decides while t < 0.12 (checkpoints/tiny/README.md): the shift keeps those times in the batch.
    """
    objective = Objective.model_validate(
        {
            "task": task,
            "logit_normal": False,
            "time_shift": time_shift,
            "image_dropout": image_dropout,
            "joint_dropout": min(0.5, 0.08 / image_dropout) if image_dropout else 0.5,
        }
    )
    return Phase(objective=objective, steps=steps, batch=batch, size=size)


def mini(ground: Ground, *, temporal: bool = True, seed: int = 0, build: type[Stiv] = Stiv) -> Stiv:
    """A freshly initialized mini model for clips of ``ground``."""
    side = ground.shape.size // TOKEN
    model = build(MINI.model_copy(update={"temporal": temporal, "base_grid": (side, side)}))
    return model.initialize(torch.Generator().manual_seed(1_000 + seed))


def carry_over(
    tensors: Mapping[str, Tensor], model: nn.Module, *, only: Callable[[str], bool] = lambda name: True
) -> None:
    """Copy those of ``tensors`` that ``model`` has and ``only`` accepts; the rest of the model stays as it is."""
    own = model.state_dict()
    model.load_state_dict({**own, **{name: value for name, value in tensors.items() if name in own and only(name)}})


@dataclass
class Average:
    """Exponential moving average of a model's parameters; the decay ramps up so that a short run is not stuck."""

    model: nn.Module
    decay: float
    steps: int = 0
    values: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def update(self) -> None:
        """Move toward the weights of now."""
        current = [parameter.detach() for parameter in self.model.parameters()]
        if not self.values:
            self.values = [parameter.clone() for parameter in current]
        ramped = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, current, 1 - ramped)
        self.steps += 1

    def swap(self) -> None:
        """Exchange the model's parameters with the averages; a second call undoes the first."""
        for parameter, value in zip(self.model.parameters(), self.values, strict=True):
            parameter.data, value.data = value.data, parameter.data


def batch_of(frozen: Frozen, phase: Phase, seed: int, stage: int, step: int) -> Batch:
    """Latents [B, T, C, h, w], text and micro-conditions of one step."""
    generator = torch.Generator().manual_seed((seed * 1_000 + stage) * 10_000_000 + step)
    clips = frozen.ground.draw(phase.batch, phase.shape, generator)
    with torch.no_grad():
        latents = frozen.vae.encode(clips.video)
    return latents, frozen.text(clips.captions), conditions(phase.batch, phase.shape)


def loss_of(model: Stiv, frozen: Frozen, phase: Phase, batch: Batch, key: tuple[int, int, int], adapt: Adapt) -> Tensor:
    """Loss per sample fp32 [B] of ``batch`` under the draws that ``key`` (seed, stage, step) fixes."""
    latents, text, micro = batch
    generators = [sample_generator(*key, sample) for sample in range(len(latents))]
    draws = draw(phase.objective, latents.shape[1:], phase.tokens, generators)
    text = drop_text(text, frozen.text([""]), draws.drop_text)
    text, given = adapt(model, text, latents, draws.given)
    return training_loss(model, latents, text, micro, replace(draws, given=given))


def train(
    model: Stiv,
    training: Training,
    frozen: Frozen,
    seed: int,
    *,
    adapt: Adapt = as_is,
    observe: Callable[[int], None] | None = None,
    every: int = 0,
) -> list[float]:
    """Train ``model``, leave it with its averaged weights in evaluation mode, and return the loss of every step.

    ``observe`` is called with the number of steps done before the first, after every ``every``-th and after the last
    one, while the model holds its averaged weights.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=training.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    average, losses = Average(model, training.ema), []
    average.update()
    for step, phase in enumerate(training.schedule()):
        if observe is not None and every and step % every == 0:
            look(model, average, observe, step)
        batch = batch_of(frozen, phase, seed, training.stage, step)
        loss = loss_of(model, frozen, phase, batch, (seed, training.stage, step), adapt).mean()
        if not torch.isfinite(loss):
            raise DivergedError(f"loss is {loss.item()} at step {step} of a study; lower its learning rate")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = training.rate(step)
        optimizer.step()
        average.update()
        losses.append(loss.item())
    average.swap()
    model.eval().requires_grad_(False)
    if observe is not None:
        observe(training.steps)
    return losses


def look(model: Stiv, average: Average, observe: Callable[[int], None], step: int) -> None:
    """Call ``observe`` on the averaged weights."""
    average.swap()
    observe(step)
    average.swap()
