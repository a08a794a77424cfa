"""States on disk: whole at every moment, refused in one line when they are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training import state as module
from stiv_deploy.stiv_ref.training.consolidate import consolidate_run
from stiv_deploy.stiv_ref.training.state import find_state, load_tensors_into, read_position, replace_state
from stiv_deploy.stiv_ref.training.trainer import TrainReport, TrainRequest, train

SHARD = "shard-00001-model-00001-of-00001.safetensors"


def trained(recipe: Recipe, out: Path) -> TrainReport:
    return train(TrainRequest(recipe=recipe, out=out))


class Killed(BaseException):
    """Nothing after it runs."""


def whole_state(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "data").write_text(text)
    (folder / "position.json").write_text(text)


@pytest.mark.parametrize("old", [None, "state", "both", "leftover"])
@pytest.mark.parametrize("at", range(5))
@pytest.mark.parametrize("half", [False, True])
def test_a_state_is_found_whenever_it_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None, at: int, half: bool
) -> None:
    """Killed before (or, removing a folder, in the middle of) any file operation of the replacement."""
    whole_state(tmp_path / "state.partial", "new")
    if old in ("state", "both"):
        whole_state(tmp_path / "state", "old")
    if old in ("both", "leftover"):
        whole_state(tmp_path / "state.old", "older")
    operations: list[str] = []

    def counted(real: Any) -> Any:
        def operation(path: Path, *arguments: Any, **options: Any) -> Any:
            operations.append(real.__name__)
            if len(operations) > at:
                if half and real is shutil_rmtree and path.exists():
                    (path / "data").unlink()
                raise Killed
            return real(path, *arguments, **options)

        return operation

    shutil_rmtree = shutil.rmtree
    monkeypatch.setattr(module.shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    try:
        replace_state(tmp_path)
        finished = True
    except Killed:
        finished = False
    found = find_state(tmp_path)
    if finished:
        assert found == tmp_path / "state"
        assert (found / "data").read_text() == "new"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    elif old is not None:
        assert found is not None
        assert (found / "data").read_text() == (found / "position.json").read_text()
        assert not (old in ("state", "both") and (found / "data").read_text() == "older")


def test_there_is_no_state_in_an_empty_or_half_written_run(tmp_path: Path) -> None:
    assert find_state(tmp_path / "absent") is None
    (tmp_path / "state.partial").mkdir()
    assert find_state(tmp_path) is None


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_missing_shard_is_refused(recipe: Recipe, copied: Path) -> None:
    (copied / "state" / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"the state is damaged, {SHARD} is missing; restore it, or delete"):
        trained(recipe, copied)


def test_a_torn_shard_is_refused(recipe: Recipe, copied: Path) -> None:
    shard = copied / "state" / SHARD
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=f"the state is damaged, {SHARD} has 1000 bytes of {size}"):
        trained(recipe, copied)


def test_a_broken_shard_of_the_right_size_is_refused(recipe: Recipe, copied: Path) -> None:
    shard = copied / "state" / SHARD
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(CheckpointError, match="the state cannot be read"):
        trained(recipe, copied)


def edit_shard(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of the state, and the size that the position says."""
    from safetensors import safe_open

    shard = run / "state" / SHARD
    tensors = load_file(shard)
    with safe_open(shard, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, shard, metadata)
    position = json.loads((run / "state" / "position.json").read_text())
    position["files"][SHARD] = shard.stat().st_size
    (run / "state" / "position.json").write_text(json.dumps(position))


def test_a_state_that_is_not_finite_is_refused(recipe: Recipe, copied: Path) -> None:
    edit_shard(copied, lambda tensors: tensors["weights.model.patch.bias"].fill_(torch.nan))
    with pytest.raises(
        CheckpointError, match=r"state: NaN or infinity in weights\.model\.patch\.bias; it has diverged"
    ):
        trained(recipe, copied)


def test_an_incomplete_state_is_refused(recipe: Recipe, copied: Path) -> None:
    edit_shard(copied, lambda tensors: tensors.pop("ema.model.patch.bias"))
    with pytest.raises(CheckpointError, match=r"the state cannot be read .*ema\.model\.patch\.bias") as caught:
        trained(recipe, copied)
    assert "\n" not in str(caught.value)


def test_a_damaged_position_is_refused(recipe: Recipe, copied: Path) -> None:
    (copied / "state" / "position.json").write_text("{")
    with pytest.raises(ValueError, match=r"position\.json: cannot be read as JSON"):
        trained(recipe, copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 3}, r"position\.json: config: stage 3 is not in its recipe"),
        ({"recipe": {"stages": [{}, {}]}}, r"position\.json: recipe\.name: Field required"),
    ],
)
def test_a_position_that_makes_no_sense_is_no_checkpoint(
    copied: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = copied / "state" / "position.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message):
        consolidate_run(copied, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_missing_vae_is_refused(recipe: Recipe, copied: Path) -> None:
    (copied / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae\.safetensors: not a readable safetensors file"):
        trained(recipe, copied)


def test_nothing_but_safetensors_and_json_is_written(whole: Path) -> None:
    assert {path.suffix for path in (whole / "state").iterdir()} == {".safetensors", ".json"}


def test_the_state_holds_weights_averages_and_moments_but_no_vae(whole: Path) -> None:
    tensors = load_file(whole / "state" / SHARD)
    names = {name.split(".", 1)[1] for name in tensors if name.startswith("weights.")}
    assert names == {name.split(".", 1)[1] for name in tensors if name.startswith("ema.")}
    assert names == {name.split(".", 2)[2] for name in tensors if name.startswith("optimizer.exp_avg.")}
    assert {name.split(".")[0] for name in names} == {"model", "text_encoder"}
    assert read_position(whole / "state").processes == 1


def test_single_tensors_can_be_read(whole: Path) -> None:
    wanted = load_file(whole / "state" / SHARD)["ema.model.patch.bias"]
    target = {"ema.model.patch.bias": torch.zeros_like(wanted)}
    load_tensors_into(target, whole / "state", alone=True)
    assert torch.equal(target["ema.model.patch.bias"], wanted)
