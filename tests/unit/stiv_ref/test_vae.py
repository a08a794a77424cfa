"""The per-frame VAE: shapes, frame independence, standardized latents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.vae import Vae, VaeConfig, vae_loss


@pytest.fixture
def vae() -> Vae:
    torch.manual_seed(0)
    return Vae(VaeConfig(latent_channels=3, channels=(4, 6))).eval().requires_grad_(False)


@settings(max_examples=10)
@given(batch=st.integers(1, 3), frames=st.integers(1, 4), rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_shapes(batch: int, frames: int, rows: int, columns: int) -> None:
    vae = Vae(VaeConfig(latent_channels=3, channels=(4, 6)))
    video = torch.rand(batch, frames, 3, 4 * rows, 4 * columns) * 2 - 1
    latents = vae.encode(video)
    assert latents.shape == (batch, frames, 3, rows, columns)
    assert vae.decode(latents).shape == video.shape


@pytest.mark.parametrize(("channels", "factor"), [((4,), 2), ((4, 4), 4), ((4, 4, 4), 8)])
def test_factor_is_what_the_config_says(channels: tuple[int, ...], factor: int) -> None:
    config = VaeConfig(channels=channels)
    assert config.spatial_factor == factor
    assert config.temporal_factor == 1
    assert Vae(config).encode(torch.zeros(1, 1, 3, 16, 16)).shape[-1] == 16 // factor


def test_frames_are_coded_on_their_own(vae: Vae) -> None:
    video = torch.rand(2, 3, 3, 8, 8) * 2 - 1
    together = vae.encode(video)
    torch.testing.assert_close(together[1:, 2:], vae.encode(video[1:, 2:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vae.decode(together)[:1, 1:2], vae.decode(together[:1, 1:2]), rtol=1e-5, atol=1e-6)


def test_standardized_latents_have_mean_0_and_variance_1_and_decode_the_same(vae: Vae) -> None:
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    raw = vae.encode(images.unsqueeze(1))
    before = vae.decode(raw)
    vae.standardize(images)
    latents = vae.encode(images.unsqueeze(1))
    # Errors of fp32 sums over 64 * 16 values per channel.
    torch.testing.assert_close(latents.mean(dim=(0, 1, 3, 4)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std(dim=(0, 1, 3, 4)), torch.ones(3), rtol=1e-4, atol=0)
    torch.testing.assert_close(vae.decode(latents), before, rtol=0, atol=1e-4)


def test_decoded_values_stay_in_range(vae: Vae) -> None:
    out = vae.decode(1e3 * torch.randn(1, 2, 3, 4, 4))
    assert out.abs().max() <= 1


def test_loss_is_reconstruction_plus_kl(vae: Vae) -> None:
    """KL(N(m, s^2) || N(0, 1)) by torch.distributions."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    mean, log_variance = vae.posterior(images)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, 1.0)).sum()
    reconstruction = vae.decoder(mean + noise * (0.5 * log_variance).exp())
    wanted = (reconstruction - images).square().mean() + 0.3 * kl / images.numel()
    got = vae_loss(vae, images, 0.3, noise)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=0)


def test_the_vae_can_learn() -> None:
    torch.manual_seed(0)
    vae = Vae(VaeConfig(latent_channels=3, channels=(8,)))
    images = torch.zeros(4, 3, 8, 8) - 1
    images[:, :, 2:6, 2:6] = 1
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        loss = vae_loss(vae, images, 1e-4, torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
