"""The README's training section works as it stands: its commands are run, training with few steps."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.recipe import load_recipe
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train

ROOT = Path(__file__).parents[3]


def training_commands() -> list[list[str]]:
    """The commands of the section's first block, without comments."""
    section = (ROOT / "README.md").read_text().partition("## Train\n")[2].partition("\n## ")[0]
    block = re.findall(r"```sh\n(.*?)```", section, flags=re.DOTALL)[0]
    return [shlex.split(line, comments=True) for line in block.splitlines() if line.strip()]


def test_the_section_goes_from_data_to_a_video() -> None:
    assert [command[:2] for command in training_commands()] == [
        ["stiv", "data"],
        ["stiv", "train"],
        ["stiv", "plot"],
        ["stiv", "export"],
        ["stiv", "generate"],
    ]


@pytest.mark.slow
def test_the_training_section_runs(tmp_path: Path) -> None:
    """On real clips, through all stages of the progressive recipe, to a TI2V bundle and a video from it."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    stiv = Path(sys.executable).parent / "stiv"
    for command in training_commands():
        short = ["--max-steps", "2", "--quiet"] if command[1] == "train" else []
        done = subprocess.run([stiv, *command[1:], *short], cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    for name in ("training.png", "samples/index.png", "log.jsonl"):
        assert (tmp_path / "runs/real-clips" / name).stat().st_size > 0, name
    video = tmp_path / "out" / "rabbit.mp4"
    assert video.stat().st_size > 0


@pytest.mark.slow
def test_the_progressive_recipe_ends_in_image_to_video(tmp_path: Path) -> None:
    """On digits: low and high resolution, masked and not, short and long; sheets of samples in two steps each."""
    recipe = load_recipe(ROOT / "recipes" / "progressive.toml")
    recipe = recipe.model_copy(update={"sampling": recipe.sampling.model_copy(update={"steps": 2})})
    threads = torch.get_num_threads()
    train(TrainRequest(recipe=recipe.rehearsal(2), out=tmp_path))
    torch.set_num_threads(threads)
    assert {path.name for path in (tmp_path / "stages").iterdir()} == {stage.name for stage in recipe.stages}
    made = load_checkpoint(tmp_path / "checkpoint").config
    assert (recipe.stages[-1].task, made.sampling.frames) == ("ti2v", recipe.stages[-1].frames)
