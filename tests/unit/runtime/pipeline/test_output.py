"""Frames in every form, and a clip written by the name that diffusers' users know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stiv_deploy.runtime import OutputError, export_to_video
from stiv_deploy.runtime.pipeline.output import StivOutput, as_frames
from stiv_deploy.runtime.pipeline.request import GenerationRequest

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


def output_at(*rates: float) -> StivOutput:
    """A clip of each frame rate."""
    requests = [GenerationRequest(prompt=f"clip {rate}", fps=rate) for rate in rates]
    frames, latents = np.stack([CLIP] * len(rates)), np.zeros((len(rates), 1, 1, 1, 1), np.float32)
    return StivOutput(
        frames=frames, latents=latents, requests=requests, bundle="b", backend="onnxruntime", timings={"total": 1.0}
    )


def test_the_output_has_its_frame_rate() -> None:
    assert output_at(12.5).fps == output_at(12.5, 12.5).fps == 12.5
    with pytest.raises(OutputError, match="different frame rates, 8 and 12; give all the same"):
        _ = output_at(8, 12).fps


def test_small_clips_are_written_visibly_and_a_switch_leaves_them(tmp_path: Path) -> None:
    sizes = {}
    for name, factor in {"a.webp": None, "b.webp": 1, "c.webp": 5}.items():
        (path,) = output_at(8).write(tmp_path / name, factor)
        sizes[name] = Image.open(path).size
    assert sizes == {"a.webp": (6 * 64, 4 * 64), "b.webp": (6, 4), "c.webp": (30, 20)}
    (folder,) = output_at(8).write(tmp_path / "frames")
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "frame_001.png")), CLIP[1])


def test_a_clip_is_written_under_the_name_of_diffusers(tmp_path: Path) -> None:
    path = export_to_video(FORMS["pictures"], str(tmp_path / "clip.gif"), fps=5)
    with Image.open(path) as written:
        assert (written.n_frames, written.info["duration"]) == (3, 200)
    with pytest.raises(OutputError):
        export_to_video(CLIP, tmp_path / "clip.xyz")
