"""The real command, in one process and in two under torchrun: equal losses, killed and resumed, stopped, refused."""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.training.consolidate import consolidate_run
from stiv_deploy.stiv_ref.training.state import find_state, read_position
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train

pytestmark = [pytest.mark.slow, pytest.mark.alone]
EPSILON = torch.finfo(torch.float32).eps
RECIPE = """
name = "shared"
threads = 1
save_every = 3
[model]
base = "tiny"
blocks = 3
full_blocks = 1
width = 32
heads = 2
text_width = 24
base_frames = 4
base_grid = [4, 4]
frequency_width = 32
[vae]
channels = [4, 4]
steps = 4
batch = 4
learning_rate = 1e-3
[sampling]
frames = 3
steps = 2
[logging]
sample_every = 4
sample_count = 2
[[stages]]
task = "t2i"
mask_ratio = 0.5
steps = 6
batch = 4
learning_rate = 1e-3
warmup = 2
[[stages]]
task = "ti2v"
frames = 3
steps = 6
batch = 4
learning_rate = 1e-3
warmup = 2
"""


CHANGES = {
    "plain": "",
    "cut": "[efficiency]\nmicro_batch = 1\n",
    "adafactor": '[optimizer]\nname = "adafactor"\n',
    "all": '[optimizer]\nname = "adafactor"\n[efficiency]\nmicro_batch = 1\nactivation_checkpointing = "attention"\n'
    'ema_device = "cpu"\n',
    "bf16": '[efficiency]\nprecision = "bfloat16"\n',
}
"""Recipes that are trained in one process and in two, by what is added to the common one."""
WORKER = """
import sys
from pathlib import Path
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.training.parallel import joined
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train
with joined():
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1])
        train(TrainRequest(recipe=load_recipe(folder / f"{name}.toml"), out=folder / "two" / name))
"""

LEAVING = """
import sys
import torch
import torch.distributed as dist
from stiv_deploy.stiv_ref.training.parallel import joined
with joined():
    sys.kept = dist.group.WORLD
    dist.all_reduce_coalesced([torch.ones(1) for _ in range(500)])
"""
"""Leaves Gloo's threads alive, as training does, and busy dropping tensors."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shared")
    for name, change in CHANGES.items():
        (made / f"{name}.toml").write_text(RECIPE.replace("[vae]", f"{change}[vae]"))
    (made / "worker.py").write_text(WORKER)
    (made / "leaving.py").write_text(LEAVING)
    return made


def start(processes: int, *command: object) -> subprocess.Popen[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    arguments = [sys.executable, *(torchrun if processes > 1 else []), *map(str, command)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def launch(processes: int, recipe: Path, out: Path) -> subprocess.Popen[str]:
    return start(processes, "-m", "stiv_deploy.runtime.command.main", "train", recipe, "--out", out, "--quiet")


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


def wait_for(process: subprocess.Popen[str], out: Path, stage: int, step: int) -> None:
    deadline = time.monotonic() + 120
    while (
        not (out / "log.jsonl").exists()
        or f'"stage": {stage}, ' not in (text := (out / "log.jsonl").read_text())
        or (json.loads(text.splitlines()[-1] if text.endswith("\n") else text.splitlines()[-2])["step"] < step)
    ):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(folder: Path) -> Callable[[str], Path]:
    """Folders of runs in one process, by their name in ``CHANGES``."""

    @functools.cache
    def made(name: str) -> Path:
        threads = torch.get_num_threads()
        train(TrainRequest(recipe=load_recipe(folder / f"{name}.toml"), out=folder / "one" / name))
        torch.set_num_threads(threads)
        return folder / "one" / name

    return made


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """Folder of the same runs in two processes, which are started once for all of them."""
    code, errors = finished(start(2, folder / "worker.py", folder, "plain", "all", "bf16"))
    assert code == 0, errors
    return folder / "two"


def test_processes_end_in_peace_while_threads_drop_their_last_tensors(folder: Path) -> None:
    for _ in range(2):
        code, errors = finished(start(2, folder / "leaving.py"))
        assert code == 0, errors


def drift(runs: Any, one: Path, other: Path) -> float:
    """The largest relative difference of two runs' losses."""
    first, second = runs.losses(one), runs.losses(other)
    assert first.keys() == second.keys()
    return max(abs(second[at] / loss - 1) for at, loss in first.items())


def gradient_norm(out: Path) -> float:
    """That of the first step after the VAE."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return next(line["gradient_norm"] for line in lines if line["stage"])


def test_two_processes_compute_the_losses_of_one(one: Callable[[str], Path], two: Path, runs: Any) -> None:
    """The first losses on equal weights differ by roundings alone, the others by what these grow to.

    How far they may grow is measured on another right order of the same sums; ours may grow four times as far.
    """
    alone, together = one("plain"), two / "plain"
    assert runs.losses(together)[1, 0] == pytest.approx(runs.losses(alone)[1, 0], rel=20 * EPSILON)
    assert gradient_norm(together) == pytest.approx(gradient_norm(alone), rel=100 * EPSILON)
    allowed = 4 * (drift(runs, alone, one("cut")) + 8 * EPSILON)
    assert allowed < 1e-3
    assert drift(runs, alone, together) < allowed
    sheets = [sorted(path.name for path in (out / "samples").iterdir()) for out in (alone, together)]
    assert sheets[0] == sheets[1]


def test_two_processes_with_all_that_saves_memory(one: Callable[[str], Path], two: Path, runs: Any) -> None:
    """Adafactor on sharded matrices, micro-batches, recomputed activations, averages on the CPU: as one process."""
    alone, together = one("adafactor"), two / "all"
    allowed = 4 * (drift(runs, alone, one("all")) + 8 * EPSILON)
    assert allowed < 1e-3
    assert drift(runs, alone, together) < allowed
    averages = [load_checkpoint(out / "stages" / "2-ti2v").model.state_dict() for out in (alone, together)]
    for name, average in averages[0].items():
        torch.testing.assert_close(averages[1][name], average, rtol=0, atol=1e-3 * float(average.abs().max()), msg=name)


def test_two_processes_in_bf16(one: Callable[[str], Path], two: Path, runs: Any) -> None:
    """Gathered as bf16, summed as fp32: as far from fp32 as autocast in one process, or twice as far."""
    exact = one("plain")
    assert 0 < drift(runs, exact, two / "bf16") <= 2 * drift(runs, exact, one("bf16"))
    assert all(
        tensor.dtype == torch.float32 for each in runs.files(two / "bf16", "state").values() for tensor in each.values()
    )


def test_a_sharded_state_becomes_the_checkpoint_of_the_run(two: Path, tmp_path: Path) -> None:
    two = two / "plain"
    assert len(list((two / "state").glob("*.safetensors"))) == 2
    position = consolidate_run(two, tmp_path / "made")
    assert (position.stage, position.step, position.processes) == (2, 6, 2)
    made, kept = load_checkpoint(tmp_path / "made"), load_checkpoint(two / "stages" / "2-ti2v")
    for part in ("model", "text_encoder", "vae"):
        wanted = getattr(kept, part).state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in getattr(made, part).state_dict().items())
    assert made.config == kept.config


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed_has_the_same_losses(
    folder: Path, tmp_path: Path, one: Callable[[str], Path], two: Path, runs: Any, processes: int
) -> None:
    """SIGKILL in the middle of the second stage: no handler runs, the last regular save must do."""
    whole, out = one("plain") if processes == 1 else two / "plain", tmp_path / "run"
    process = launch(processes, folder / "plain.toml", out)
    wait_for(process, out, 2, 3)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    state = find_state(out)
    assert state is not None
    assert read_position(state).stage == 2
    if processes == 2:
        shutil.copytree(out, tmp_path / "alone")
    code, errors = finished(launch(processes, folder / "plain.toml", out))
    assert code == 0, errors
    assert "going on from" in errors
    assert runs.losses(out) == runs.losses(whole)
    if processes == 2:  # the shards of two processes, read by one
        train(TrainRequest(recipe=load_recipe(folder / "plain.toml"), out=tmp_path / "alone"))
        assert drift(runs, whole, tmp_path / "alone") < 4 * (drift(runs, one("plain"), one("cut")) + 8 * EPSILON)


def test_ctrl_c_stops_all_processes_at_one_step(folder: Path, tmp_path: Path, runs: Any) -> None:
    """As a terminal does it: torchrun and all processes get the signal. The state is whole."""
    out = tmp_path / "run"
    process = launch(2, folder / "plain.toml", out)
    wait_for(process, out, 1, 1)
    os.killpg(process.pid, signal.SIGINT)
    code, errors = finished(process)
    assert code != 0
    assert "the same command goes on from" in errors
    assert not (out / "checkpoint").exists()
    position = read_position(out / "state")
    assert (position.stage, position.step) == max((stage, step + 1) for stage, step in runs.losses(out))


FAULTS: dict[str, tuple[Callable[[str], str], str]] = {
    "diverged": (
        lambda text: text.replace("learning_rate = 1e-3\nwarmup = 2", "learning_rate = 1e30\nwarmup = 0", 1),
        r"error: loss is (nan|inf) at step 1 of stage 1 \(1-t2i\) for digit \w+ \(step 1, sample \d\)",
    ),
    "indivisible": (
        lambda text: text.replace("batch = 4", "batch = 5"),
        "error: vae: batch 5 is not divisible by 2 processes; make it a multiple of 2",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_all_processes_stop_and_one_says_why(folder: Path, tmp_path: Path, fault: str) -> None:
    change, wanted = FAULTS[fault]
    (tmp_path / "recipe.toml").write_text(change(RECIPE))
    code, errors = finished(launch(2, tmp_path / "recipe.toml", tmp_path / "run"))
    assert code != 0
    [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.match(wanted, line)
