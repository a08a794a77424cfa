import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.sampling import rope
from stiv_deploy.stiv_ref import rope as reference

ULP = np.finfo(np.float32).eps
"""Both sides compute in fp64 and round once; the fp64 libraries may differ below that, which can flip one rounding."""

sizes, bases = st.integers(1, 40), st.integers(1, 20)
head_dims, thetas = st.sampled_from([4, 8, 32, 64]), st.sampled_from([100.0, 10_000.0])


@given(frames=sizes, base=bases, head_dim=head_dims, theta=thetas)
def test_temporal_table_is_the_reference_table(frames: int, base: int, head_dim: int, theta: float) -> None:
    ours = rope.temporal_table(frames, head_dim, base, theta)
    theirs = reference.temporal_table(frames, head_dim, base, theta)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=0, atol=ULP)


@given(grid=st.tuples(sizes, sizes), base=st.tuples(bases, bases), head_dim=head_dims, theta=thetas)
def test_spatial_table_is_the_reference_table(
    grid: tuple[int, int], base: tuple[int, int], head_dim: int, theta: float
) -> None:
    ours = rope.spatial_table(grid, head_dim, base, theta)
    theirs = reference.spatial_table(grid, head_dim, base, theta)
    for mine, wanted in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, wanted.numpy(), rtol=0, atol=ULP)


def test_positions_are_squeezed_into_the_trained_range() -> None:
    np.testing.assert_array_equal(rope.positions(8, 4), np.arange(8) / 2)
    np.testing.assert_array_equal(rope.positions(3, 4), np.arange(3))


def test_grid_counts_patches_not_latents() -> None:
    facts = ModelFacts(
        name="patched",
        blocks=1,
        width=16,
        heads=2,
        patch=(2, 2),
        latent_channels=4,
        text_width=4,
        max_text_tokens=4,
        base_frames=4,
        base_grid=(4, 4),
        rope_theta=100.0,
        temporal=True,
        spatial_factor=8,
        temporal_factor=1,
    )
    dims = {"latent_height": 8, "latent_width": 4, "token_frames": 3}
    tables = rope.rope_tables(facts, dims)
    np.testing.assert_array_equal(tables["spatial_cos"], rope.spatial_table((4, 2), 8, (4, 4), 100.0)[0])
    assert tables["temporal_sin"].shape == (3, 4)
    still = rope.rope_tables(facts.model_copy(update={"temporal": False}), dims)
    assert set(still) == {"spatial_cos", "spatial_sin"}
