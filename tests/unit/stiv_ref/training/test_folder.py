"""The folder of a run: one training at a time, nothing foreign in it, swept, and gone where nothing came of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stiv_deploy.stiv_ref.checkpoint import save_checkpoint
from stiv_deploy.stiv_ref.errors import DataError, OutputError, StivRefError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training import log, run, state
from stiv_deploy.stiv_ref.training.folder import run_folder
from stiv_deploy.stiv_ref.training.stages import untrained_checkpoint
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train


def trained(recipe: Recipe, out: Path) -> None:
    train(TrainRequest(recipe=recipe, out=out))


def names(folder: Path) -> list[str]:
    """All that is in it, but for the recipe of the fixture."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return [name for name in found if name != "short.toml"]


def test_a_second_training_in_one_folder_is_refused_while_the_first_lives(tmp_path: Path, recipe: Recipe) -> None:
    with run_folder(tmp_path):
        assert names(tmp_path) == [".lock"]
        with pytest.raises(StivRefError, match=r"another training runs in this folder; .* choose another --out$"):
            trained(recipe, tmp_path)
        assert names(tmp_path) == [".lock"]
    assert not names(tmp_path)
    (tmp_path / ".lock").touch()
    with run_folder(tmp_path):
        pass  # a killed training left the file, and nobody holds it


def test_only_the_first_process_holds_it(tmp_path: Path) -> None:
    with run_folder(tmp_path), run_folder(tmp_path, first=False):
        pass


def test_what_killed_trainings_left_is_swept(tmp_path: Path) -> None:
    for name in (".broken.txt-x.partial", "samples/.1.png-x.partial", "stages/.1-t2i.partial/new", "state.partial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "state.partial" / "half").touch()
    (tmp_path / ".writable-1").touch()
    (tmp_path / "samples" / "1.png").touch()
    with run_folder(tmp_path):
        pass
    assert names(tmp_path) == ["samples", "samples/1.png", "stages"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out: (out / "log.jsonl").mkdir(), r"log\.jsonl: is no file, as a run has there; remove it, or choose"),
        (lambda out: os.mkfifo(out / "log.jsonl"), r"log\.jsonl: is no file"),
        (lambda out: (out / "broken.txt").mkdir(), r"broken\.txt: is no file"),
        (lambda out: (out / "state").touch(), "state: is no folder"),
        (lambda out: (out / "samples").touch(), "samples: is no folder"),
        (lambda out: (out / "config.json").touch(), r"holds config\.json, it is not the folder of a run; choose"),
        (lambda out: (out / ".lock").mkdir(), r"run: cannot be written \(Is a directory\); "),
    ],
)
def test_foreign_things_are_refused_and_left(
    recipe: Recipe, tmp_path: Path, make: Callable[[Path], None], message: str
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    make(out)
    before = list(out.iterdir())
    with pytest.raises(StivRefError, match=message) as caught:
        trained(recipe, out)
    assert (caught.value.exit_code, list(out.iterdir())) == (2, before)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_no_file_system_takes(recipe: Recipe, tmp_path: Path, name: str) -> None:
    with pytest.raises(StivRefError, match="cannot write the run there .* choose another --out"):
        trained(recipe, tmp_path / name)
    assert not names(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_its_first_step_leaves_nothing(
    recipe: Recipe, tmp_path: Path, before_step: Callable[..., None], there: bool
) -> None:
    def broken() -> None:
        raise DataError("all samples are broken")

    out = tmp_path / "deep" / "run"
    if there:
        out.mkdir(parents=True)
        (out / "notes.txt").touch()
    before_step((0, 0), broken)
    with pytest.raises(DataError):
        trained(recipe, out)
    assert names(tmp_path) == (["deep", "deep/run", "deep/run/notes.txt"] if there else [])


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name"),
    [(run, "save_tensors"), (run, "write_text"), (state, "save"), (state.Path, "write_text"), (log.json, "dumps")],
    ids=["vae", "tokenizer", "state", "position", "log"],
)
def test_a_full_disk_is_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    monkeypatch.setattr(module, name, full)
    with pytest.raises(OutputError, match=r"run: cannot be written \(No space left on device\); the") as caught:
        trained(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name]


def test_a_checkpoint_on_a_full_disk_is_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stiv_deploy.stiv_ref import weights

    def torn(*_: object) -> None:
        raise weights.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    checkpoint = untrained_checkpoint(recipe)
    monkeypatch.setattr(weights, "save_file", torn)
    with pytest.raises(OutputError, match=r"checkpoint: cannot be written \(No space left on device\); free"):
        save_checkpoint(tmp_path / "checkpoint", checkpoint)
    assert not names(tmp_path)
