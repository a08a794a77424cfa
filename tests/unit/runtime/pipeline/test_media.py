"""Pictures and videos: round trips by format, refusals before the work, and nothing left behind after a failure."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.runtime.errors import OutputError, RequestError
from stiv_deploy.runtime.pipeline import animations, media
from stiv_deploy.runtime.pipeline.pictures import read_picture

FORMATS = ["clip.mp4", "clip.gif", "clip.webp", "clip.png", "clip"]


def make_clip(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright disc that moves right over a soft gradient; every frame differs."""
    y, x = np.mgrid[:height, :width]
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    for index in range(frames):
        disc = 200 * np.exp(-((x - 8 - 5 * index) ** 2 + (y - height / 2) ** 2) / 40)
        clip[index] = np.clip(disc + y, 0, 255).astype(np.uint8)[..., None]
    return clip


def decode(path: Path) -> tuple[np.ndarray, float]:
    """Frames uint8 [F, H, W, 3] and frame rate of a video file."""
    import av

    with av.open(str(path)) as container:
        rate = float(container.streams.video[0].average_rate or 0)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]), rate


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 arrays."""
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def test_mp4_round_trip(tmp_path: Path) -> None:
    clip = make_clip()
    decoded, rate = decode(media.write_video(tmp_path / "clip.mp4", clip, fps=12))
    assert decoded.shape == clip.shape
    assert rate == 12
    # x264 at crf 10 quantizes with a step of about 2 grey levels: an error of 2**2 / 12, 53 dB. Every 6 steps that rate
    # control adds to the quantizer double it, which costs 6 dB; 40 dB allows two such doublings.
    assert psnr(decoded, clip) > 40


def test_mp4_of_odd_size_repeats_the_last_row_and_column(tmp_path: Path) -> None:
    clip = make_clip(height=31, width=33)
    decoded, _ = decode(media.write_video(tmp_path / "clip.mp4", clip, fps=8))
    assert decoded.shape == (5, 32, 34, 3)
    assert psnr(decoded[:, :31, :33], clip) > 40


@pytest.mark.parametrize("fps", [8, 24000 / 1001])
def test_mp4_keeps_the_frame_rate(tmp_path: Path, fps: float) -> None:
    _, rate = decode(media.write_video(tmp_path / "clip.mp4", make_clip(), fps))
    assert rate == pytest.approx(fps, rel=1e-6)


def test_webp_is_lossless_and_timed(tmp_path: Path) -> None:
    clip = make_clip()
    with Image.open(media.write_video(tmp_path / "clip.webp", clip, fps=8)) as image:
        assert image.n_frames == len(clip)
        for index, frame in enumerate(clip):
            image.seek(index)
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)
            image.load()
            assert image.info["duration"] == 125


def test_gif_frames(tmp_path: Path) -> None:
    clip = make_clip()
    with Image.open(media.write_video(tmp_path / "clip.gif", clip, fps=10)) as image:
        assert (image.n_frames, image.size) == (5, (48, 32))
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0
        for index, frame in enumerate(clip):
            image.seek(index)
            # grey: the palette of 256 holds them all
            assert np.array_equal(np.asarray(image.convert("RGB")), frame)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 1e30, "24", None, True])
def test_a_frame_rate_that_is_none_is_one_error(tmp_path: Path, fps: Any) -> None:
    for name in FORMATS:
        with pytest.raises(RequestError, match="fps must be"):
            media.write_video(tmp_path / name, make_clip(), fps)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [np.float32, np.int64])
def test_a_frame_rate_of_numpy_is_a_number(tmp_path: Path, kind: Callable[[int], float]) -> None:
    for name in FORMATS:
        media.write_video(tmp_path / name, make_clip(), kind(8))
    assert decode(tmp_path / "clip.mp4")[1] == 8


@pytest.mark.parametrize("name", ["a:b.mp4", "http:a.mp4", "a:b.gif", "a:b.webp", "a:b.png", "a:b"])
def test_a_name_may_have_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    media.write_video(name, make_clip(), 8, comment="what it is")
    assert media.read_comment(Path(name)) == "what it is"
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("colour", [(200, 50, 30), (20, 220, 60), (0, 0, 255), (255, 255, 255)])
@pytest.mark.parametrize("height", [32, 720])
def test_mp4_is_bt709_and_says_so(tmp_path: Path, colour: tuple[int, int, int], height: int) -> None:
    """Luma and chroma of ITU-R BT.709 in the limited range, by its formula, and all four tags."""
    import av

    clip = np.full((2, height, 32, 3), colour, np.uint8)
    with av.open(str(media.write_video(tmp_path / "clip.mp4", clip, fps=8))) as container:
        codec = container.streams.video[0].codec_context
        (frame, *_) = container.decode(video=0)
        tags = (codec.color_primaries, codec.color_trc, codec.colorspace, codec.color_range)
        planes = [np.frombuffer(plane, np.uint8)[0] for plane in frame.planes]
        shown = frame.to_ndarray(format="rgb24")[0, 0]
    assert tags == (1, 1, 1, 1)
    red, green, blue = np.array(colour) / 255
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    wanted = (16 + 219 * luma, 128 + 224 * (blue - luma) / 1.8556, 128 + 224 * (red - luma) / 1.5748)
    assert np.abs(np.array(planes) - wanted).max() <= 2  # half a level of rounding, and the encoder's
    assert np.abs(shown.astype(int) - colour).max() <= 4


def test_a_still_clip_keeps_its_frames(tmp_path: Path) -> None:
    clip = make_clip(frames=1)[[0, 0, 0]]
    assert len(decode(media.write_video(tmp_path / "clip.mp4", clip, fps=8))[0]) == 3
    assert len(list(media.write_video(tmp_path / "clip", clip, fps=8).iterdir())) == 3


def test_folder_of_frames(tmp_path: Path) -> None:
    clip = make_clip()
    (tmp_path / "clip").mkdir()  # an empty folder may be filled
    folder = media.write_video(tmp_path / "clip", clip, fps=8)
    assert sorted(file.name for file in folder.iterdir()) == [f"frame_{index:03d}.png" for index in range(5)]
    assert np.array_equal(read_picture(folder / "frame_003.png"), clip[3])


def test_contact_sheet_places_frames(tmp_path: Path) -> None:
    clip = make_clip(frames=2, height=4, width=6)
    sheet = np.asarray(Image.open(media.write_video(tmp_path / "clip.png", clip, fps=8, upscale=2)))
    gap, (height, width) = media.GAP, (8, 12)
    assert sheet.shape == (height + 2 * gap, 2 * width + 3 * gap, 3)
    for index, frame in enumerate(media.enlarge(clip, 2)):
        left = gap + index * (width + gap)
        assert np.array_equal(sheet[gap : gap + height, left : left + width], frame)
    assert (sheet[:gap] == media.BACKGROUND).all()


def test_contact_sheet_of_several_labelled_clips() -> None:
    long, short = make_clip(frames=3, height=8, width=8), make_clip(frames=1, height=6, width=4)
    plain = media.contact_sheet([long, short])
    assert plain.size == (3 * (8 + media.GAP) + media.GAP, 8 + 6 + 3 * media.GAP)
    labels = ["first", "a second one, wider than its clip"]
    labelled = np.asarray(media.contact_sheet([long, short], labels))
    assert labelled.shape[0] == plain.height + 2 * media.LABEL_HEIGHT
    assert labelled.shape[1] > plain.width
    top = media.GAP + media.LABEL_HEIGHT
    assert (labelled[:top] != media.BACKGROUND).any()
    assert np.array_equal(labelled[top : top + 8, media.GAP : media.GAP + 8], long[0])


@pytest.mark.parametrize(("clips", "labels"), [([], []), ([make_clip()], ["a", "b"])])
def test_contact_sheet_wants_a_label_each(clips: list[np.ndarray], labels: list[str]) -> None:
    with pytest.raises(OutputError, match="label"):
        media.contact_sheet(clips, labels)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_enlarge_repeats_pixels(factor: int, height: int, width: int) -> None:
    frames = np.arange(2 * height * width * 3, dtype=np.uint8).reshape(2, height, width, 3)
    large = media.enlarge(frames, factor)
    assert large.shape == (2, height * factor, width * factor, 3)
    for y in range(height * factor):
        for x in range(width * factor):
            assert np.array_equal(large[:, y, x], frames[:, y // factor, x // factor])


def test_enlarge_refuses_zero() -> None:
    with pytest.raises(RequestError, match="upscale is 0; want 1 or more"):
        media.enlarge(make_clip(), 0)


@pytest.mark.parametrize(("name", "most"), [("a.mp4", 16_384), ("a.webp", 16_383), ("a.gif", 65_535)])
def test_sides_that_a_format_has_not_are_refused(tmp_path: Path, name: str, most: int) -> None:
    clip = np.zeros((1, 2, most, 3), np.uint8)
    media.write_video(tmp_path / name, clip, fps=8)
    (tmp_path / name).unlink()
    with pytest.raises(OutputError, match=rf"{name}: frames would be {2 * most}x4 pixels, and .* takes {most} a side"):
        media.write_video(tmp_path / name, clip, fps=8, upscale=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [make_clip().astype(np.float32), make_clip()[0], make_clip()[:0], make_clip()[..., :1]])
def test_frames_of_another_kind_are_refused(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(OutputError, match=r"frames must be uint8 \[frames, height, width, 3\], got "):
        media.write_video(tmp_path / "clip.mp4", bad, fps=8)
    assert list(tmp_path.iterdir()) == []


def test_check_output_numbers_several_clips(tmp_path: Path) -> None:
    assert media.check_output(tmp_path / "a.mp4") == [tmp_path / "a.mp4"]
    assert media.check_output(tmp_path / "a.mp4", 2) == [tmp_path / "a-0.mp4", tmp_path / "a-1.mp4"]
    assert media.check_output(tmp_path / "frames", 2) == [tmp_path / "frames-0", tmp_path / "frames-1"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["clip.avi", "clip.jpg", "clip.mp4.txt"])
def test_check_output_refuses_unknown_extensions(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"choose \.mp4, \.gif, \.webp, \.png"):
        media.check_output(tmp_path / name)


def test_check_output_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; make it first"):
        media.check_output(tmp_path / "none" / "clip.mp4")


def unwritable(tmp_path: Path) -> Path:
    """A folder that nobody, root included, can write into."""
    if os.geteuid():
        tmp_path.chmod(0o500)
        return tmp_path
    if not Path("/proc").is_dir():
        pytest.skip("running as root, to whom every folder is writable")
    return Path("/proc")


def test_check_output_refuses_a_folder_without_permission(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="takes no files"):
        media.check_output(unwritable(tmp_path) / "clip.mp4")


def test_check_output_refuses_to_replace_what_is_no_clip(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    for name, fault in (("folder.mp4", "is a folder"), ("file", "is a file"), ("full", "is not empty")):
        with pytest.raises(OutputError, match=fault):
            media.check_output(tmp_path / name)
    assert (tmp_path / "full" / "precious").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_an_existing_clip_is_replaced(tmp_path: Path, name: str) -> None:
    if Path(name).suffix:
        (tmp_path / name).write_text("old")
    media.write_video(tmp_path / name, make_clip(), fps=8)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).is_dir() or (tmp_path / name).read_bytes()[:3] != b"old"


def fail_in(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Make writing ``name`` raise ``error`` when something is written already."""
    import av

    targets: dict[str, tuple[Any, str]] = {
        ".mp4": (av.VideoFrame, "from_ndarray"),
        ".gif": (animations, "getdata"),
        ".png": (Image.Image, "save"),
    }
    owner, attribute = targets.get(Path(name).suffix, (Image, "fromarray"))
    original: Callable[..., Any] = getattr(owner, attribute)
    calls = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) < 3 and attribute != "save":
            return original(*args, **options)
        if attribute == "save":
            Path(args[1]).write_bytes(b"half")
        raise error

    if owner is av.VideoFrame:
        monkeypatch.setattr(av, "VideoFrame", type("VideoFrame", (), {"from_ndarray": staticmethod(failing)}))
    else:
        monkeypatch.setattr(owner, attribute, failing)


@pytest.mark.parametrize("name", FORMATS)
def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fail_in(monkeypatch, name, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        media.write_video(tmp_path / name, make_clip(), fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FORMATS)
def test_full_disk_leaves_the_old_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    if Path(name).suffix:
        (tmp_path / name).write_text("old")
    before = [file.name for file in tmp_path.iterdir()]
    fail_in(monkeypatch, name, OSError(28, "No space left on device"))
    with pytest.raises(OutputError, match="cannot be written .*No space left on device"):
        media.write_video(tmp_path / name, make_clip(), fps=8)
    assert [file.name for file in tmp_path.iterdir()] == before
    assert not before or (tmp_path / name).read_text() == "old"


def test_encoder_failure_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "X264_OPTIONS", {"profile": "nonsense"})
    with pytest.raises(OutputError, match="cannot be encoded"):
        media.write_video(tmp_path / "clip.mp4", make_clip(), fps=8)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("found", "told"), [(False, "has no encoder libx264; see 'stiv doctor'"), (True, "encoded")])
def test_doctor_is_named_only_where_it_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool, told: str
) -> None:
    import av
    from av.codec.codec import UnknownCodecError

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("odd") if found else UnknownCodecError("libx264")

    monkeypatch.setattr(av, "open", refuse)
    with pytest.raises(OutputError, match=told) as caught:
        media.write_video(tmp_path / "clip.mp4", make_clip(), fps=8)
    assert found != ("doctor" in str(caught.value))
