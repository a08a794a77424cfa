"""Clips out, by file extension, whole or not at all; and the comment that each carries."""

from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from stiv_deploy.runtime.errors import OutputError, RequestError, one_line
from stiv_deploy.runtime.files import check_file, check_folder, replaced_file, replaced_folder
from stiv_deploy.runtime.pipeline.animations import write_gif, write_webp
from stiv_deploy.runtime.pipeline.limits import bounded
from stiv_deploy.runtime.pipeline.pictures import unwarned

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

SUPPORTED = ".mp4, .gif, .webp, .png (all frames in one row), or a name without extension (a folder of PNG frames)"
EXTENSIONS = (".mp4", ".gif", ".webp", ".png", "")
SIDES = {".mp4": 16_384, ".gif": 65_535, ".webp": 16_383}
"""Pixels that a side may have, by extension: of x264, and of both formats."""
STREAMED = (".mp4", "")
"""What is written frame by frame."""
FRAME_NAME = "frame_{:03d}.png"
GAP = 2
"""Pixels between the frames of a contact sheet."""
BACKGROUND = (32, 32, 32)
INK = (235, 235, 235)
LABEL_HEIGHT = 16
"""Pixels above a row of a contact sheet for its label."""
# Visually lossless: a clip is small, and what is judged on it is the model's fault, not the codec's.
X264_OPTIONS = {"crf": "10", "preset": "medium"}
BT709 = 1
"""Primaries, transfer and matrix of BT.709, as H.264 numbers all three (ITU-T H.273)."""


def numbered(path: Path, count: int) -> list[Path]:
    """Where ``count`` clips go: ``path`` itself for one, else ``name-0.mp4``, ``name-1.mp4``, ..."""
    if count == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{index}{path.suffix}") for index in range(count)]


def check_output(path: str | Path, count: int = 1) -> list[Path]:
    """Where ``count`` clips will be written, after proving, before anything expensive, that they can be.

    Raises :class:`OutputError` if the extension is unknown, the folder is missing or not writable, or the name is taken
    by something that a clip cannot replace.
    """
    path = Path(path)
    if path.suffix.lower() not in EXTENSIONS:
        raise OutputError(f"{path}: cannot write {path.suffix!r}; choose {SUPPORTED}")
    if path.name.lower() in EXTENSIONS:
        raise OutputError(f"{path}: names no file; choose a name such as clip{path.name or '.mp4'}")
    targets = numbered(path, count)
    for target in targets:
        _check_file(target) if target.suffix else _check_folder(target)
    return targets


def check_sides(path: str | Path, height: int, width: int) -> None:
    """Raise :class:`OutputError` if frames of that size cannot be written to ``path``."""
    suffix = Path(path).suffix.lower()
    most = SIDES.get(suffix, max(height, width))
    if max(height, width) > most:
        raise OutputError(
            f"{path}: frames would be {width}x{height} pixels, and {suffix} takes {most} a side; enlarge less, or "
            "choose a folder of PNG frames"
        )


def _check_file(target: Path) -> None:
    if target.is_dir():
        raise OutputError(f"{target}: is a folder; choose a name without {target.suffix!r} to get a folder of frames")
    check_file(target, "choose another name")


def _check_folder(target: Path) -> None:
    check_folder(target, "choose another name for the folder of frames")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the folder {target.parent} does not exist; make it first")
    if target.exists() and any(target.iterdir()):
        raise OutputError(f"{target}: the folder is not empty; choose another name or empty it")


def _check_frames(frames: np.ndarray) -> np.ndarray:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise OutputError(f"frames must be uint8 [frames, height, width, 3], got {frames.dtype} {list(frames.shape)}")
    return frames


def enlarge(frames: np.ndarray, factor: int) -> np.ndarray:
    """Repeat each pixel ``factor`` times along height and width of uint8 [..., height, width, 3]."""
    if factor < 1:
        raise RequestError(f"upscale is {factor}; want 1 or more")
    return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)


def write_video(path: str | Path, frames: np.ndarray, fps: float, upscale: int = 1, comment: str | None = None) -> Path:
    """Write uint8 [frames, height, width, 3] to ``path`` in the format of its extension (see ``SUPPORTED``).

    Each pixel becomes ``upscale`` x ``upscale`` pixels. An mp4 of odd height or width gets one more row or column, as
    its colours have half the resolution; they are those of BT.709, and tagged so. A GIF has at most 50 frames a second:
    of more, evenly spaced ones are kept. ``comment`` goes into the file (the comment tag of mp4 and GIF, a text chunk
    of PNG, the Exif description of WebP; in a folder into the first frame), see :func:`read_comment`. Raises
    :class:`OutputError`, or :class:`RequestError` for ``fps`` or ``upscale``, and then leaves nothing behind.
    """
    (path,) = check_output(path)
    _, height, width, _ = _check_frames(frames).shape
    check_sides(path, height * upscale, width * upscale)
    frames, fps = enlarge(frames, upscale), bounded("fps", fps)
    with replaced_file(path) if path.suffix else replaced_folder(path) as temporary:
        match path.suffix.lower():
            case ".mp4":
                _write_mp4(temporary, frames, fps, comment)
            case ".png":
                _write_png(temporary, contact_sheet([frames]), comment)
            case "":
                _write_folder(temporary, frames, comment)
            case ".gif":
                write_gif(temporary, frames, fps, comment)
            case _:
                write_webp(temporary, frames, fps, comment)
    return path


def write_windows(
    path: str | Path, windows: Iterable[np.ndarray], fps: float, upscale: int = 1, comment: str | None = None
) -> Path:
    """As :func:`write_video`, of frames uint8 [N, height, width, 3] that come in ``windows`` of one size.

    An mp4 and a folder are written as they come; what becomes a GIF, WebP or PNG is in memory whole.
    """
    (path,) = check_output(path)
    fps = bounded("fps", fps)
    enlarged = (enlarge(_check_frames(window), upscale) for window in windows)
    if path.suffix.lower() not in STREAMED:
        return write_video(path, np.concatenate(list(enlarged)), fps, 1, comment)
    frames = (frame for window in enlarged for frame in window)
    with replaced_file(path) if path.suffix else replaced_folder(path) as temporary:
        if path.suffix:
            _write_mp4(temporary, frames, fps, comment)
        else:
            _write_folder(temporary, frames, comment)
    return path


def is_clip(path: Path) -> bool:
    """Whether ``path`` is called like what :func:`write_video` writes."""
    return path.is_dir() or (path.suffix != "" and path.suffix.lower() in EXTENSIONS)


def read_comment(path: Path) -> str:
    """The comment of a clip that :func:`write_video` wrote; :class:`RequestError` if there is none."""
    if path.is_dir():
        path = path / FRAME_NAME.format(0)
    if not path.is_file():
        raise RequestError("no such file")
    comment = _mp4_comment(path) if path.suffix.lower() == ".mp4" else _picture_comment(path)
    if not comment:
        raise RequestError("it carries no request; clips that 'stiv generate' wrote do")
    return comment


def _mp4_comment(path: Path) -> str | None:
    import av

    try:
        # only this file: what calls itself .mp4 may be a playlist that points anywhere
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            return container.metadata.get("comment")
    except av.FFmpegError as error:
        raise RequestError(f"not a video that can be read ({error})") from None


def _picture_comment(path: Path) -> str | None:
    """From what is read of a picture when it is opened: nothing is decoded, however large it is."""
    try:
        with unwarned(), Image.open(path, formats=("GIF", "PNG", "WEBP")) as image:
            described = image.getexif().get(ExifTags.Base.ImageDescription) if image.format == "WEBP" else None
            found = image.info.get("Comment") or image.info.get("comment") or described
    except Exception as error:  # on damage Pillow raises any of a dozen kinds
        raise RequestError(f"not a picture that can be read ({str(error)[:200]})") from None
    return found.decode("utf-8", "replace") if isinstance(found, bytes) else found


def _even(frame: np.ndarray) -> np.ndarray:
    """``frame`` [height, width, 3] with a row and a column more where there is an odd number of them."""
    return np.pad(frame, ((0, frame.shape[0] % 2), (0, frame.shape[1] % 2), (0, 0)), mode="edge")


def _write_mp4(path: Path, frames: Iterable[np.ndarray], fps: float, comment: str | None) -> None:
    import av

    even = map(_even, frames)
    first = next(even)
    rate = Fraction(fps).limit_denominator(1001)
    try:
        # file: is what keeps a name with a colon from being taken for a protocol
        with av.open(f"file:{path}", "w", options={"movflags": "+faststart"}) as container:
            if comment is not None:
                container.metadata["comment"] = comment
            stream = container.add_stream("libx264", rate=rate, options=X264_OPTIONS)
            stream.height, stream.width = first.shape[:2]
            stream.pix_fmt = "yuv420p"
            _tag_bt709(stream.codec_context)
            for frame in chain([first], even):
                container.mux(stream.encode(_bt709(frame)))
            container.mux(stream.encode())
    except OSError as error:  # PyAV's own name the unfinished file
        raise OSError(error.errno, error.strerror) from None
    except av.codec.codec.UnknownCodecError:
        raise OutputError(f"{path.name}: this PyAV has no encoder libx264; see 'stiv doctor', or write .webp") from None
    except (av.FFmpegError, ValueError) as error:
        raise OutputError(f"{path.name}: the video cannot be encoded ({one_line(str(error), 200)})") from None


def _tag_bt709(codec: "VideoCodecContext") -> None:
    """Say in the file how its colours are meant: players guess otherwise, and by the size of the picture."""
    from av.video.reformatter import ColorRange

    codec.color_primaries = codec.color_trc = codec.colorspace = BT709
    codec.color_range = ColorRange.MPEG


def _bt709(pixels: np.ndarray) -> "VideoFrame":
    """RGB uint8 [height, width, 3] as Y'CbCr of BT.709, in its limited range."""
    import av
    from av.video.reformatter import ColorRange, Colorspace

    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)


def _write_folder(path: Path, frames: Iterable[np.ndarray], comment: str | None) -> None:
    for index, frame in enumerate(frames):
        _write_png(path / FRAME_NAME.format(index), Image.fromarray(frame), None if index else comment)


def _write_png(path: Path, image: Image.Image, comment: str | None) -> None:
    text = PngInfo()
    if comment is not None:
        text.add_text("Comment", comment)
    image.save(path, "PNG", pnginfo=text)


def contact_sheet(clips: Sequence[np.ndarray], labels: Sequence[str] = (), upscale: int = 1) -> Image.Image:
    """One row of frames per clip (uint8 [frames, height, width, 3] each), under its label if there are ``labels``."""
    if not clips or len(labels) not in (0, len(clips)):
        raise OutputError(f"a contact sheet wants one label per clip or none, got {len(labels)} for {len(clips)} clips")
    rows = [enlarge(_check_frames(clip), upscale) for clip in clips]
    font = ImageFont.load_default(LABEL_HEIGHT - 4)
    label_height = LABEL_HEIGHT if labels else 0
    widths = [len(row) * (row.shape[2] + GAP) for row in rows] + [int(font.getlength(label)) + GAP for label in labels]
    height = sum(label_height + row.shape[1] + GAP for row in rows)
    sheet = Image.new("RGB", (max(widths) + GAP, height + GAP), BACKGROUND)
    top = GAP
    for index, row in enumerate(rows):
        if labels:
            ImageDraw.Draw(sheet).text((GAP, top), labels[index], fill=INK, font=font)
        top += label_height
        for column, frame in enumerate(row):
            sheet.paste(Image.fromarray(frame), (GAP + column * (row.shape[2] + GAP), top))
        top += row.shape[1] + GAP
    return sheet
