"""From the sharded state of a run to one ordinary checkpoint, in one process."""

from pathlib import Path

import torch

from stiv_deploy.stiv_ref.checkpoint import save_checkpoint
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.lora import attach
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.run import VAE_STAGE, load_vae, new_run
from stiv_deploy.stiv_ref.training.stages import averaged_checkpoint
from stiv_deploy.stiv_ref.training.state import Position, find_state, load_tensors_into, read_position


def consolidate_run(folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Position:
    """Write the averaged weights of the last state of the run in ``folder`` as a checkpoint folder ``out``.

    Only the averages are read, and the model that a LoRA is merged into. Returns where the run was. Raises
    :class:`CheckpointError` if there is no state yet, or none of a model.
    """
    state = find_state(folder)
    if state is None:
        raise CheckpointError(f"{folder}: no training state here; name the folder of a run that 'stiv train' has saved")
    position = read_position(state)
    if position.stage == VAE_STAGE:
        raise CheckpointError(f"{state}: the run still trains its VAE; there is no model yet")
    run = new_run(position.recipe, folder, Team(device=torch.device("cpu")), [], resumed=True)
    load_vae(run)
    run.stage, run.step = position.stage, position.step
    run.model = Stiv(run.recipe.model_of(run.current))
    if run.recipe.lora is not None:
        attach(run.model, run.recipe.lora)
    run.averages = {name: parameter.detach() for name, parameter in run.parameters.items()}
    wanted = {f"ema.{name}": average for name, average in run.averages.items()}
    wanted |= {f"base.{name}": weight for name, weight in run.frozen.items()}
    load_tensors_into(wanted, state, alone=True)
    checkpoint = averaged_checkpoint(run)
    assert checkpoint is not None
    save_checkpoint(out, checkpoint, dtype)
    return position
