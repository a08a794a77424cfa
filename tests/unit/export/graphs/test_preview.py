"""The map from latents to colours: exact where the VAE is one."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.export.graphs.preview import PICTURES, drawn_pictures, fit_preview

MIX = torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, -1.0], [0.3, 0.0, 1.5]])
SHIFT = torch.tensor([0.1, -0.2, 0.3])


class LinearVae:
    """Latents are mixed means of 2x2 pixels."""

    config = SimpleNamespace(spatial_factor=2)

    def encode(self, video: Tensor) -> Tensor:
        pooled = F.avg_pool2d(video.flatten(0, 1), 2)
        mixed = torch.einsum("nchw,cd->ndhw", pooled, MIX) + SHIFT[:, None, None]
        return mixed.unflatten(0, video.shape[:2])

    def decode(self, latents: Tensor) -> Tensor:
        colours = torch.einsum("nchw,cd->ndhw", latents.flatten(0, 1) - SHIFT[:, None, None], MIX.inverse())
        return F.interpolate(colours, scale_factor=2.0).unflatten(0, latents.shape[:2])


def test_a_linear_vae_is_found() -> None:
    vae: Any = LinearVae()
    preview = fit_preview(vae)
    np.testing.assert_allclose(preview.weights, MIX.inverse(), atol=1e-5)
    np.testing.assert_allclose(preview.bias, -SHIFT @ MIX.inverse(), atol=1e-5)
    assert preview.error == pytest.approx(0, abs=1e-5)
    assert fit_preview(vae) == preview


def test_pictures_have_all_colours_and_dark_grounds() -> None:
    pictures = drawn_pictures(PICTURES, 16)
    assert pictures.shape == (PICTURES, 3, 16, 16)
    assert (pictures.min().item(), pictures.max().item()) == (-1, 1)
    assert (pictures.mean(dim=(1, 2, 3)) < -0.5).any()
