"""Frame replacement and condition dropout."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.conditioning import draw_dropout, noise_frames, replace_frames

N = 40_000


def normal(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))


masks = st.lists(st.booleans(), min_size=8, max_size=8).map(lambda flags: torch.tensor(flags).reshape(2, 4))


@given(mask=masks)
def test_given_frames_are_bit_equal_and_the_others_untouched(mask: torch.Tensor) -> None:
    latents, clean = normal(0), normal(1)
    got = replace_frames(latents, clean, mask)
    assert torch.equal(got[mask], clean[mask])
    assert torch.equal(got[~mask], latents[~mask])


@given(mask=masks)
def test_hidden_frames_lie_on_the_noising_path(mask: torch.Tensor) -> None:
    latents, clean, noise = normal(0), normal(1), normal(2)
    t = torch.tensor([0.25, 0.75])
    got = noise_frames(latents, clean, noise, t, mask)
    path = t[:, None, None, None, None] * clean + (1 - t[:, None, None, None, None]) * noise
    torch.testing.assert_close(got[mask], path[mask])
    assert torch.equal(got[~mask], latents[~mask])


def within(share: float, wanted: float, count: int = N) -> bool:
    """Five standard deviations of a binomial share: wrong by chance once in two million runs."""
    return abs(share - wanted) <= 5 * math.sqrt(max(wanted * (1 - wanted), 1e-12) / count)


@pytest.mark.parametrize(
    ("text", "image", "joint"),
    [(0.1, 0.1, 0.5), (0.1, 0.5, 0.16), (0.0, 0.3, 0.0), (0.3, 0.0, 0.5), (0.1, 1.0, 0.1), (1.0, 1.0, 1.0), (0, 0, 0)],
)
def test_dropout_rates(text: float, image: float, joint: float) -> None:
    drop_text, drop_image = draw_dropout(
        N, text=text, image=image, joint=joint, generator=torch.Generator().manual_seed(0)
    )
    assert within(drop_image.float().mean().item(), image)
    assert within(drop_text.float().mean().item(), text)
    # Both: the joint share, and the text dropped on its own from the others, which hits dropped images too.
    both = joint * image
    alone = (text - both) / (1 - both) if both < 1 else 0.0
    assert within((drop_text & drop_image).float().mean().item(), both + (image - both) * alone)


@settings(max_examples=50)
@given(text=st.floats(-0.5, 1.5), image=st.floats(-0.5, 1.5), joint=st.floats(0, 1))
def test_rates_are_drawn_or_refused(text: float, image: float, joint: float) -> None:
    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        return draw_dropout(4, text=text, image=image, joint=joint, generator=torch.Generator())

    if 0 <= text <= 1 and 0 <= image <= 1 and joint * image <= text:
        drop_text, drop_image = draw()
        assert drop_text.shape == drop_image.shape == (4,)
    else:
        with pytest.raises(ValueError, match="dropout rates must lie in"):
            draw()
