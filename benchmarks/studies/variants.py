"""Models that exist for the ablations only: causal temporal attention, and the image through cross-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stiv_deploy.stiv_ref.block import SelfAttention
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.rope import rotate
from stiv_deploy.stiv_ref.text import TextStates


class CausalAttention(SelfAttention):
    """Self-attention that sees no later frame."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As :meth:`SelfAttention.forward`, with row i attending to rows 0..i."""
        rows, length, width = x.shape
        qkv = self.qkv(x).reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(rows, length, width))


class CausalStiv(Stiv):
    """STIV whose temporal attention is causal; same parameters, same names."""

    def __init__(self, config: StivConfig) -> None:
        super().__init__(config)
        for block in self.blocks:
            block.temporal = CausalAttention(config.width, config.heads)


class ImageTokens(nn.Module):
    """Clean latents of the first frame -> tokens of the text's width: one linear, or an MLP four times as wide."""

    def __init__(self, config: StivConfig, *, large: bool) -> None:
        super().__init__()
        self.patch_size = config.patch[1]
        values, width = config.patch_values // config.patch[0], config.text_width
        hidden = 4 * width
        layers = [nn.Linear(values, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)]
        self.project = nn.Sequential(*layers) if large else nn.Linear(values, width)
        self.place = nn.Linear(4, width, bias=False)

    def forward(self, latents: Tensor) -> Tensor:
        """Tokens [B, S, Dt] of latents [B, C, h, w]: projected patches plus a projection of their place."""
        patches = F.pixel_unshuffle(latents, self.patch_size)  # (B, C * ps^2, rows, columns)
        _, _, rows, columns = patches.shape
        angles = [(torch.arange(size) + 0.5) * (torch.pi / size) for size in (rows, columns)]
        row, column = torch.meshgrid(*angles, indexing="ij")
        place = torch.stack([row.cos(), row.sin(), column.cos(), column.sin()], dim=-1).flatten(0, 1)  # (S, 4)
        return self.project(patches.flatten(2).transpose(1, 2)) + self.place(place)


class ImageCrossStiv(Stiv):
    """STIV that also reads the first frame's clean latents as tokens beside the text's, in cross-attention."""

    large = False

    def __init__(self, config: StivConfig) -> None:
        super().__init__(config)
        self.image_tokens = ImageTokens(config, large=self.large)

    def initialize(self, generator: torch.Generator | None = None) -> "ImageCrossStiv":
        """As :meth:`Stiv.initialize`; places of image tokens start at unit size."""
        super().initialize(generator)
        nn.init.normal_(self.image_tokens.place.weight, std=2**-0.5, generator=generator)
        return self

    def with_image(self, text: TextStates, clean: Tensor, seen: Tensor) -> TextStates:
        """``text`` with tokens of frame 0 of ``clean`` [B, T, C, h, w], masked where ``seen`` (bool [B]) is false."""
        tokens = self.image_tokens(clean[:, 0])
        mask = seen[:, None].to(text.mask.dtype).expand(-1, tokens.shape[1])
        return TextStates(torch.cat((text.states, tokens), 1), torch.cat((text.mask, mask), 1), text.pooled)


class LargeImageCrossStiv(ImageCrossStiv):
    """The same with the larger projection."""

    large = True


def by_cross_attention(model: Stiv, text: TextStates, clean: Tensor, given: Tensor) -> tuple[TextStates, Tensor]:
    """The image through cross-attention alone: no frame is replaced."""
    assert isinstance(model, ImageCrossStiv)
    return model.with_image(text, clean, given[:, 0]), torch.zeros_like(given)


def by_both(model: Stiv, text: TextStates, clean: Tensor, given: Tensor) -> tuple[TextStates, Tensor]:
    """The image through cross-attention and as the replaced first frame."""
    assert isinstance(model, ImageCrossStiv)
    return model.with_image(text, clean, given[:, 0]), given
