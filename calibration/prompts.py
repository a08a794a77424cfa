"""Prompts, and first frames for image-to-video, that are given to calibration in files."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stiv_deploy.calibration.errors import CalibrationError
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.pictures import read_picture
from stiv_deploy.stiv_ref.files import read_text

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif")


def read_prompts(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty; :class:`CalibrationError` if there are none."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except ValueError as error:
        raise CalibrationError(f"{path}: cannot be read ({error}); give a text file, one prompt a line") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise CalibrationError(f"{path}: no prompts in it; give a text file, one prompt a line")
    return prompts


def prompts_hash(prompts: list[str]) -> str:
    """SHA-256 (hex) of prompts, in their order."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def read_images(folder: Path, height: int, width: int) -> Tensor:
    """All pictures of ``folder`` by name, cropped to the size: fp32 [N, 3, height, width] in [-1, 1].

    They are read as ``stiv generate`` reads them. Raises :class:`CalibrationError` if there is none or one cannot be.
    """
    from PIL import Image, ImageOps

    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise CalibrationError(f"{folder}: no pictures in it ({', '.join(IMAGES)}); give a folder of first frames")
    pixels = []
    for path in paths:
        try:
            pixels.append(np.asarray(ImageOps.fit(Image.fromarray(read_picture(path)), (width, height))))
        except RequestError as error:
            raise CalibrationError(str(error)) from None
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
