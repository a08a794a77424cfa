"""Stages: where their weights come from, how their model is placed on the processes, and what they leave behind."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from stiv_deploy.stiv_ref.checkpoint import (
    AnyTextEncoder,
    Checkpoint,
    CheckpointConfig,
    TrainedOn,
    load_model,
    load_text_encoder,
    open_checkpoint,
    read_checkpoint_config,
    save_checkpoint,
)
from stiv_deploy.stiv_ref.data.moving_digits import WORDS
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.initialization import check_fits, initialize_from
from stiv_deploy.stiv_ref.lora import attach, merged, save_lora, target_names
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.recipe import SCRATCH, Recipe, WordText
from stiv_deploy.stiv_ref.text import TextEncoder
from stiv_deploy.stiv_ref.training.averages import start_averages
from stiv_deploy.stiv_ref.training.efficiency import make_efficient
from stiv_deploy.stiv_ref.training.optimizer import make_optimizer
from stiv_deploy.stiv_ref.training.parallel import Team, shard, whole
from stiv_deploy.stiv_ref.training.run import Run, make_vae
from stiv_deploy.stiv_ref.training.text_conditions import make_text, word_encoder
from stiv_deploy.stiv_ref.training.trained_on import sampling_of, trained_on

AnyModule = TypeVar("AnyModule", bound=nn.Module)
NO_SAMPLE = 2**31
"""Number of the generator that initializes a stage's weights: no sample has it."""
STAGES = "stages"
"""Folder of the finished stages' checkpoints in a run's folder."""
LORA_FILE = "lora.safetensors"
"""What a run with ``[lora]`` trained, beside its checkpoint, into which that is merged."""


def origins(recipe: Recipe, number: int, out: Path) -> tuple[Path | None, Path | None]:
    """Checkpoint folders that stage ``number`` takes its spatial and its temporal weights from, ``None`` for nowhere.

    Both are the stage before, unless the recipe says otherwise; an image stage gives no temporal weights.
    """
    stage = recipe.stages[number - 1]
    if stage.spatial_from == SCRATCH:
        return None, None
    before = recipe.stages[number - 2] if number > 1 else None
    spatial = stage.spatial_from or (before.name if before else "")
    temporal = stage.temporal_from or (before.name if before and before.kind.video and stage.kind.video else "")

    def folder(name: str) -> Path | None:
        return Path(name) if "/" in name else out / STAGES / name if name else None

    return folder(spatial), folder(temporal)


def check_origins(recipe: Recipe) -> None:
    """:class:`CheckpointError` if a checkpoint that a stage starts from is absent or does not fit its model."""
    for stage in recipe.stages:
        for key, name in (("spatial_from", stage.spatial_from), ("temporal_from", stage.temporal_from)):
            if "/" in name:
                config = read_checkpoint_config(Path(name)).model
                check_fits(config, recipe.model_of(stage), f"stage {stage.name}: {key} {name}")
                if key == "temporal_from" and not config.temporal:
                    raise CheckpointError(
                        f"stage {stage.name}: {key} {name} is an image model, without temporal weights"
                    )
    if recipe.lora is not None:
        _check_base(recipe)


def _check_base(recipe: Recipe) -> None:
    """:class:`CheckpointError` unless the model of a LoRA is that of its checkpoint.

    Raises :class:`~stiv_deploy.stiv_ref.errors.ConfigError` for targets that it has not.
    """
    assert recipe.lora is not None
    (stage,) = recipe.stages
    there = read_checkpoint_config(Path(stage.spatial_from)).model
    here = recipe.model_of(stage)
    for field, value in here.model_dump(exclude={"name"}).items():
        theirs = there.model_dump()[field]
        if theirs != value:
            raise CheckpointError(
                f"stage {stage.name}: {field} of {stage.spatial_from} is {theirs}, the recipe has {value}; a LoRA "
                "leaves its model as it is"
            )
    with torch.device("meta"):
        target_names(Stiv(here), recipe.lora)


def base_hash(recipe: Recipe) -> str | None:
    """Hash of the checkpoint that a LoRA is trained of; None for any other recipe. Raises :class:`CheckpointError`."""
    return None if recipe.lora is None else open_checkpoint(Path(recipe.stages[0].spatial_from)).sha256


def initial_weights(run: Run) -> dict[str, nn.Module]:
    """What the running stage has, with its first weights, whole, on the CPU: ``model`` and maybe ``text_encoder``.

    A trained text encoder comes from the same origin as the weights that read what it says (``text_from``). A stage
    that distills has a ``teacher`` besides: the model, without what only a student has.
    """
    recipe = run.recipe
    model = Stiv(recipe.model_of(run.current))
    model.initialize(sample_generator(recipe.seed, run.stage, 0, NO_SAMPLE))
    spatial, temporal = origins(recipe, run.stage, run.out)
    late = run.current.text_from == "temporal" and temporal is not None
    if spatial is not None:
        other = None if temporal is None or temporal == spatial else load_model(temporal)  # none: spatial gives both
        initialize_from(model, load_model(spatial), other, text_with_temporal=late)
    if recipe.lora is not None:
        attach(model, recipe.lora, sample_generator(recipe.seed, run.stage, 1, NO_SAMPLE))
    modules: dict[str, nn.Module] = {"model": model}
    if run.current.distill:
        modules["teacher"] = _teacher(model)
    if not isinstance(recipe.text, WordText):
        return modules
    text = word_encoder(recipe.text, recipe.model, run.text.tokenizer, recipe.seed)
    if origin := temporal if late else spatial:
        _take_text(text, origin)
    return {**modules, "text_encoder": text}


def _teacher(student: Stiv) -> Stiv:
    """What ``student``, which nothing was trained of yet, is to learn from."""
    teacher, weights = Stiv(student.config.teacher), student.state_dict()
    teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
    return teacher


def _take_text(encoder: TextEncoder, origin: Path) -> None:
    there, _ = load_text_encoder(origin)
    if there.config != encoder.config:
        raise CheckpointError(
            f"the text encoder of the stage's origin has other words or sizes than this run's ({there.config} "
            f"there, {encoder.config} here); use it frozen: [text] kind = 'checkpoint'"
        )
    encoder.load_state_dict(there.state_dict())


def _placed(run: Run) -> dict[str, nn.Module]:
    """All modules of the running stage; where it distills, what reads the text is frozen, as its teacher is."""
    if run.teacher is None:
        return run.modules
    run.teacher.eval().requires_grad_(False)
    run.text.encoder.requires_grad_(False)
    return {**run.modules, "teacher": run.teacher}


def _place(module: nn.Module, run: Run) -> None:
    """Put ``module``, made on the meta device, where it is trained: on the run's device, sharded over its processes."""
    team, efficiency = run.team, run.recipe.efficiency
    if isinstance(module, Stiv):
        make_efficient(module, efficiency)
    shard(module, team, efficiency.precision)
    module.to_empty(device=team.device)


def _spread(module: nn.Module, whole: nn.Module | None, team: Team) -> None:
    """Give ``module`` the weights of ``whole``, which only the first process has; all processes together."""
    weights = {} if whole is None else whole.state_dict()
    if team.world == 1:
        module.load_state_dict(weights)
    else:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(module, weights, options=options)


def begin_stage(run: Run, *, fresh: bool = True) -> None:
    """Make model, optimizer and averages of stage ``run.stage``, with the weights of its origins if ``fresh``.

    Otherwise their values are left to :func:`~stiv_deploy.stiv_ref.training.state.load_state`. All processes must call
    it together.
    """
    recipe, team = run.recipe, run.team
    run.optimizer, run.averages, run.model, run.teacher = None, {}, None, None
    first = initial_weights(run) if fresh and team.first else {}
    with torch.device("meta"):
        run.model = Stiv(recipe.model_of(run.current))
        if recipe.lora is not None:
            attach(run.model, recipe.lora)
        if isinstance(run.text.encoder, TextEncoder) and run.text.trained:
            run.text.encoder = TextEncoder(run.text.encoder.config)
        if run.current.distill:
            run.teacher = Stiv(run.model.config.teacher)
    for name, module in _placed(run).items():
        _place(module, run)
        if fresh:
            _spread(module, first.get(name), team)
    parameters = run.parameters
    run.optimizer = make_optimizer(run.current.optimizer or recipe.optimizer, run.current, parameters)
    run.averages = start_averages(parameters, recipe.efficiency.ema_device)


def _on_cpu(module: AnyModule) -> AnyModule:
    """``module``, or a copy of it if it is on another device."""
    there = next(module.parameters()).device.type
    return module if there == "cpu" else copy.deepcopy(module).cpu()


@torch.no_grad()
def gathered_averages(run: Run) -> dict[str, Tensor]:
    """The averages, whole, in the first process's CPU memory, one after the other; nothing in the others."""
    found = {}
    for name, average in run.averages.items():
        value = whole(average, run.team.device)
        if run.team.first:
            found[name] = value.to("cpu", copy=True)
    return found


def _weights(run: Run, averages: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the stage's result, by name: the averages, of a LoRA merged into its model."""
    if run.recipe.lora is None:
        return averages
    return merged({name: each.cpu() for name, each in run.frozen.items()}, averages, run.recipe.lora)


def _with_averages(module: AnyModule, part: str, averages: dict[str, Tensor]) -> AnyModule:
    """``module``, made on the meta device, with its part of ``averages``, in evaluation mode."""
    weights = {name.removeprefix(f"{part}."): each for name, each in averages.items() if name.startswith(f"{part}.")}
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)


def averaged_checkpoint(run: Run) -> Checkpoint | None:
    """The running stage's result so far: whole averaged weights on the CPU, in evaluation mode.

    All processes must call it together; only the first one gets it.
    """
    averages = _weights(run, gathered_averages(run))
    if not run.team.first:
        return None
    text: AnyTextEncoder = run.text.encoder
    with torch.device("meta"):
        model = Stiv(run.recipe.model_of(run.current))
        trained = TextEncoder(text.config) if isinstance(text, TextEncoder) and run.text.trained else None
    return Checkpoint(
        config=CheckpointConfig(
            model=model.config,
            text=text.config,
            vae=run.vae.config,
            sampling=sampling_of(run.recipe, run.stage),
            trained=_trained(run),
        ),
        model=_with_averages(model, "model", averages),
        text_encoder=_with_averages(trained, "text_encoder", averages) if trained else _on_cpu(text),
        vae=_on_cpu(run.vae),
        tokenizer=run.text.tokenizer,
    )


def _trained(run: Run) -> TrainedOn | None:
    """What the stage's model has seen; of a LoRA what its checkpoint says, as that is what it can do."""
    if run.recipe.lora is None:
        return trained_on(run.recipe, run.stage)
    return read_checkpoint_config(Path(run.current.spatial_from)).trained


def keep_lora(run: Run) -> Path | None:
    """Write the averaged factors of a run with ``[lora]``, and say where; None for any other run."""
    settings = run.recipe.lora
    if settings is None:
        return None
    assert run.base is not None
    factors = {name.removeprefix("model."): each for name, each in gathered_averages(run).items()}
    save_lora(run.out / LORA_FILE, factors, settings, run.base)
    return run.out / LORA_FILE


def untrained_checkpoint(recipe: Recipe, words: Sequence[str] = WORDS) -> Checkpoint:
    """What a run of ``recipe`` would give without a single step: its last stage's model, from scratch."""
    team = Team(device=torch.device("cpu"))
    last = recipe.stages[-1].model_copy(update={"spatial_from": SCRATCH, "temporal_from": ""})
    alone = recipe.model_copy(update={"stages": (last,), "lora": None})
    run = Run(
        recipe=alone,
        out=Path(),
        team=team,
        text=make_text(recipe, words, None, team.device),
        stage=1,
        vae=make_vae(recipe, team.device),
    )
    begin_stage(run)
    checkpoint = averaged_checkpoint(run)
    assert checkpoint is not None
    checkpoint.vae.eval().requires_grad_(False)
    return checkpoint


def keep_stage(run: Run) -> None:
    """Write the finished stage's checkpoint, from which later stages can start; all processes together."""
    checkpoint = averaged_checkpoint(run)
    if checkpoint is not None:
        save_checkpoint(run.out / STAGES / run.current.name, checkpoint)
    run.team.barrier()
