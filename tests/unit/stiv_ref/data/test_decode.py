"""Decoding: exact frames by number in any container, and one clear error for whatever is broken."""

import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.stiv_ref.data.decode import VideoInfo, frames_of, key_frames, probe, read_frames
from stiv_deploy.stiv_ref.errors import VideoError

WriteVideo = Callable[..., Path]


def numbered(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that tell their number: a grey level, and a bright column that moves. uint8 [F, H, W, 3]."""
    images = np.empty((frames, height, width, 3), np.uint8)
    for at in range(frames):
        images[at] = at * 200 // frames
        images[at, :, at % width] = 255
    return images


CONTAINERS: dict[str, dict[str, Any]] = {
    "lossless.mp4": {},
    "lossless.mkv": {},
    "short_gop.mp4": {"options": {"qp": "0", "g": "7"}},
    "open_gop.mkv": {"options": {"qp": "0", "x264-params": "keyint=9:open-gop=1:bframes=3"}},
    "live.mkv": {"options": {"qp": "0", "g": "7"}, "container": {"live": "1"}},  # a recording: no index to seek by
    "fast.mov": {"container": {"movflags": "+faststart"}},
}
LOSSY: dict[str, dict[str, Any]] = {
    "x264.mp4": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "x264.ts": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x264-params": "keyint=12:open-gop=1"}},
    "mpeg2.mpg": {"codec": "mpeg2video", "pix_fmt": "yuv420p", "options": {"g": "12", "bf": "2"}},
    "mpeg4.avi": {"codec": "mpeg4", "pix_fmt": "yuv420p", "options": {"bf": "2"}},
    "vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "wmv2.wmv": {"codec": "wmv2", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "x264.flv": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "x264.m2ts": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "x264.mts": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "x264.3gp": {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "vp8.webm": {"codec": "libvpx", "pix_fmt": "yuv420p", "options": {"g": "12"}},
    "one_key.gif": {"codec": "gif", "pix_fmt": "rgb8", "options": {}},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_frame_is_what_was_encoded(write_video: WriteVideo, name: str) -> None:
    images = numbered(40)
    path = write_video(name, images, **CONTAINERS[name])
    assert probe(path) == VideoInfo(path, 48, 32, 40, pytest.approx(25), pytest.approx(1.6))
    assert np.array_equal(np.stack(list(frames_of(path))), images)
    for start, count, stride in ((0, 40, 1), (13, 1, 1), (39, 1, 5), (2, 10, 3), (0, 2, 39), (1, 3, 18)):
        wanted = images[start::stride][:count]
        assert np.array_equal(read_frames(path, start, count, stride), wanted), (start, count, stride)


@pytest.mark.parametrize("name", LOSSY)
def test_a_frame_read_alone_is_the_one_of_the_stream(write_video: WriteVideo, name: str) -> None:
    """Seeking in any container gives what decoding from the beginning gives."""
    path = write_video(name, numbered(50), **LOSSY[name])
    whole = np.stack(list(frames_of(path)))
    assert len(whole) == probe(path).frames == 50
    for number in range(50):
        assert np.array_equal(read_frames(path, number, 1)[0], whole[number]), number
    assert np.array_equal(read_frames(path, 3, 3, 23), whole[3::23])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_run_of_frames(write_video: WriteVideo, data: st.DataObject) -> None:
    images = numbered(60, 16, 16)
    path = Path(write_video("gop.mp4", images, options={"qp": "0", "g": "6"}))
    stride = data.draw(st.integers(1, 30))
    count = data.draw(st.integers(1, (60 - 1) // stride + 1))
    start = data.draw(st.integers(0, 59 - (count - 1) * stride))
    assert np.array_equal(read_frames(path, start, count, stride), images[start::stride][:count])


@pytest.mark.parametrize("fps", [1, 12.5, 24000 / 1001, 60])
def test_frame_rates(write_video: WriteVideo, fps: float) -> None:
    info = probe(write_video("clip.mp4", numbered(12), fps))
    assert info.fps == pytest.approx(fps, rel=1e-3)
    assert info.seconds == pytest.approx(12 / fps, rel=1e-3)


def test_variable_frame_rate_counts_frames(write_video: WriteVideo) -> None:
    images, times = numbered(20), [40 * at + 7 * at * at for at in range(20)]
    path = write_video("vfr.mkv", images, times=times)
    assert probe(path).frames == 20
    assert probe(path).fps == pytest.approx(19 / (times[-1] / 1000), rel=1e-2)
    assert np.array_equal(read_frames(path, 5, 4, 3), images[5:17:3])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (17, 33), (2, 99), (64, 30)])
def test_odd_sizes(write_video: WriteVideo, height: int, width: int) -> None:
    images = numbered(3, height, width)
    path = write_video("odd.mkv", images)
    assert (probe(path).width, probe(path).height) == (width, height)
    assert np.array_equal(read_frames(path, 0, 3), images)


@pytest.mark.parametrize(("rotation", "turns"), [(90, 1), (180, 2), (-90, 3)])
def test_rotated_video_comes_upright(write_video: WriteVideo, rotation: int, turns: int) -> None:
    """A telephone's video: pixels lie, and the file says by how much to turn them counterclockwise."""
    images = numbered(4, 16, 40)
    path = write_video("phone.mp4", images, rotation=rotation)
    assert np.array_equal(read_frames(path, 0, 4), np.rot90(images, turns, axes=(1, 2)))
    assert (probe(path).width, probe(path).height) == ((40, 16) if turns == 2 else (16, 40))


ONE = 65536
MATRICES = [(a, b, 0, 0, d) for a in (ONE, -ONE) for b, d in ((0, ONE), (0, -ONE))] + [
    (0, b, 0, c, 0) for b in (ONE, -ONE) for c in (ONE, -ONE)
]
"""a, b, -, c and d of all turns and mirrorings."""


@pytest.mark.parametrize("matrix", MATRICES)
def test_a_display_matrix_turns_and_mirrors(write_video: WriteVideo, matrix: tuple[int, ...]) -> None:
    """Every pixel (x, y) lands at (a x + c y, b x + d y), moved to where no coordinate is negative."""
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    path = write_video("turned.mp4", images, matrix=[*matrix, 0, 0, 0, 2**30])
    a, b, _, c, d = (each // ONE for each in matrix)
    y, x = np.mgrid[:16, :24]
    right, down = a * x + c * y, b * x + d * y
    right, down = right - right.min(), down - down.min()
    wanted = np.zeros((2, down.max() + 1, right.max() + 1, 3), np.uint8)
    wanted[:, down, right] = images
    assert np.array_equal(read_frames(path, 0, 2), wanted)
    assert (probe(path).height, probe(path).width) == wanted.shape[1:3]


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of the boxes of an MP4 file, one after another."""
    while data:
        size, kind = struct.unpack(">I4s", data[:8])
        yield kind, data[8:size]
        data = data[size:]


def with_edits(path: Path, edits: Sequence[tuple[int | None, int]]) -> Path:
    """Give an MP4 file whose movie box is the last an edit list: of each part its first frame (or None) and frames."""

    def box(kind: bytes, content: bytes) -> bytes:
        if kind == b"elst":
            (begin,) = struct.unpack(">i", content[12:16])  # of frame 0; the others follow every 512 ticks
            starts = [-1 if start is None else begin + start * 512 for start, _ in edits]
            rows = (struct.pack(">IiI", part[1] * 40, at, ONE) for at, part in zip(starts, edits, strict=True))
            content = bytes(4) + struct.pack(">I", len(edits)) + b"".join(rows)
        elif kind in (b"moov", b"trak", b"edts"):
            content = b"".join(box(*each) for each in boxes(content))
        return struct.pack(">I4s", 8 + len(content), kind) + content

    path.write_bytes(b"".join(box(*each) for each in boxes(path.read_bytes())))
    return path


EDITS: dict[str, tuple[list[tuple[int | None, int]], list[int]]] = {
    "cut inside the first group": ([(3, 47)], [*range(3, 50)]),
    "cut inside the third group": ([(29, 21)], [*range(29, 50)]),
    "cut at a key frame": ([(24, 26)], [*range(24, 50)]),
    "cut at both ends": ([(15, 20)], [*range(15, 35)]),
    "only the end": ([(0, 31)], [*range(31)]),
    "one frame": ([(17, 1)], [17]),
    "a pause before": ([(None, 5), (0, 50)], [*range(50)]),
    "a part left out": ([(2, 10), (30, 15)], [*range(2, 12), *range(30, 45)]),
    "parts in another order": ([(30, 15), (2, 10)], [*range(30, 45), *range(2, 12)]),
}


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("bframes", [0, 2])
def test_an_edit_list_shows_what_it_says(write_video: WriteVideo, edits: str, bframes: int) -> None:
    """Every frame that a player shows and none that it does not, as cameras and cutting without encoding leave them."""
    images = numbered(50)
    settings = f"keyint=12:scenecut=0:bframes={bframes}:b-adapt=0"
    path = write_video("cut.mp4", images, options={"qp": "0", "x264-params": settings})
    rows, shown = EDITS[edits]
    with_edits(path, rows)
    wanted = images[shown]
    assert probe(path).frames == len(shown)
    assert np.array_equal(np.stack(list(frames_of(path))), wanted)
    for number in {0, 1 % len(shown), len(shown) // 2, len(shown) - 1}:
        assert np.array_equal(read_frames(path, number, 1)[0], wanted[number]), number
    assert np.array_equal(read_frames(path, 0, len(wanted[::18]), 18), wanted[::18])
    assert set(key_frames(path)) <= set(range(len(shown)))


def test_an_edit_list_that_shows_nothing(write_video: WriteVideo) -> None:
    path = with_edits(write_video("cut.mp4", numbered(20)), [(4000, 5)])
    with pytest.raises(VideoError, match=r"cut\.mp4: "):
        probe(path)


def test_interlaced_and_hdr_are_marked(write_video: WriteVideo) -> None:
    fields = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x264-params": "tff=1"}}
    plain = write_video("plain.mp4", numbered(4))
    combed = write_video("combed.mp4", numbered(4), **fields)
    pq, hlg = (write_video(f"{transfer}.mp4", numbered(4), transfer=transfer) for transfer in (16, 18))
    marks = [(probe(path).interlaced, probe(path).hdr) for path in (plain, combed, pq, hlg)]
    assert marks == [(False, False), (True, False), (False, True), (False, True)]


def test_short_side_shrinks_and_never_enlarges(write_video: WriteVideo) -> None:
    path = write_video("large.mkv", numbered(2, 90, 160))
    assert next(frames_of(path, short_side=45)).shape == (45, 80, 3)
    assert next(frames_of(path, short_side=200)).shape == (90, 160, 3)


def test_one_frame(write_video: WriteVideo) -> None:
    info = probe(write_video("still.mp4", numbered(1)))
    assert (info.frames, info.seconds) == (1, pytest.approx(1 / 25))


@pytest.mark.parametrize(
    ("start", "count", "stride"), [(-1, 2, 1), (0, 0, 1), (0, 2, 0), (0, 11, 1), (10, 1, 1), (4, 3, 3)]
)
def test_frames_that_are_not_there(write_video: WriteVideo, start: int, count: int, stride: int) -> None:
    path = write_video("clip.mp4", numbered(10))
    with pytest.raises(VideoError, match=f"has 10 frames, asked for {count} frames from {start} in steps of {stride}"):
        read_frames(path, start, count, stride)


def shortened(path: Path, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("end.mp4", {}, "cannot be read as a video"),
        ("front.mp4", {"container": {"movflags": "+faststart"}}, "is incomplete: the file is truncated"),
        ("cut.mkv", {}, r"states 1\.60 s and ends after .* it is truncated; copy it again"),
    ],
)
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_truncated(write_video: WriteVideo, name: str, options: dict[str, Any], message: str, share: float) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    path = shortened(write_video(name, images, **options), share)
    for use in (lambda: probe(path), lambda: list(frames_of(path)), lambda: read_frames(path, 0, 1)):
        with pytest.raises(VideoError, match=message):
            use()


def test_damaged_in_the_middle(write_video: WriteVideo) -> None:
    """The container is whole, so the damage shows when those frames are decoded: never as wrong frames."""
    path = write_video("noise.mp4", numbered(60), container={"movflags": "+faststart"})
    data = bytearray(path.read_bytes())
    middle, length = len(data) // 2, len(data) // 4
    data[middle : middle + length] = np.random.default_rng(0).bytes(length)
    path.write_bytes(data)
    with pytest.raises(VideoError, match=re.escape(str(path))):
        list(frames_of(path))
    with pytest.raises(VideoError, match=re.escape(str(path))):
        read_frames(path, 0, 60)
    assert np.array_equal(read_frames(path, 0, 5), numbered(60)[:5])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(["a.mp4", "b.mkv", "c.avi"]), data=st.data())
def test_any_damage_is_one_kind_of_error(write_video: WriteVideo, name: str, data: st.DataObject) -> None:
    """Bytes overwritten or cut off anywhere: a :class:`VideoError` in one line, or as many frames as were promised."""
    path = write_video(name, numbered(12, 16, 16), codec="mpeg4", pix_fmt="yuv420p")
    content = bytearray(path.read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=9)):
        content[at] = value
    path.write_bytes(content[: data.draw(st.integers(0, 2 * len(content)))])
    try:
        frames = probe(path).frames
        read = len(list(frames_of(path))), read_frames(path, frames // 2, 1)
    except VideoError as error:
        message = str(error)
    else:
        assert read[0] == frames
        return
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


def test_no_video(tmp_path: Path, write_audio: Callable[..., Path]) -> None:
    (tmp_path / "text.mp4").write_text("not a video\n" * 99)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    write_audio("audio.mp4")
    write_audio("song.mp4", cover=True)
    cases = {
        "text.mp4": "cannot be read as a video",
        "empty.mp4": "the file is empty",
        "folder.mp4": "is not a file",
        "audio.mp4": "has no video stream",
        "song.mp4": "has no video stream",
        "absent.mp4": "No such file",
    }
    for name, message in cases.items():
        with pytest.raises(VideoError, match=message) as caught:
            probe(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert "\n" not in str(caught.value)


def test_zero_frames(write_video: WriteVideo) -> None:
    with pytest.raises(VideoError, match="nothing.mkv: "):
        probe(write_video("nothing.mkv", numbered(1)[:0]))


def test_a_playlist_opens_no_other_place(tmp_path: Path) -> None:
    """A file of a training set must not make the machine call somewhere."""
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VideoError, match="cannot be read as a video"):
        probe(tmp_path / "list.mp4")


def test_names_with_colons_are_files(write_video: WriteVideo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_video("concat:a.mkv", numbered(2))
    monkeypatch.chdir(tmp_path)
    assert probe(Path("concat:a.mkv")).frames == 2


def test_a_changed_file_is_looked_at_again(write_video: WriteVideo) -> None:
    assert probe(write_video("clip.mp4", numbered(10))).frames == 10
    assert probe(write_video("clip.mp4", numbered(12))).frames == 12


FACTS = {
    "bigbuckbunny.mp4": (1280, 720, 132, 25),
    "bikes.mp4": (640, 272, 250, 25),
    "carphone_distorted.mp4": (176, 144, 120, 30000 / 1001),
    "carphone_pristine.mp4": (176, 144, 120, 30000 / 1001),
}


@pytest.mark.parametrize("name", FACTS)
def test_real_clips(real_clips: dict[str, Path], name: str) -> None:
    info = probe(real_clips[name])
    assert (info.width, info.height, info.frames, pytest.approx(info.fps)) == FACTS[name]


def test_real_clip_read_by_number(real_clips: dict[str, Path]) -> None:
    path = real_clips["carphone_pristine.mp4"]
    whole = np.stack(list(frames_of(path)))
    for start, count, stride in ((0, 8, 1), (57, 8, 4), (119, 1, 1), (5, 3, 50)):
        assert np.array_equal(read_frames(path, start, count, stride), whole[start::stride][:count])
