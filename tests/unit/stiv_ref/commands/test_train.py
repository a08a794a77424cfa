"""``stiv train`` and ``stiv consolidate``: checkpoint and pictures, and one clear line for what cannot be."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from stiv_deploy.runtime.command.main import main
from stiv_deploy.stiv_ref import config
from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.commands.train import consolidate, train
from stiv_deploy.stiv_ref.errors import StivRefError
from stiv_deploy.stiv_ref.training import step as step_module
from stiv_deploy.stiv_ref.training import trainer

SHIPPED = Path(config.__file__).parents[1] / "recipes" / "tiny.toml"


@pytest.fixture
def app() -> typer.Typer:
    application = typer.Typer()
    application.command()(train)
    return application


@pytest.fixture
def consolidating() -> typer.Typer:
    application = typer.Typer()
    application.command()(consolidate)
    return application


def invoke(app: typer.Typer, *arguments: object) -> tuple[object, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exception, result.output


def assert_one_line(error: object, *parts: str) -> None:
    """What the dispatcher needs: an exit code of 2, and a message of one line."""
    assert isinstance(error, StivRefError)
    assert error.exit_code == 2
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def one_step_each(recipe_file: Path) -> str:
    """The recipe with stages of one step."""
    return recipe_file.read_text().replace("steps = 5", "steps = 1")


def test_a_short_run_makes_checkpoint_and_pictures(app: typer.Typer, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    error, output = invoke(app, recipe_file, "--out", out, "--quiet")
    assert error is None
    assert load_checkpoint(out / "checkpoint").config.model.name == "small"
    for name in ("training.png", "samples/2-ti2v-0000005.png", "samples/index.png"):
        with Image.open(out / name) as image:
            assert image.format == "PNG"
    assert str(out / "training.png") in output
    assert str(out / "samples") in output
    assert str(out / "checkpoint") in output
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["task"]) for entry in log] == [(0, "vae")] * 2 + [(1, "t2i")] * 5 + [(2, "ti2v")] * 5
    assert not [path for path in out.iterdir() if "partial" in path.name or path.name.startswith(".")]


def test_default_folder_is_named_after_the_recipe_and_a_terminal_shows_the_loss(
    app: typer.Typer, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe_file.write_text(one_step_each(recipe_file))
    error, output = invoke(app, recipe_file)
    assert error is None
    assert (tmp_path / "runs" / "short" / "checkpoint" / "config.json").is_file()
    assert "2-ti2v" not in output
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    _, output = invoke(app, recipe_file, "--out", "again")
    assert "2-ti2v" in output
    assert "loss" in output


def test_interrupted_then_resumed_and_consolidated(
    app: typer.Typer, consolidating: typer.Typer, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trainer.training_step

    def stopping(run: trainer.Run, *rest: object) -> step_module.StepResult:
        if (run.stage, run.step) == (1, 3):
            os.kill(os.getpid(), signal.SIGINT)
        return real(run, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trainer, "training_step", stopping)
    out = tmp_path / "run"
    error, output = invoke(app, recipe_file, "--out", out, "--quiet")
    assert isinstance(error, KeyboardInterrupt | SystemExit)
    assert f"stopped; the same command goes on from {out / 'state'}" in output
    error, output = invoke(consolidating, out, "--out", tmp_path / "made", "--half")
    assert error is None
    assert "(stage 1, step 4)" in output
    assert not load_checkpoint(tmp_path / "made").config.model.temporal
    error, output = invoke(app, recipe_file, "--out", out, "--quiet")
    assert error is None
    assert f"going on from {out / 'state'}" in output


def test_nothing_to_consolidate(consolidating: typer.Typer, tmp_path: Path) -> None:
    error, _ = invoke(consolidating, tmp_path, "--out", tmp_path / "made")
    assert_one_line(error, "no training state here", "stiv train")
    assert not (tmp_path / "made").exists()


def test_state_of_another_recipe(app: typer.Typer, recipe_file: Path, tmp_path: Path) -> None:
    recipe_file.write_text(one_step_each(recipe_file))
    invoke(app, recipe_file, "--out", tmp_path / "run", "--quiet")
    recipe_file.write_text(recipe_file.read_text().replace("threads = 1", "threads = 1\nseed = 5"))
    error, _ = invoke(app, recipe_file, "--out", tmp_path / "run", "--quiet")
    assert_one_line(error, "belongs to another recipe", "choose another --out or delete it")


def test_divergence(app: typer.Typer, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = step_module.training_loss
    monkeypatch.setattr(step_module, "training_loss", lambda *arguments: real(*arguments) * float("nan"))
    error, _ = invoke(app, recipe_file, "--out", tmp_path / "run", "--quiet")
    assert_one_line(error, "loss is nan at step 0 of stage 1 (1-t2i) for digit", "Lower learning_rate")
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("where", ["a file", "under a file"])
def test_a_folder_that_cannot_be_written(app: typer.Typer, recipe_file: Path, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" if where == "a file" else tmp_path / "file" / "run"
    error, _ = invoke(app, recipe_file, "--out", out, "--quiet")
    assert_one_line(error, "cannot write the run there", "choose another --out")


def test_a_bad_recipe_leaves_no_folder(app: typer.Typer, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("name = 1")
    for recipe in (tmp_path / "bad.toml", tmp_path / "missing.toml"):
        error, _ = invoke(app, recipe, "--out", tmp_path / "run")
        assert_one_line(error, str(recipe))
    assert not (tmp_path / "run").exists()


def run_stiv(*arguments: object) -> subprocess.Popen[str]:
    program = "import sys; from stiv_deploy.runtime.command.main import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_on_the_real_command_saves_and_exits_130(tmp_path: Path, number: signal.Signals) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    text = SHIPPED.read_text().replace("steps = 1200", "steps = 1").replace("batch = 128", "batch = 2")
    recipe.write_text(text.replace("channels = [32, 64]", "channels = [4, 4]"))
    process = run_stiv(recipe, "--out", out, "--quiet")
    deadline = time.monotonic() + 60
    log = out / "log.jsonl"
    while not (log.exists() and '"t2i"' in log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from" in errors
    assert "Traceback" not in errors
    assert sorted(path.name for path in out.iterdir()) == ["log.jsonl", "state", "tokenizer.json", "vae.safetensors"]


def test_bad_recipe_on_the_real_command_exits_2_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["stiv", "train", str(tmp_path / "missing.toml")])
    assert main() == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert "missing.toml" in line
