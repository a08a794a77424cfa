"""Stages: where their weights come from, and that a stage with carried weights starts far below one from scratch."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint, save_checkpoint
from stiv_deploy.stiv_ref.data.moving_digits import WORDS, micro_conditions
from stiv_deploy.stiv_ref.data.open_source import open_source
from stiv_deploy.stiv_ref.errors import CheckpointError
from stiv_deploy.stiv_ref.initialization import is_temporal
from stiv_deploy.stiv_ref.recipe import Optimizer, Recipe, Stage
from stiv_deploy.stiv_ref.text import tokenize
from stiv_deploy.stiv_ref.training.muon import Muon
from stiv_deploy.stiv_ref.training.parallel import Team
from stiv_deploy.stiv_ref.training.run import Run, new_run
from stiv_deploy.stiv_ref.training.stages import begin_stage, origins, untrained_checkpoint
from stiv_deploy.stiv_ref.training.step import sample_losses
from stiv_deploy.stiv_ref.training.trainer import TrainRequest, train

OUT = Path("run")


def staged(recipe: Recipe, *stages: dict[str, Any]) -> Recipe:
    """``recipe`` with other stages, each by what differs from its two own ones."""
    bases = {"t2i": recipe.stages[0], "t2v": recipe.stages[1], "ti2v": recipe.stages[1]}
    made = [Stage.model_validate({**bases[stage["task"]].model_dump(), **stage}) for stage in stages]
    sampling = {**recipe.sampling.model_dump(), "frames": 4}
    changes = {"sampling": sampling, "stages": [stage.model_dump() for stage in made]}
    return Recipe.model_validate({**recipe.model_dump(), **changes})


PROGRESSIVE = (
    {"task": "t2i", "name": "i-low"},
    {"task": "t2i", "name": "i-high", "resolution": (64, 64)},
    {"task": "t2v", "name": "v-low", "spatial_from": "i-low"},
    {"task": "t2v", "name": "v-high", "resolution": (64, 64), "spatial_from": "i-high", "temporal_from": "v-low"},
    {"task": "ti2v", "name": "iv-high", "resolution": (64, 64)},
    {"task": "ti2v", "name": "anew", "spatial_from": "scratch"},
    {"task": "ti2v", "name": "elsewhere", "spatial_from": "some/model", "temporal_from": "./time"},
)


def test_origins_are_the_stage_before_or_what_the_recipe_says(recipe: Recipe) -> None:
    def stage(name: str) -> Path:
        return OUT / "stages" / name

    progressive = staged(recipe, *PROGRESSIVE)
    assert [origins(progressive, number, OUT) for number in range(1, 8)] == [
        (None, None),
        (stage("i-low"), None),
        (stage("i-low"), None),
        (stage("i-high"), stage("v-low")),
        (stage("v-high"), stage("v-high")),
        (None, None),
        (Path("some/model"), Path("time")),
    ]


@pytest.fixture(scope="module")
def _taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("taught") / "run"


@pytest.fixture
def taught(_taught: Path, recipe: Recipe) -> Path:
    """A run with an image stage at two resolutions and a video stage that have learned a little, made once."""
    if not (_taught / "checkpoint").exists():
        quick = {"learning_rate": 1e-2, "warmup": 5, "logit_normal": False}
        made = staged(
            recipe.model_copy(update={"save_every": 10_000}),
            {"task": "t2i", "name": "i-low", "steps": 150, "batch": 16, **quick},
            {"task": "t2i", "name": "i-high", "resolution": (64, 64), "steps": 30, "batch": 8, **quick},
            {"task": "t2v", "name": "v-low", "spatial_from": "i-low", "steps": 30, "batch": 8, **quick},
        )
        vae = made.vae.model_copy(update={"steps": 60, "batch": 16})
        train(TrainRequest(recipe=made.model_copy(update={"vae": vae, "ema": 0.9}), out=_taught))
    return _taught


def start_loss(recipe: Recipe, out: Path, stage: dict[str, Any]) -> float:
    """Loss of 32 samples in front of the first step of a further stage of the run in ``out``."""
    names = ("i-low", "i-high", "v-low")
    known = ({"task": "t2i", "name": name} if name[0] == "i" else {"task": "t2v", "name": name} for name in names)
    recipe = staged(recipe, *known, {"name": "next", "logit_normal": False, **stage})
    run = new_run(recipe, out, Team(device=torch.device("cpu")), WORDS, resumed=True)
    run.vae = load_checkpoint(out / "checkpoint").vae
    run.stage = 4
    begin_stage(run)
    [[batch]] = list(open_source(recipe, run.current, 4).batches(range(1), [range(32)]))
    with torch.no_grad():
        return sample_losses(run, batch, range(32))[0].mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "origin"),
    [
        ({"task": "t2v"}, {"spatial_from": "i-low"}),
        ({"task": "t2v"}, {"spatial_from": "i-low", "temporal_from": "v-low"}),
        ({"task": "t2v", "resolution": (64, 64)}, {"spatial_from": "i-high", "temporal_from": "v-low"}),
        ({"task": "t2v", "resolution": (64, 64), "frames": 4, "patch_frames": 2}, {"spatial_from": "i-high"}),
        ({"task": "ti2v", "frames": 5}, {}),
    ],
    ids=["images to video", "both", "higher resolution", "patch inflation", "longer, with images"],
)
def test_a_stage_on_carried_weights_starts_far_below_scratch(
    recipe: Recipe, taught: Path, stage: dict[str, Any], origin: dict[str, str]
) -> None:
    carried = start_loss(recipe, taught, {**stage, **origin})
    scratch = start_loss(recipe, taught, {**stage, "spatial_from": "scratch"})
    assert carried < 0.8 * scratch


def fresh(recipe: Recipe, out: Path, stage: int) -> Run:
    run = new_run(recipe, out, Team(device=torch.device("cpu")), WORDS)
    run.stage = stage
    begin_stage(run)
    return run


@pytest.fixture
def after_images(recipe: Recipe, tmp_path: Path) -> Path:
    """A run whose first stage is done, with random weights as its result."""
    made = untrained_checkpoint(recipe.model_copy(update={"stages": recipe.stages[:1]}))
    generator = torch.Generator().manual_seed(0)
    for module in (made.model, made.text_encoder):
        for parameter in module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(tmp_path / "stages" / "1-t2i", made)
    return tmp_path


def test_the_video_model_starts_as_the_image_model_frame_by_frame_but_for_their_places(
    recipe: Recipe, after_images: Path
) -> None:
    image, run = load_checkpoint(after_images / "stages" / "1-t2i"), fresh(recipe, after_images, 2)
    assert run.model is not None
    assert run.model.config.temporal
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 4, 8, 8, generator=generator)
    micro, t = micro_conditions(2, 3), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        text = run.text.encoder(*tokenize(run.text.tokenizer, ["digit one", "digit two moving up"]))
        run.model.frame_position.weight.zero_()
        video = run.model(latents, t, micro, *text)
        frames = torch.cat([image.model(latents[:, at : at + 1], t, micro, *text) for at in range(3)], dim=1)
    assert video.std() > 0.1
    torch.testing.assert_close(video, frames, rtol=0, atol=1e-5 * float(video.abs().max()))


def test_a_stage_continues_from_the_result_of_the_one_before(recipe: Recipe, after_images: Path) -> None:
    before, run = load_checkpoint(after_images / "stages" / "1-t2i"), fresh(recipe, after_images, 2)
    wanted = {f"model.{name}": each for name, each in before.model.state_dict().items()}
    wanted |= {f"text_encoder.{name}": each for name, each in before.text_encoder.state_dict().items()}
    assert all(torch.equal(run.parameters[name], each) for name, each in wanted.items())
    assert all(is_temporal(name.removeprefix("model.")) for name in run.parameters if name not in wanted)
    assert all(torch.equal(run.averages[name], parameter) for name, parameter in run.parameters.items())


@pytest.mark.parametrize(("own", "used"), [(None, torch.optim.AdamW), ({"name": "muon"}, Muon)])
def test_a_stage_has_the_optimizer_of_the_recipe_or_its_own(
    recipe: Recipe, after_images: Path, own: dict[str, str] | None, used: type[torch.optim.Optimizer]
) -> None:
    second = recipe.stages[1].model_copy(update={"optimizer": own and Optimizer.model_validate(own)})
    stages = (recipe.stages[0], second)
    assert type(fresh(recipe.model_copy(update={"stages": stages}), after_images, 2).optimizer) is used


def test_a_stage_from_scratch_takes_nothing(recipe: Recipe, after_images: Path) -> None:
    stages = (recipe.stages[0], recipe.stages[1].model_copy(update={"spatial_from": "scratch"}))
    run = fresh(recipe.model_copy(update={"stages": stages}), after_images, 2)
    before = load_checkpoint(after_images / "stages" / "1-t2i")
    assert not torch.equal(run.parameters["model.patch.weight"], before.model.patch.weight)
    assert not torch.equal(run.parameters["text_encoder.tokens.weight"], before.text_encoder.tokens.weight)
    assert (run.parameters["model.head.out.weight"] == 0).all()


@pytest.mark.parametrize("text_from", ["spatial", "temporal"])
def test_what_reads_the_text_comes_from_one_origin(recipe: Recipe, after_images: Path, text_from: str) -> None:
    """Cross-attention, text projections and the trained encoder stay together: of the image or of the video model."""
    progressive = staged(recipe, *PROGRESSIVE[:3], {**PROGRESSIVE[3], "text_from": text_from})
    image = load_checkpoint(after_images / "stages" / "1-t2i")
    save_checkpoint(after_images / "stages" / "i-high", image)
    video = untrained_checkpoint(recipe)
    for parameter in (*video.text_encoder.parameters(), *video.model.parameters()):
        parameter += 1
    save_checkpoint(after_images / "stages" / "v-low", video)
    run = fresh(progressive, after_images, 4)
    text = video if text_from == "temporal" else image
    assert torch.equal(run.parameters["text_encoder.tokens.weight"], text.text_encoder.tokens.weight)
    for name in ("text_in.weight", "text_out.bias", "blocks.1.cross.kv.weight", "singleton.pooled.weight"):
        assert torch.equal(run.parameters[f"model.{name}"], text.model.state_dict()[name]), name
    assert torch.equal(run.parameters["model.patch.weight"], image.model.patch.weight)
    name = "blocks.0.temporal.qkv.weight"
    assert torch.equal(run.parameters[f"model.{name}"], video.model.state_dict()[name])


def test_an_origin_with_other_words_is_refused(recipe: Recipe, after_images: Path) -> None:
    run = new_run(recipe, after_images, Team(device=torch.device("cpu")), [*WORDS, "cat"])
    run.stage = 2
    with pytest.raises(CheckpointError, match="other words or sizes .* use it frozen: .text. kind = 'checkpoint'"):
        begin_stage(run)


def test_a_lost_stage_is_named(recipe: Recipe, after_images: Path) -> None:
    shutil.rmtree(after_images / "stages")
    with pytest.raises(CheckpointError, match=r"stages/1-t2i: no checkpoint here"):
        fresh(recipe, after_images, 2)
