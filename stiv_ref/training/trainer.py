"""Training by a recipe: data -> loss -> step -> averages -> checkpoint, in stages, resumable at any step.

Every random draw of a step depends on the recipe's seed, the stage, the step and the sample only, so that a run that
was stopped, killed, or started again with other micro-batches computes the losses of one that was not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stiv_deploy.stiv_ref.checkpoint import AnyVae, save_checkpoint
from stiv_deploy.stiv_ref.config import FrozenConfig
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.data.source import Source
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.files import write_text
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.recipe import Recipe, Size, Stage, TrainedVae
from stiv_deploy.stiv_ref.training.folder import BROKEN, CHECKPOINT, run_folder
from stiv_deploy.stiv_ref.training.interruption import Interruption
from stiv_deploy.stiv_ref.training.log import Log
from stiv_deploy.stiv_ref.training.memory import check_memory, memory_told
from stiv_deploy.stiv_ref.training.parallel import Team, joined
from stiv_deploy.stiv_ref.training.run import VAE_STAGE, Run, load_vae, new_run, save_tokenizer, save_vae
from stiv_deploy.stiv_ref.training.sheets import Sheets
from stiv_deploy.stiv_ref.training.stages import (
    averaged_checkpoint,
    base_hash,
    begin_stage,
    check_origins,
    keep_lora,
    keep_stage,
)
from stiv_deploy.stiv_ref.training.state import (
    check_recipe,
    find_state,
    load_state,
    read_position,
    save_state,
)
from stiv_deploy.stiv_ref.training.step import training_step
from stiv_deploy.stiv_ref.training.vae_stage import begin_vae, finish_vae, vae_step

SHOWN = 4
"""So many unknown words are told."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """Training by ``recipe``, a value that has checked itself, in the folder ``out``."""

    recipe: Recipe
    out: Path


class TrainReport(FrozenConfig):
    """What a training made: its checkpoint, and the file of its LoRA if the recipe has one.

    ``resumed`` is the state that it went on from, None if it began anew.
    """

    checkpoint: Path
    lora: Path | None
    resumed: Path | None
    seconds: float


def train(request: TrainRequest, progress: Progress = unheard) -> TrainReport:
    """Train a recipe; the checkpoint is ``out/checkpoint``.

    Goes on from ``out/state`` if there is one. Ctrl-C and SIGTERM save the state first and raise ``KeyboardInterrupt``.
    Under torchrun all processes must call it together; the first one's ``progress`` hears of steps. Raises
    :class:`~stiv_deploy.stiv_ref.errors.StivRefError` for whatever the user can mend: before the first step wherever
    that can be known, :class:`~stiv_deploy.stiv_ref.errors.DivergedError` for a loss that is not finite.
    """
    started, recipe, out = time.monotonic(), request.recipe, request.out
    with joined() as team, run_folder(out, team.first):
        torch.set_num_threads(recipe.threads)
        state = find_state(out)
        if state is not None:
            check_recipe(read_position(state), recipe, state)
        check(recipe, team)
        sources = [open_source(recipe, stage, number) for number, stage in enumerate(recipe.stages, 1)]
        run = open_run(recipe, out, team, sources, state)
        with (
            Log(out, recipe.logging, progress, enabled=team.first) as log,
            Interruption(impatient=team.world == 1) as wish,
            memory_told(),
        ):
            checkpoint, lora = Trainer(run, sources, log, wish).train()
    return TrainReport(checkpoint=checkpoint, lora=lora, resumed=state, seconds=time.monotonic() - started)


def check(recipe: Recipe, team: Team) -> None:
    """Refuse what cannot work with these processes, in this memory or from these origins, before any training."""
    check_memory(recipe, team)
    if recipe.lora is not None and team.world > 1:
        raise ConfigError(f"[lora] is trained by one process, there are {team.world}; start it without torchrun")
    if isinstance(recipe.vae, TrainedVae):
        team.check("vae", recipe.vae.batch)
    for stage in recipe.stages:
        team.check(f"stage {stage.name}", stage.batch)
    check_origins(recipe)


def check_vae(recipe: Recipe, vae: AnyVae) -> None:
    """:class:`ConfigError` if latents of ``vae`` do not fit the model or a stage's frames and pixels the patches."""
    if vae.config.latent_channels != recipe.model.latent_channels:
        raise ConfigError(
            f"the VAE has {vae.config.latent_channels} latent channels, the model takes "
            f"{recipe.model.latent_channels}; set latent_channels = {vae.config.latent_channels} in [model]"
        )
    for stage in recipe.stages:
        _check_sizes(f"stage {stage.name}:", recipe, vae, stage.frames, stage.sizes, recipe.patch_of(stage)[0])
        _check_givings(stage, vae)
    last, sampling = recipe.stages[-1], recipe.sampling
    frames = sampling.frames if last.kind.video else 1
    _check_sizes("[sampling]", recipe, vae, frames, [(sampling.height, sampling.width)], recipe.patch_of(last)[0])


def _check_givings(stage: Stage, vae: AnyVae) -> None:
    """:class:`ConfigError` if a giving of ``stage`` leaves no latent frame to make, or wants what a causal VAE cannot.

    Latent frames of a causal VAE code the frames before them too: those of a clip's beginning can be given alone.
    """
    latent_frames = vae.config.latent_frames(stage.frames)
    if stage.kind.video and latent_frames < stage.kind.least_frames:
        raise ConfigError(
            f"stage {stage.name}: task {stage.task} needs at least {stage.kind.least_frames} latent frames, "
            f"{stage.frames} frames are {latent_frames}"
        )
    apart = [name for name, giving in stage.kind.givings.items() if not giving.leading]
    if vae.config.causal and apart:
        raise ConfigError(
            f"stage {stage.name}: the VAE is causal, its latent frames from 1 on cannot be given without those before "
            f"them, as {', '.join(map(repr, apart))} would; its givings are none, first and first K"
        )


def _check_sizes(what: str, recipe: Recipe, vae: AnyVae, frames: int, sizes: Sequence[Size], patch: int) -> None:
    """:class:`ConfigError` unless so many frames and pixels are a whole number of tokens."""
    try:
        latent_frames = vae.config.latent_frames(frames)
    except ValueError as error:
        raise ConfigError(f"{what} {error}") from None
    if latent_frames % patch:
        raise ConfigError(
            f"{what} {frames} frames are {latent_frames} latent frames, not a multiple of the patch {patch}"
        )
    multiple = vae.config.spatial_factor * recipe.model.patch[1]
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ConfigError(
                f"{what} resolution {height}x{width} is not a multiple of {multiple} pixels (VAE factor times patch)"
            )


def check_words(run: Run, words: Sequence[str]) -> None:
    """:class:`ConfigError` if the data of a resumed run has words that its own text encoder was not begun with."""
    known = run.text.tokenizer.get_vocab()
    if run.text.trained and (new := [word for word in words if word not in known]):
        shown = ", ".join(new[:SHOWN]) + (f" and {len(new) - SHOWN} more" if len(new) > SHOWN else "")
        raise ConfigError(f"{run.out}: this run was begun without the words {shown}; train into another --out")


def open_run(recipe: Recipe, out: Path, team: Team, sources: Sequence[Source], state: Path | None) -> Run:
    """The run in ``out``: at its very start, or where the folder ``state`` says that it was."""
    words = list(dict.fromkeys(word for source in sources for word in source.words()))
    run = new_run(recipe, out, team, words, resumed=state is not None)
    run.base = base_hash(recipe)
    check_words(run, words)
    check_vae(recipe, run.vae)
    if state is None:
        if team.first:
            save_tokenizer(run.text.tokenizer, out)
        begin_vae(run) if isinstance(recipe.vae, TrainedVae) else start_stage(run, 1)
        return run
    position = read_position(state)
    if position.base != run.base:
        raise CheckpointError(
            f"{recipe.stages[0].spatial_from}: another checkpoint than the run in {out} was begun with; restore it, or "
            "train into another --out"
        )
    run.stage, run.step = position.stage, position.step
    if run.stage == VAE_STAGE:
        begin_vae(run)
    else:
        load_vae(run)
        begin_stage(run, fresh=False)
    load_state(run, state)
    return run


def start_stage(run: Run, number: int) -> None:
    """Go to the first step of stage ``number``."""
    run.stage, run.step = number, 0
    begin_stage(run)


class Trainer:
    """The loop over steps and stages of one run."""

    def __init__(self, run: Run, sources: Sequence[Source], log: Log, wish: Interruption) -> None:
        self.run, self.sources, self.log, self.wish = run, sources, log, wish

    def train(self) -> tuple[Path, Path | None]:
        """Train what is left of the run; the path of its checkpoint, and of its LoRA if it trains one."""
        run = self.run
        if run.stage == VAE_STAGE:
            self._train_vae()
            self._stop_if_wished()
            start_stage(run, 1)
        self._train_stage()
        self._stop_if_wished()
        while run.stage < len(run.recipe.stages):
            start_stage(run, run.stage + 1)
            self._train_stage()
            self._stop_if_wished()
        checkpoint = averaged_checkpoint(run)
        if checkpoint is not None:
            save_checkpoint(run.out / CHECKPOINT, checkpoint, torch.float16)
        lora = keep_lora(run)
        run.team.barrier()
        self._stop_if_wished()
        return run.out / CHECKPOINT, lora

    def _train_vae(self) -> None:
        run, settings = self.run, self.run.recipe.vae
        assert isinstance(settings, TrainedVae)
        source = open_source(run.recipe, run.recipe.vae_stage(settings), VAE_STAGE)
        parts = run.team.parts(settings.batch, None)
        steps = range(run.step, settings.steps)
        for step, batches in zip(self.log.steps("vae", steps), source.batches(steps, parts), strict=True):
            values = vae_step(run, batches, parts)
            self.log.step(VAE_STAGE, "vae", "vae", step, values)
            self._save_if_due(settings.steps)
        finish_vae(run, source)
        if run.team.first:
            save_vae(run)
        run.team.barrier()
        load_vae(run)

    def _train_stage(self) -> None:
        run, stage = self.run, self.run.current
        source = self.sources[run.stage - 1]
        parts = run.team.parts(stage.batch, run.recipe.efficiency.micro_batch)
        steps = range(run.step, stage.steps)
        sheets = Sheets(run, source, self.log)
        for step, batches in zip(self.log.steps(stage.name, steps), source.batches(steps, parts), strict=True):
            result = training_step(run, batches, parts)
            seen = {"timesteps": result.timesteps, "losses": result.losses}
            self.log.step(run.stage, stage.name, stage.task, step, result.values, **seen, tokens=result.tokens)
            self._save_if_due(stage.steps)
            sheets.draw_if_due()
        self._write_broken(stage, source)
        keep_stage(run)

    def _save_if_due(self, steps: int) -> None:
        """Save every ``save_every`` steps, at the end of a stage, and when a stop is wished for: then stop."""
        run = self.run
        stop = run.team.any(self.wish.requested)
        if stop or run.step % run.recipe.save_every == 0 or run.step == steps:
            save_state(run)
        if stop:
            raise KeyboardInterrupt

    def _stop_if_wished(self) -> None:
        """Stop between stages, and at the end: the state that was saved last says all that was done."""
        if self.run.team.any(self.wish.requested):
            raise KeyboardInterrupt

    def _write_broken(self, stage: Stage, source: Source) -> None:
        lines = self.run.team.gather_names(source.broken())
        if lines and self.run.team.first:
            path = self.run.out / BROKEN
            known = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
            write_text(path, "\n".join(dict.fromkeys([*known, *lines])) + "\n")
