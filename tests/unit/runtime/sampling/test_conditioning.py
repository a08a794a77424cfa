import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling import conditioning
from stiv_deploy.runtime.sampling.guidance import BRANCHES, GuidanceMode
from stiv_deploy.stiv_ref import model as reference
from stiv_deploy.stiv_ref.data.moving_digits import micro_conditions

rng = np.random.default_rng(0)


def test_negative_indices_count_from_the_end() -> None:
    assert conditioning.frame_indices([0, -1, 3], 8) == [0, 7, 3]


@pytest.mark.parametrize("index", [8, -9])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(RequestError, match=rf"frame {index}, but the video has frames 0 to 7"):
        conditioning.frame_indices([index], 8)


def test_a_frame_cannot_be_given_twice() -> None:
    with pytest.raises(RequestError, match="image for frame 7 given twice"):
        conditioning.frame_indices([7, -1], 8)


@given(frames=st.integers(1, 9), data=st.data())
def test_masks_and_scattered_latents_agree(frames: int, data: st.DataObject) -> None:
    given_frames = data.draw(st.sets(st.integers(0, frames - 1)))
    latents = {index: rng.standard_normal((4, 2, 3)).astype(np.float32) for index in given_frames}
    mask = conditioning.frame_mask(frames, latents)
    clean = conditioning.scatter_frames(latents, (frames, 4, 2, 3))
    assert mask.tolist() == [index in given_frames for index in range(frames)]
    assert mask.dtype == np.bool_
    for index in range(frames):
        np.testing.assert_array_equal(clean[index], np.broadcast_to(latents.get(index, 0.0), (4, 2, 3)))


def test_only_branches_that_see_the_image_have_its_mask() -> None:
    mask = np.array([True, False])
    none = np.zeros_like(mask)
    wanted = {
        GuidanceMode.NONE: [mask],
        GuidanceMode.JIT: [mask, none],
        GuidanceMode.SIT: [mask, mask, none],
    }
    for mode, rows in wanted.items():
        found = [conditioning.row_mask(branch, mask) for branch in BRANCHES[mode]]
        np.testing.assert_array_equal(found, rows)


def test_additive_mask_is_the_reference_mask() -> None:
    mask = rng.integers(0, 2, (3, 7))
    ours = conditioning.additive_mask(mask)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, reference.additive_mask(torch.from_numpy(mask)).numpy())


def test_micro_conditions_are_those_of_training() -> None:
    np.testing.assert_array_equal(conditioning.micro_conditions(32, 32, 1, 8), micro_conditions(1, 8)[0].numpy())
