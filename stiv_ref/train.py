"""Training: data -> loss -> step -> EMA -> checkpoint, in the stages of a recipe, resumable at any step.

Every random draw of a step comes from a generator seeded by (recipe seed, stage, step), so that a run that was
stopped and resumed computes the very same losses as one that was not.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointConfig, fill, load_tensors, save_checkpoint
from stiv_deploy.stiv_ref.conditioning import draw_dropout, draw_frame_mask, replace_frames
from stiv_deploy.stiv_ref.config import model_config
from stiv_deploy.stiv_ref.data.moving_digits import WORDS, Clips, MovingDigits, micro_conditions
from stiv_deploy.stiv_ref.errors import CheckpointError, DivergedError
from stiv_deploy.stiv_ref.flow import flow_loss, interpolate, sample_timesteps, velocity_target
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.recipe import Recipe, Stage
from stiv_deploy.stiv_ref.text import TextConfig, TextEncoder, tokenize, word_tokenizer
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig, vae_loss

VAE_STAGE = 0  # stages are numbered from 1 in seeds and logs; 0 is the VAE


@dataclass(kw_only=True)
class Run:
    """Everything that a training run changes; what :func:`save_state` writes and :func:`load_state` reads."""

    model: Stiv
    text_encoder: TextEncoder
    vae: Vae
    tokenizer: Tokenizer
    stage: int = 0
    step: int = 0
    optimizer: torch.optim.Optimizer | None = None
    ema: dict[str, Tensor] = field(default_factory=dict)


def step_generator(seed: int, stage: int, step: int) -> torch.Generator:
    """The random generator of one training step."""
    return torch.Generator().manual_seed((seed * 1_000 + stage) * 10_000_000 + step)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up over ``stage.warmup`` steps, then cosine from the full rate to a tenth of it."""
    warm = min(1.0, (step + 1) / max(1, stage.warmup))
    progress = step / max(1, stage.steps)
    return stage.learning_rate * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def stage_model(recipe: Recipe, stage: Stage) -> Stiv:
    """An uninitialized model for ``stage``: image models have no temporal attention."""
    config = model_config(recipe.model)
    return Stiv(config.model_copy(update={"temporal": stage.task != "t2i"}))


def carry_over(source: Stiv, target: Stiv) -> None:
    """Copy all weights of ``source`` into ``target``, which keeps its own temporal attention and places."""
    target.load_state_dict({**target.state_dict(), **source.state_dict()})


def start_run(recipe: Recipe) -> Run:
    """Build and initialize the components for the first stage."""
    generator = step_generator(recipe.seed, VAE_STAGE, 0)
    torch.manual_seed(recipe.seed)
    config = model_config(recipe.model)
    tokenizer = word_tokenizer(WORDS, recipe.text.max_tokens)
    text = TextConfig(vocabulary=tokenizer.get_vocab_size(), width=config.text_width, **recipe.text.model_dump())
    return Run(
        model=stage_model(recipe, recipe.stages[0]).initialize(generator),
        text_encoder=TextEncoder(text).initialize(generator),
        vae=Vae(VaeConfig(latent_channels=recipe.vae.latent_channels, channels=recipe.vae.channels)),
        tokenizer=tokenizer,
    )


def trained(run: Run) -> dict[str, nn.Parameter]:
    """Parameters trained by the diffusion stages, by name."""
    parts = {"model": run.model, "text_encoder": run.text_encoder}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def begin_stage(run: Run, recipe: Recipe) -> None:
    """Make the model, optimizer and EMA of stage ``run.stage``, carrying the weights (EMA) of the last one over."""
    stage = recipe.stages[run.stage - 1]
    if run.ema:
        use_ema(run)
    model = stage_model(recipe, stage)
    if model.config != run.model.config:
        model.initialize(step_generator(recipe.seed, run.stage, 0))
        carry_over(run.model, model)
        run.model = model
    parameters = trained(run)
    run.optimizer = torch.optim.AdamW(
        parameters.values(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=stage.weight_decay, fused=True
    )
    run.ema = {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def use_ema(run: Run) -> None:
    """Copy the averaged weights into the modules."""
    for name, parameter in trained(run).items():
        parameter.copy_(run.ema[name])


@torch.no_grad()
def update_ema(run: Run, decay: float) -> None:
    """Move the averages toward the weights; the decay ramps up so that a short run is not stuck at its start."""
    ramped = min(decay, (1 + run.step) / (10 + run.step))
    torch._foreach_lerp_(list(run.ema.values()), [p.detach() for p in trained(run).values()], 1 - ramped)


def diffusion_loss(run: Run, stage: Stage, clips: Clips, generator: torch.Generator) -> Tensor:
    """Flow-matching loss per sample [B] of one batch, with frame replacement and condition dropout."""
    with torch.no_grad():
        latents = run.vae.encode(clips.video)
    batch, frames = latents.shape[:2]
    image_dropout = stage.image_dropout if stage.task == "ti2v" else 1.0
    joint = stage.joint_dropout if stage.task == "ti2v" else stage.text_dropout
    drop_text, drop_image = draw_dropout(
        batch, text=stage.text_dropout, image=image_dropout, joint=joint, generator=generator
    )
    captions = ["" if drop else text for text, drop in zip(clips.captions, drop_text.tolist(), strict=True)]
    text = run.text_encoder(*tokenize(run.tokenizer, captions))
    timestep = sample_timesteps(batch, logit_normal=stage.logit_normal, shift=stage.time_shift, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    given = draw_frame_mask(batch, frames, drop_image)
    model_input = replace_frames(interpolate(latents, noise, timestep), latents, given)
    prediction = run.model(model_input, timestep, micro_conditions(batch, frames), *text)
    return flow_loss(prediction, velocity_target(latents, noise), given)


def check_finite(name: str, value: Tensor, run: Run, stage: Stage) -> None:
    """:class:`DivergedError` if ``value`` is not finite; called before it can reach a weight."""
    if not torch.isfinite(value):
        raise DivergedError(
            f"{name} is {value.item()} at step {run.step} of stage {run.stage} ({stage.task}); the last saved state is "
            "kept. Lower learning_rate or gradient_clip in the recipe and train into another --out"
        )


def optimize(run: Run, recipe: Recipe, data: MovingDigits) -> dict[str, float]:
    """One training step of the current stage; returns what is logged. Raises :class:`DivergedError`."""
    stage = recipe.stages[run.stage - 1]
    assert run.optimizer is not None
    generator = step_generator(recipe.seed, run.stage, run.step)
    loss = diffusion_loss(run, stage, data.draw(stage.batch, stage.frames, generator), generator).mean()
    check_finite("loss", loss, run, stage)
    run.optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(trained(run).values(), recipe.gradient_clip)
    check_finite("gradient norm", norm, run, stage)
    rate = learning_rate(stage, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    update_ema(run, recipe.ema)
    return {"loss": loss.item(), "gradient_norm": norm.item(), "learning_rate": rate}


def train_vae(run: Run, recipe: Recipe, data: MovingDigits, report: "Reporter") -> None:
    """Train the VAE on single frames, then measure the standardization of its latents."""
    settings = recipe.vae
    optimizer = torch.optim.AdamW(run.vae.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for step in report.steps("vae", range(settings.steps)):
        generator = step_generator(recipe.seed, VAE_STAGE, step + 1)
        images = data.draw(settings.batch, 1, generator).video[:, 0]
        loss = vae_loss(run.vae, images, settings.kl_weight, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        report.log(VAE_STAGE, "vae", step, {"loss": loss.item()})
    run.vae.standardize(data.draw(1024, 1, step_generator(recipe.seed, VAE_STAGE, 0)).video[:, 0])
    run.vae.eval().requires_grad_(False)


def save_state(path: Path, run: Run, recipe: Recipe) -> None:
    """Write the resumable state, tensors and position in one file, under a temporary name first."""
    assert run.optimizer is not None
    tensors = {f"ema.{name}": tensor for name, tensor in run.ema.items()}
    for name, parameter in trained(run).items():
        tensors[f"weights.{name}"] = parameter.detach()
        for moment, value in run.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{moment}.{name}"] = value
    tensors |= {f"vae.{name}": tensor for name, tensor in run.vae.state_dict().items()}
    position = {"stage": run.stage, "step": run.step, "recipe": recipe.model_dump(mode="json")}
    temporary = path.with_suffix(".partial")
    save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, {"run": json.dumps(position)})
    temporary.rename(path)


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def load_state(path: Path, recipe: Recipe) -> Run:
    """Read what :func:`save_state` wrote; :class:`CheckpointError` if it belongs to another recipe."""
    from safetensors import safe_open

    tensors = load_tensors(path)
    with safe_open(path, "pt") as file:
        position = json.loads((file.metadata() or {}).get("run", "{}"))
    if position.get("recipe") != recipe.model_dump(mode="json"):
        raise CheckpointError(f"{path}: this state belongs to another recipe; choose another --out or delete it")
    run = start_run(recipe)
    run.stage = position["stage"]
    begin_stage(run, recipe)
    run.step = position["step"]
    fill(run.vae, _section(tensors, "vae."), path)
    run.vae.eval().requires_grad_(False)
    fill(run.model, _section(tensors, "weights.model."), path)
    fill(run.text_encoder, _section(tensors, "weights.text_encoder."), path)
    averages = _section(tensors, "ema.")
    if absent := [name for name in trained(run) if name not in averages]:
        raise CheckpointError(f"{path}: the state is incomplete, it has no average of {absent[0]}; delete it")
    run.ema = {name: averages[name] for name in trained(run)}  # in the order of the parameters, as update_ema needs it
    assert run.optimizer is not None
    moments = _section(tensors, "optimizer.")
    for name, parameter in trained(run).items():
        state = {key.removesuffix(f".{name}"): value for key, value in moments.items() if key.endswith(f".{name}")}
        if state:
            run.optimizer.state[parameter] = state
    return run


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the end of the block, then hand them to the handlers they were meant for.

    Signals without a Python handler, and threads other than the main one, are left alone.
    """
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    caught: list[int] = []
    if threading.current_thread() is threading.main_thread():
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _: caught.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in caught:
        handlers[number](number, None)


class Reporter:
    """Progress bar with the running loss, and a JSON line per step in ``log.jsonl``."""

    def __init__(self, path: Path, quiet: bool = False) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.started = time.monotonic()
        self.average = math.nan
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            disable=quiet,
        )

    def __enter__(self) -> "Reporter":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
        self.file.close()

    def steps(self, name: str, steps: range) -> Iterable[int]:
        """Iterate over ``steps`` under a bar that counts from 0 to the end of the range."""
        task = self.progress.add_task(name, total=steps.stop, completed=steps.start, loss=math.nan)
        self.average = math.nan
        for step in steps:
            yield step
            self.progress.update(task, completed=step + 1, loss=self.average)

    def log(self, stage: int, task: str, step: int, values: dict[str, float]) -> None:
        """Record one step."""
        loss = values["loss"]
        self.average = loss if math.isnan(self.average) else 0.98 * self.average + 0.02 * loss
        seconds = time.monotonic() - self.started
        line = {"stage": stage, "task": task, "step": step, **values, "seconds": round(seconds, 2)}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def finished(run: Run, recipe: Recipe) -> Checkpoint:
    """The checkpoint of a run: averaged weights, evaluation mode."""
    use_ema(run)
    config = CheckpointConfig(
        model=run.model.config, text=run.text_encoder.config, vae=run.vae.config, sampling=recipe.sampling
    )
    return Checkpoint(
        config=config,
        model=run.model.eval(),
        text_encoder=run.text_encoder.eval(),
        vae=run.vae,
        tokenizer=run.tokenizer,
    )


def train(recipe: Recipe, out: Path, *, quiet: bool = False) -> Path:
    """Train ``recipe`` in the folder ``out`` and return the checkpoint's path, ``out/checkpoint``.

    Picks up ``out/state.safetensors`` if there is one. Ctrl-C saves the state first.
    """
    torch.set_num_threads(recipe.threads)
    out.mkdir(parents=True, exist_ok=True)
    state = out / "state.safetensors"
    data = MovingDigits("train")
    run = load_state(state, recipe) if state.exists() else start_run(recipe)
    with Reporter(out / "log.jsonl", quiet) as report:
        if run.stage == 0:
            train_vae(run, recipe, data, report)
            run.stage = 1
            begin_stage(run, recipe)
        while True:
            _train_stage(run, recipe, data, report, state)
            if run.stage == len(recipe.stages):
                break
            run.stage, run.step = run.stage + 1, 0
            begin_stage(run, recipe)
    save_checkpoint(out / "checkpoint", finished(run, recipe), torch.float16)
    return out / "checkpoint"


def _train_stage(run: Run, recipe: Recipe, data: MovingDigits, report: Reporter, state: Path) -> None:
    stage = recipe.stages[run.stage - 1]
    try:
        for step in report.steps(f"{run.stage} {stage.task}", range(run.step, stage.steps)):
            with interrupt_held():  # weights, optimizer, averages and step number must move together
                values = optimize(run, recipe, data)
                run.step = step + 1
            report.log(run.stage, stage.task, step, values)
            if run.step % recipe.save_every == 0 or run.step == stage.steps:
                save_state(state, run, recipe)
    except KeyboardInterrupt:
        save_state(state, run, recipe)
        raise
