"""Frames in every form, and a clip written by the name that diffusers' users know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stiv_deploy.runtime import OutputError, export_to_video
from stiv_deploy.runtime.pipeline.output import as_frames

CLIP = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
FORMS: dict[str, Any] = {
    "array": CLIP,
    "floats": CLIP / 255,
    "pictures": [Image.fromarray(frame) for frame in CLIP],
    "tensor": torch.from_numpy(CLIP).permute(0, 3, 1, 2) / 255,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_clip_in_any_form_is_the_same_frames(form: str) -> None:
    frames = as_frames(FORMS[form])
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, CLIP)


def test_a_clip_is_written_under_the_name_of_diffusers(tmp_path: Path) -> None:
    path = export_to_video(FORMS["pictures"], str(tmp_path / "clip.gif"), fps=5)
    with Image.open(path) as written:
        assert (written.n_frames, written.info["duration"]) == (3, 200)
    with pytest.raises(OutputError):
        export_to_video(CLIP, tmp_path / "clip.xyz")
