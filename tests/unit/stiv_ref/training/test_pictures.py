"""Contact sheets during training: what is shown, that sheets compare, and that training does not notice."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.plots import Row, contact_sheet
from stiv_deploy.stiv_ref.recipe import Logging, Stage
from stiv_deploy.stiv_ref.sampler import SamplingSettings
from stiv_deploy.stiv_ref.text import TextStates
from stiv_deploy.stiv_ref.training import pictures
from stiv_deploy.stiv_ref.training.pictures import averaged, choose, draw_index, draw_samples, generate_clips
from stiv_deploy.stiv_ref.vae import Vae, VaeConfig

SAMPLING = SamplingDefaults(steps=2)
STRIDE = 3


def encode(captions: Sequence[str]) -> TextStates:
    states = torch.tensor([[float(len(text)), 1.0] * 6 for text in captions])
    return TextStates(states.unsqueeze(1), torch.ones(len(states), 1, dtype=torch.int64), states)


@pytest.fixture
def model() -> Stiv:
    config = StivConfig(
        name="small", blocks=2, width=16, heads=2, text_width=12, base_frames=4, base_grid=(4, 4), frequency_width=8
    )
    generator = torch.Generator().manual_seed(0)
    model = Stiv(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(VaeConfig(channels=(4, 4))).eval()


def stage(task: str, frames: int) -> Stage:
    return Stage(name="a", task=task, steps=1, batch=1, frames=frames, learning_rate=1e-3, resolution=(8, 16))


def batch(frames: int) -> Batch:
    video = torch.rand(3, frames, 3, 8, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    micro = torch.tensor([[100.0, 200, 7, 9, 4, frames]]).repeat(3, 1)
    return Batch(video=video, captions=["one", "two three", "four"], micro=micro, names=["x", "y", "z"])


@pytest.mark.parametrize(
    ("task", "frames", "given"),
    [("t2i", 1, []), ("t2v", 4, []), ("ti2v", 4, [0]), ("predict", 6, [0, 1, 2, 3]), ("interpolate", 4, [0, 2])],
)
def test_subjects_are_of_the_data(task: str, frames: int, given: list[int], vae: Vae) -> None:
    data = batch(frames)
    subjects = choose(stage(task, frames), Logging(sample_count=2), data, vae, STRIDE)
    assert subjects.prompts == ["one", "two three"]
    assert subjects.shape == (frames, 4, 2, 4)
    stride = 4 if len(given) > 1 else STRIDE  # the data's, or the recommended one
    assert subjects.micro.tolist() == [[8, 16, 0, 0, stride, frames]] * 2
    assert [mask.nonzero().flatten().tolist() for mask in subjects.given] == [given] * 2
    assert data.video is not None
    with torch.no_grad():
        torch.testing.assert_close(subjects.clean[:, given], vae.encode(data.video[:2])[:, given])
    assert not subjects.clean[~subjects.given].any()
    assert subjects.unseen == "noised"


def test_sheets_of_views_are_sampled_as_views_are(model: Stiv, vae: Vae, tmp_path: Path, recorder: list[Any]) -> None:
    subjects = choose(stage("views", 4), Logging(sample_count=1), batch(4), vae, STRIDE)
    draw_samples(model, encode, vae, subjects, SAMPLING, tmp_path, stage=1, name="a", step=3)
    assert [settings.unseen for settings in recorder] == ["zero"]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings of every sampling."""
    found: list[Any] = []
    whole = pictures.sample
    monkeypatch.setattr(pictures, "sample", lambda *them: (found.append(them[2]), whole(*them))[1])
    return found


def test_a_sheet_shows_the_givings_of_a_mix_in_turn(vae: Vae) -> None:
    mixed = stage("t2v", 4).model_copy(update={"task": "mix", "givings": {"none": 0.4, "ends": 0.6}})
    subjects = choose(mixed, Logging(sample_count=3), batch(4), vae, STRIDE)
    assert subjects.given.int().tolist() == [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    assert [pictures._given_words(mask) for mask in subjects.given[:2]] == ["", "frames 0, 3 + "]
    assert pictures._given_words(torch.arange(12) < 1) == "image + "
    assert pictures._given_words(torch.arange(12) % 2 == 0) == "6 frames + "


def test_prompts_of_the_recipe_and_latents_of_shards(vae: Vae) -> None:
    latents = torch.randn(2, 3, 4, 2, 2)
    data = Batch(latents=latents, captions=["a", "b"], micro=torch.ones(2, 6), names=["a", "b"])
    logging = Logging(prompts=("my own",), sample_count=2)
    assert pictures.wanted(logging) == 1
    subjects = choose(stage("ti2v", 3), logging, data, vae, STRIDE)
    assert subjects.prompts == ["my own"]
    assert torch.equal(subjects.clean[:, :1], latents[:1, :1])


@pytest.mark.parametrize("task", ["ti2v", "interpolate"])
def test_given_frames_stay_and_a_sample_does_not_depend_on_its_neighbours(model: Stiv, vae: Vae, task: str) -> None:
    subjects = choose(stage(task, 4), Logging(sample_count=3), batch(4), vae, STRIDE)
    one_by_one, together = (
        generate_clips(model, encode, vae, subjects, SamplingSettings(steps=2), at_once) for at_once in (1, 3)
    )
    torch.testing.assert_close(one_by_one, together)
    with torch.no_grad():
        torch.testing.assert_close(together[subjects.given], vae.decode(subjects.clean)[subjects.given])
    assert (together[:, 1] - together[:, 0]).abs().max() > 1e-3


def test_training_does_not_notice(model: Stiv, vae: Vae, tmp_path: Path) -> None:
    weights = {name: each.clone() for name, each in model.state_dict().items()}
    next(model.parameters()).grad = torch.full_like(next(model.parameters()), 3.0)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    subjects = choose(stage("t2v", 4), Logging(sample_count=2), batch(4), vae, STRIDE)
    draw_samples(model, encode, vae, subjects, SAMPLING, tmp_path, stage=1, name="a", step=3)
    assert torch.equal(torch.rand(4), expected)
    assert model.training
    assert all(torch.equal(weights[name], each) for name, each in model.state_dict().items())
    assert (next(model.parameters()).grad == 3).all()


def test_averages_for_a_block_only() -> None:
    weights = [torch.tensor([1.0, 0.1]), torch.tensor([3.0])]
    averages = [torch.tensor([10.0, 0.3]), torch.tensor([30.0])]
    before = [each.clone() for each in (*weights, *averages)]

    def use() -> None:
        with averaged(weights, averages):
            assert [each.tolist() for each in weights] == [before[2].tolist(), before[3].tolist()]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert all(torch.equal(one, other) for one, other in zip((*weights, *averages), before, strict=True))


def test_sheets_of_one_stage_compare(model: Stiv, vae: Vae, tmp_path: Path) -> None:
    """The same weights give the same pixels at another step, others do not."""
    subjects = choose(stage("t2v", 4), Logging(sample_count=2), batch(4), vae, STRIDE)
    paths = []
    for step in (10, 20, 30):
        if step == 30:
            torch.nn.init.normal_(model.head.out.weight, generator=torch.Generator().manual_seed(9))
        paths.append(draw_samples(model, encode, vae, subjects, SAMPLING, tmp_path, stage=2, name="b", step=step))
    assert [path.name for path in paths] == ["b-0000010.png", "b-0000020.png", "b-0000030.png"]
    first, second, third = (np.asarray(Image.open(path).convert("RGB"))[24:] for path in paths)  # below the heading
    assert (first == second).all()
    assert (first != third).any()
    assert (tmp_path / "samples" / "index.png").exists()


def test_other_ranks_sample_and_do_not_write(model: Stiv, vae: Vae, tmp_path: Path) -> None:
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    subjects = choose(stage("t2v", 4), Logging(sample_count=1), batch(4), vae, STRIDE)
    draw_samples(model, encode, vae, subjects, SAMPLING, tmp_path, stage=1, name="a", step=0, write=False)
    assert len(calls) == SAMPLING.steps
    assert list(tmp_path.iterdir()) == []


def test_large_clips_are_made_small() -> None:
    shown = pictures._for_sheet(torch.arange(20.0).reshape(20, 1, 1, 1).expand(20, 3, 128, 512))
    assert shown.shape == (8, 3, 32, 128)
    assert (shown[0, 0, 0, 0], shown[-1, 0, 0, 0]) == (0, 19)


def sheet(run: Path, *, stage: int, step: int, level: float, caption: str = "one") -> None:
    video = np.full((4, 3, 16, 16), level, np.float32)
    (run / "samples").mkdir(exist_ok=True)
    out = run / "samples" / f"s{stage}-{step:07d}.png"
    about = {"stage": stage, "name": f"s{stage}", "step": step}
    contact_sheet([Row(video=video, caption=caption)], out, columns=1, zoom=1, heading="h", about=about)


def greys(path: Path) -> list[int]:
    """Grey levels of the cells of an index, from the left, by columns with 16 pixels of one, which letters have not."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, image.width, 3)
    found = []
    for column in range(pixels.shape[1]):
        values, counts = np.unique(pixels[:, column, 0], return_counts=True)
        for value, count in zip(values, counts, strict=True):
            if count >= 16 and value not in (255, *found) and (pixels[:, column] == value).all(1).sum() >= 16:
                found.append(int(value))
    return found


def test_index_has_columns_of_steps_in_order(tmp_path: Path) -> None:
    for step, level in ((200, 0.0), (100, -0.5), (300, 0.5)):
        sheet(tmp_path, stage=1, step=step, level=level)
    (tmp_path / "samples" / "mine.png").write_bytes(b"no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "samples" / "other.png")
    out = draw_index(tmp_path)
    assert out == tmp_path / "samples" / "index.png"
    assert greys(out) == [64, 128, 191]
    before = out.read_bytes()
    draw_index(tmp_path)  # the index itself is no sheet
    assert out.read_bytes() == before


def test_index_shows_stages_below_each_other_and_at_most_eight_steps(tmp_path: Path) -> None:
    for step in range(20):
        sheet(tmp_path, stage=1, step=step, level=step / 40)
    one = Image.open(draw_index(tmp_path) or "").size
    sheet(tmp_path, stage=2, step=0, level=0)
    two = Image.open(draw_index(tmp_path) or "").size
    assert two[1] == 2 * one[1]
    assert two[0] == one[0]
    chosen = pictures.spread(pictures.read_sheets(tmp_path / "samples")[:20])
    assert [each.about["step"] for each in chosen] == [0, 3, 5, 8, 11, 14, 16, 19]


def test_index_of_changed_prompts_shows_the_last_ones(tmp_path: Path) -> None:
    sheet(tmp_path, stage=1, step=1, level=-0.5, caption="old")
    sheet(tmp_path, stage=1, step=2, level=0.5, caption="new")
    out = draw_index(tmp_path)
    assert out is not None
    assert greys(out) == [191]


def test_no_sheets_no_index(tmp_path: Path) -> None:
    assert draw_index(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_samples_with_a_task_of_their_own_are_not_on_the_sheet(vae: Vae) -> None:
    mixed = replace(batch(4), tasks=[None, "views", None])
    subjects = choose(stage("predict", 6), Logging(), mixed, vae, STRIDE)
    assert subjects.prompts == ["one", "four"]
    assert len(choose(stage("predict", 6), Logging(), replace(mixed, tasks=["views"] * 3), vae, STRIDE)) == 3
