"""From prompts to pixels."""

import numpy as np
import pytest
import torch

from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.data.digit_requests import balanced_requests, real_clips
from stiv_deploy.stiv_ref.fused.modules import fuse
from stiv_deploy.stiv_ref.generation import generate, seeded_noise, settings_of
from stiv_deploy.stiv_ref.recipe import Recipe
from stiv_deploy.stiv_ref.training.stages import untrained_checkpoint


@pytest.fixture
def checkpoint(recipe: Recipe) -> Checkpoint:
    """The short recipe's components, random, with a velocity that is not zero."""
    made = untrained_checkpoint(recipe)
    generator = torch.Generator().manual_seed(0)
    for module in (made.model, made.text_encoder):
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def test_noise_belongs_to_the_seed_alone() -> None:
    together, alone = seeded_noise([3, 4], (2, 1, 2, 2)), seeded_noise([4], (2, 1, 2, 2))
    assert together.dtype == torch.float32
    assert torch.equal(together[1:], alone)
    philox = np.random.Generator(np.random.Philox(4)).standard_normal((2, 1, 2, 2), dtype=np.float32)
    assert torch.equal(alone[0], torch.from_numpy(philox))
    many = seeded_noise(range(100), (64,))
    assert abs(many.mean().item()) < 5 / 80
    assert abs(many.std().item() - 1) < 5 / 80 / 2**0.5


def test_a_batch_equals_single_runs(checkpoint: Checkpoint) -> None:
    settings, prompts = settings_of(checkpoint.config.sampling), ["digit one moving up", "digit two"]
    together = generate(checkpoint, prompts, [5, 9], settings, frames=3)
    assert together.shape == (2, 3, 3, 32, 32)
    assert together.abs().max() <= 1
    for index, seed in enumerate((5, 9)):
        alone = generate(checkpoint, prompts[index : index + 1], [seed], settings, frames=3)
        torch.testing.assert_close(alone[0], together[index], rtol=0, atol=1e-5)


def test_a_model_with_fused_attention_or_of_a_narrow_type(checkpoint: Checkpoint) -> None:
    settings, prompts = settings_of(checkpoint.config.sampling), ["digit one moving up"]
    native = generate(checkpoint, prompts, [5], settings, frames=3)
    fuse(checkpoint.model)
    torch.testing.assert_close(generate(checkpoint, prompts, [5], settings, frames=3), native, rtol=0, atol=1e-5)
    checkpoint.model.bfloat16()
    narrow = generate(checkpoint, prompts, [5], settings, frames=3)
    assert narrow.dtype == torch.float32
    assert narrow.isfinite().all()


def test_prompt_and_seed_matter(checkpoint: Checkpoint) -> None:
    settings = settings_of(checkpoint.config.sampling)
    base, other_prompt, other_seed = (
        generate(checkpoint, [prompt], [seed], settings, frames=2)
        for prompt, seed in (("digit one", 0), ("digit nine moving up", 0), ("digit one", 1))
    )
    assert not torch.allclose(base, other_prompt)
    assert not torch.allclose(base, other_seed)


def test_the_first_frame_is_the_given_one_through_the_vae(checkpoint: Checkpoint) -> None:
    first = real_clips(balanced_requests(2, moving=True), 3)[:, 0]
    video = generate(
        checkpoint,
        ["digit one", "digit two"],
        [0, 1],
        settings_of(checkpoint.config.sampling),
        frames=3,
        first_frames=first,
    )
    vae = checkpoint.vae
    torch.testing.assert_close(video[:, 0], vae.decode(vae.encode(first[:, None]))[:, 0], rtol=0, atol=1e-5)
