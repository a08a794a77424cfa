"""Runs with [lora]: only factors are trained, the run goes on bit by bit, and what it leaves fits its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stiv_deploy.stiv_ref.checkpoint import checkpoint_hash, load_checkpoint, load_model
from stiv_deploy.stiv_ref.errors import CheckpointError, ConfigError
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.consolidate import consolidate_run
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.stages import check_origins
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, check, train


def adapting(recipe: Recipe, base: Path, steps: int = 4, **lora: Any) -> Recipe:
    """A LoRA of the checkpoint ``base``, by the last stage of ``recipe``."""
    frozen = {"kind": "checkpoint", "path": str(base)}
    stage = {**recipe.stages[-1].model_dump(), "spatial_from": str(base), "temporal_from": "", "steps": steps}
    settings = {"rank": 2, "alpha": 3.0, "targets": ("spatial.qkv", "cross.kv", "ffn.down", "patch"), **lora}
    values = {**recipe.model_dump(), "text": frozen, "vae": frozen, "stages": [stage], "lora": settings}
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def _lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora") / "run"


@pytest.fixture
def lora_run(_lora_run: Path, recipe: Recipe, whole: Path) -> Path:
    """A finished run with [lora], made once; do not write into it."""
    if not (_lora_run / "checkpoint").exists():
        train(TrainRequest(recipe=adapting(recipe, whole / "checkpoint"), out=_lora_run))
    return _lora_run


@pytest.mark.parametrize("step", [0, 2, 3])
def test_a_stopped_run_goes_on_bit_by_bit(
    lora_run: Path, recipe: Recipe, whole: Path, tmp_path: Path, runs: Any, before_step: Callable[..., None], step: int
) -> None:
    out = tmp_path / "run"
    before_step((1, step), runs.interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(TrainRequest(recipe=adapting(recipe, whole / "checkpoint"), out=out))
    assert not (out / "lora.safetensors").exists()
    assert train(TrainRequest(recipe=adapting(recipe, whole / "checkpoint"), out=out)).resumed == out / "state"
    runs.assert_same(out, lora_run)
    assert (out / "lora.safetensors").read_bytes() == (lora_run / "lora.safetensors").read_bytes()


def test_the_file_and_the_checkpoint_are_the_same_change(lora_run: Path, whole: Path) -> None:
    """Float32 weights of the checkpoint are those of the base, with alpha / r of B A in float64 where that is."""
    file = lora_run / "lora.safetensors"
    factors = {name: tensor.double() for name, tensor in load_file(file).items()}
    linears = {name.removesuffix(".lora_A.weight") for name in factors if name.endswith(".lora_A.weight")}
    blocks = {
        f"transformer.blocks.{number}.{name}" for number in (0, 1) for name in ("spatial.qkv", "cross.kv", "ffn.down")
    }
    assert linears == {*blocks, "transformer.patch"}
    base, result = (load_model(path).state_dict() for path in (whole / "checkpoint", lora_run / "stages" / "2-ti2v"))
    for name, weight in result.items():
        linear = f"transformer.{name.removesuffix('.weight')}"
        wanted = base[name].double()
        if linear in linears:
            down, up = (factors[f"{linear}.lora_{part}.weight"] for part in "AB")
            assert (len(down), up.shape[1]) == (2, 2)
            assert up.abs().max() > 0
            wanted = wanted + 3.0 / 2 * up @ down
        # One rounding of each of two products and three sums, of values below 1.
        assert (weight.double() - wanted).abs().max() <= (0 if linear not in linears else 5 * 2**-24), name


def test_the_file_says_what_it_is_for(lora_run: Path, whole: Path) -> None:
    with safe_open(lora_run / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    settings = json.loads(metadata.pop("lora_adapter_metadata"))
    assert metadata == {}
    assert settings["stiv.base"] == checkpoint_hash(whole / "checkpoint")
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (2, 3.0)
    assert (
        load_checkpoint(lora_run / "checkpoint").config.trained == load_checkpoint(whole / "checkpoint").config.trained
    )


def test_a_running_lora_is_consolidated(lora_run: Path, tmp_path: Path) -> None:
    consolidate_run(lora_run, tmp_path / "checkpoint")
    one, other = (load_model(path).state_dict() for path in (tmp_path / "checkpoint", lora_run / "stages" / "2-ti2v"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_another_checkpoint_in_its_place_is_no_way_to_go_on(
    lora_run: Path, recipe: Recipe, whole: Path, tmp_path: Path
) -> None:
    out, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(whole / "checkpoint", base)
    train(TrainRequest(recipe=adapting(recipe, base), out=out))
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    with pytest.raises(CheckpointError, match="base: another checkpoint than the run in .* was begun with; restore it"):
        train(TrainRequest(recipe=adapting(recipe, base), out=out))


def test_what_has_no_lora_says_so(recipe: Recipe, whole: Path) -> None:
    base = whole / "checkpoint"
    with pytest.raises(
        ConfigError, match=r"\[lora\] is trained by one process, there are 2; start it without torchrun"
    ):
        check(adapting(recipe, base), Team(world=2, device=torch.device("cpu")))
    with pytest.raises(ConfigError, match="lora.targets: the model has no linear 'qkw'; name linears such as"):
        check_origins(adapting(recipe, base, targets=("spatial.qkv", "qkw")))
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base_frames": 5})})
    with pytest.raises(CheckpointError, match="base_frames of .*checkpoint is 4, the recipe has 5; a LoRA leaves"):
        check_origins(adapting(other, base))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": {"kind": "words"}}, r'set kind = "checkpoint" and path = "a/base" in \[text\]'),
        ({"vae": {"kind": "checkpoint", "path": "b"}}, r'set kind = "checkpoint" and path = "a/base" in \[vae\]'),
        ({"spatial_from": ""}, "name its folder in spatial_from"),
        ({"temporal_from": "a/base"}, "leave out temporal_from"),
        ({"distill": "guidance", "guidance": [2.0, 6.0]}, "a stage that distills trains its whole model"),
        ({"twice": True}, r"\[lora\] trains one stage, there are 2"),
        ({"lora": {"rank": 0}}, "greater than or equal to 1"),
    ],
)
def test_recipes_that_cannot_have_one(recipe: Recipe, changes: dict[str, Any], said: str) -> None:
    values = adapting(recipe, Path("a/base")).model_dump()
    stage = values["stages"][0] | {key: each for key, each in changes.items() if key in values["stages"][0]}
    stages = [stage, stage | {"name": "second"}] if "twice" in changes else [stage]
    sections = {key: each for key, each in changes.items() if key in values and key != "stages"}
    with pytest.raises(ValueError, match=said):
        Recipe.model_validate({**values, "stages": stages, **sections})
