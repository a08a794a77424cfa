"""Folders of videos as training data: what is cut from them, that it is exactly that, and what happens to bad ones.

Pixels of the test videos say where they are from: red is the number of the frame, green the row, blue the column.
"""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from stiv_deploy.stiv_ref.data.loader import DatasetSource
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.data.videos import VideoDataset, list_videos_of
from stiv_deploy.stiv_ref.errors import CaptionError, DataError, VideoError
from stiv_deploy.stiv_ref.recipe import VideoData

WriteVideo = Callable[..., Path]


def coded(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3]: (frame, row, column) in every pixel."""
    return np.stack(np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij"), -1).astype(
        np.uint8
    )


def corner(video: torch.Tensor) -> list[tuple[int, int, int]]:
    """(frame, row, column) of the top left pixel of every frame of a video fp32 [F, 3, H, W]."""
    pixels = ((video[:, :, 0, 0].double() + 1) * 127.5).round().int()
    return [tuple(pixel) for pixel in pixels.tolist()]


@pytest.fixture
def folder(write_video: WriteVideo) -> Path:
    """Five videos of 20 frames, 16 x 24, with captions."""
    for number in range(5):
        path = write_video(f"clips/{number}.mkv", coded(20, 16, 24))
        path.with_suffix(".txt").write_text(f"Clip number {number}, moving")
    return path.parent


def open_folder(
    folder: Path,
    *,
    frames: int = 4,
    sizes: tuple[tuple[int, int], ...] = ((16, 16),),
    strides: tuple[int, ...] = (1,),
    captions: Path | None = None,
    **options: object,
) -> DatasetSource:
    data = VideoData(kind="videos", path=folder, captions=captions)
    dataset = VideoDataset(list_videos_of(data), sizes=sizes, frames=frames, strides=strides)
    return DatasetSource(dataset, **{"seed": 0, "stage": 1, "batch": 4, **options})  # type: ignore[arg-type]


def take(source: DatasetSource, steps: range, parts: list[range] | None = None) -> list[Batch]:
    return [batch for batches in source.batches(steps, parts or [range(source.order.batch)]) for batch in batches]


def same(one: list[Batch], other: list[Batch]) -> bool:
    """The same samples, bit by bit, however they are cut into batches."""

    def rows(batches: list[Batch]) -> list[tuple[bytes, bytes, str, str]]:
        return [
            (
                batch.video[row].numpy().tobytes(),
                batch.micro[row].numpy().tobytes(),
                batch.captions[row],
                batch.names[row],
            )
            for batch in batches
            if batch.video is not None
            for row in range(len(batch.names))
        ]

    return rows(one) == rows(other)


def test_pixels_are_those_that_the_micro_conditions_say(folder: Path) -> None:
    batches = take(open_folder(folder, strides=(1, 3)), range(40))
    starts, strides, lefts = Counter[int](), Counter[int](), Counter[int]()
    for batch in batches:
        assert batch.video is not None
        assert batch.video.shape == (4, 4, 3, 16, 16)
        for video, micro in zip(batch.video, batch.micro.int().tolist(), strict=True):
            height, width, top, left, stride, frames = micro
            assert (height, width, top, frames) == (16, 24, 0, 4)
            start = corner(video)[0][0]
            assert corner(video) == [(start + stride * at, top, left) for at in range(4)]
            starts[start], strides[stride], lefts[left] = starts[start] + 1, strides[stride] + 1, lefts[left] + 1
    assert set(strides) == {1, 3}
    assert set(starts) == set(range(17))  # 20 - 4 + 1 at stride 1
    assert set(lefts) == set(range(9))
    # Uniform: 160 draws, standard deviation 6.3.
    assert abs(strides[1] - 80) < 32


def test_captions_belong_to_their_videos(folder: Path) -> None:
    for batch in take(open_folder(folder), range(5)):
        assert [f"Clip number {name.removesuffix('.mkv')}, moving" for name in batch.names] == batch.captions


def test_a_resized_clip_keeps_its_original_size_and_crops_in_resized_pixels(folder: Path) -> None:
    source = open_folder(folder, sizes=((8, 8),))
    for batch in take(source, range(10)):
        assert batch.video is not None
        assert batch.video.shape[2:] == (3, 8, 8)
        for video, micro in zip(batch.video, batch.micro.tolist(), strict=True):
            assert micro[:3] == [16, 24, 0]
            assert 0 <= micro[3] <= 4  # of 12 columns of the resized video, 8 are kept
            # Column c of the resized video averages source columns around 2 c + 0.5; away from the edges of the video.
            column = (video[0, 2, 0, 4].item() + 1) * 127.5
            assert column == pytest.approx(2 * (micro[3] + 4) + 0.5, abs=1)


def test_strides_that_are_too_long_for_a_video_are_not_drawn(folder: Path, write_video: WriteVideo) -> None:
    write_video("clips/short.mkv", coded(5, 16, 24)).with_suffix(".txt").write_text("short")
    found: dict[str, set[float]] = {"short.mkv": set(), "0.mkv": set()}
    for batch in take(open_folder(folder, strides=(1, 4)), range(30)):
        for name, micro in zip(batch.names, batch.micro, strict=True):
            found.setdefault(name, set()).add(micro[4].item())
    assert found["short.mkv"] == {1.0}
    assert found["0.mkv"] == {1.0, 4.0}


def test_single_frames_are_drawn_from_the_whole_video_at_stride_one(folder: Path) -> None:
    source = open_folder(folder, frames=1, strides=(3, 5))
    batches = take(source, range(60))
    assert {batch.video.shape for batch in batches if batch.video is not None} == {(4, 1, 3, 16, 16)}
    seen = {corner(video)[0][0] for batch in batches if batch.video is not None for video in batch.video}
    assert seen == set(range(20))
    assert {tuple(micro[4:].tolist()) for batch in batches for micro in batch.micro} == {(1.0, 1.0)}


def test_every_epoch_shows_every_video_once(folder: Path) -> None:
    names = [name for batch in take(open_folder(folder), range(5)) for name in batch.names]
    for epoch in range(4):
        assert sorted(names[5 * epoch : 5 * epoch + 5]) == [f"{number}.mkv" for number in range(5)]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_do_not_depend_on_processes_micro_batches_or_resuming(folder: Path, workers: int) -> None:
    sizes = ((16, 16), (8, 16))
    whole = take(open_folder(folder, sizes=sizes, strides=(1, 2)), range(6))
    source = open_folder(folder, sizes=sizes, strides=(1, 2), workers=workers)
    assert same(whole, take(source, range(6), [range(1), range(1, 3), range(3, 4)]))
    resumed = open_folder(folder, sizes=sizes, strides=(1, 2), workers=workers)
    assert same(whole[4:], take(resumed, range(4, 6)))
    first, second = (
        take(open_folder(folder, sizes=sizes, strides=(1, 2)), range(6), [half]) for half in (range(2), range(2, 4))
    )
    both = [batch for pair in zip(first, second, strict=True) for batch in pair]
    assert same(whole, both)


SHARE = """
import sys
from pathlib import Path
from stiv_deploy.stiv_ref.data.loader import DatasetSource
from stiv_deploy.stiv_ref.data.videos import VideoDataset, list_videos_of
from stiv_deploy.stiv_ref.recipe import VideoData
listing = list_videos_of(VideoData(kind="videos", path=Path(sys.argv[1])))
dataset = VideoDataset(listing, sizes=((16, 16), (8, 16)), frames=4, strides=(1, 2))
source = DatasetSource(dataset, seed=0, stage=1, batch=4, workers=int(sys.argv[2]))
rank = int(sys.argv[3])
for (batch,) in source.batches(range(6), [range(2 * rank, 2 * rank + 2)]):
    for name, micro, video in zip(batch.names, batch.micro, batch.video):
        print(name, micro.tolist(), video.double().sum().item())
"""


@pytest.mark.slow
def test_two_processes_share_the_batches_of_one(folder: Path) -> None:
    """Real processes with different hash seeds and workers draw the halves of what one process draws."""
    (folder / "1.mkv").write_bytes(b"damaged")
    halves = []
    for rank in range(2):
        environment = {**os.environ, "PYTHONHASHSEED": str(rank + 1)}
        command = [sys.executable, "-c", SHARE, str(folder), str(rank), str(rank)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        halves.append(found.stdout.splitlines())
    together = [line for step in range(6) for half in halves for line in half[2 * step : 2 * step + 2]]
    source = open_folder(folder, sizes=((16, 16), (8, 16)), strides=(1, 2))
    wanted = [
        f"{name} {micro.tolist()} {video.double().sum().item()}"
        for batch in take(source, range(6))
        if batch.video is not None
        for name, micro, video in zip(batch.names, batch.micro, batch.video, strict=True)
    ]
    assert together == wanted


def test_the_global_random_generator_is_left_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    take(open_folder(folder), range(2))
    assert torch.equal(before, torch.get_rng_state())


def test_batches_come_from_one_bucket_as_often_as_it_has_videos(folder: Path, write_video: WriteVideo) -> None:
    write_video("clips/tall.mkv", coded(20, 24, 16)).with_suffix(".txt").write_text("tall")
    source = open_folder(folder, sizes=((16, 24), (24, 16)))
    batches = take(source, range(12))
    sizes = Counter(tuple(batch.video.shape[-2:]) for batch in batches if batch.video is not None)
    assert sizes == {(16, 24): 10, (24, 16): 2}
    assert {name for batch in batches for name in batch.names if tuple(batch.micro[0, :2]) == (24, 16)} == {"tall.mkv"}


def test_words_are_those_of_the_tokenizer(folder: Path) -> None:
    from stiv_deploy.stiv_ref.text import word_tokenizer

    source = open_folder(folder)
    assert list(source.words()) == [",", "0", "1", "2", "3", "4", "clip", "moving", "number"]
    encoded = word_tokenizer(source.words(), 16).encode("Clip number 3, moving")
    assert encoded.tokens[:6] == ["clip", "number", "3", ",", "moving", "[EOS]"]


@pytest.mark.parametrize("workers", [0, 2])
def test_stills_are_single_frames_and_always_the_same(folder: Path, workers: int) -> None:
    stills = open_folder(folder, workers=workers).stills(12)
    assert stills.shape == (12, 3, 16, 16)
    assert torch.equal(stills, open_folder(folder, frames=8, batch=2).stills(12))
    assert len({corner(still[None])[0] for still in stills}) > 6


def test_a_video_unreadable_at_the_start_is_skipped_and_listed(folder: Path) -> None:
    (folder / "3.mkv").write_bytes(b"not a video")
    source = open_folder(folder)
    names = {name for batch in take(source, range(10)) for name in batch.names}
    assert names == {"0.mkv", "1.mkv", "2.mkv", "4.mkv"}
    (line,) = source.broken()
    assert line.startswith("3.mkv: ")
    assert str(folder) not in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_video_that_breaks_while_training_is_replaced_by_the_next_of_the_epoch(folder: Path, workers: int) -> None:
    whole = open_folder(folder, batch=5)
    names = [name for batch in take(whole, range(4)) for name in batch.names]
    source = open_folder(folder, batch=5, workers=workers)
    (folder / "3.mkv").write_bytes(b"damaged after the scan")
    found = [name for batch in take(source, range(4)) for name in batch.names]
    for epoch in range(4):
        order = names[5 * epoch : 5 * epoch + 5]
        wanted = [order[(at + 1) % 5] if name == "3.mkv" else name for at, name in enumerate(order)]
        assert found[5 * epoch : 5 * epoch + 5] == wanted
    assert [line.split(":")[0] for line in source.broken()] == ["3.mkv"]
    # Which video stands in does not depend on what was met before.
    resumed = open_folder(folder.parent / folder.name, batch=5, max_broken=0.9)
    assert resumed.broken()


def test_stand_ins_are_the_same_in_a_resumed_run(folder: Path) -> None:
    one, other = open_folder(folder), open_folder(folder)
    (folder / "1.mkv").write_bytes(b"damaged after the scan")
    assert same(take(one, range(8))[5:], take(other, range(5, 8)))


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_videos_stop_the_training(folder: Path, workers: int) -> None:
    source = open_folder(folder, max_broken=0.3, workers=workers)
    for name in ("0.mkv", "3.mkv"):
        (folder / name).write_bytes(b"damaged")
    wanted = r"clips: 2 of 5 samples are broken, more than max_broken = 0.3 allows; 0.mkv: .*; 3.mkv: .*max_broken"
    with pytest.raises(DataError, match=wanted):
        take(source, range(10))
    with pytest.raises(DataError, match=wanted):
        open_folder(folder, max_broken=0.3)


def test_nothing_readable_is_an_error_even_if_all_may_be_broken(folder: Path) -> None:
    source = open_folder(folder, max_broken=1.0)
    for number in range(5):
        (folder / f"{number}.mkv").write_bytes(b"damaged")
    with pytest.raises(DataError, match="no sample of a bucket can be read; 0.mkv: "):
        take(source, range(1))
    with pytest.raises(DataError, match="none of its 5 samples can be used; 0.mkv: "):
        open_folder(folder, max_broken=1.0)


def test_a_video_of_another_size_than_listed_is_broken(folder: Path, write_video: WriteVideo) -> None:
    source = open_folder(folder)
    write_video("clips/2.mkv", coded(20, 24, 24))
    assert "2.mkv" not in {name for batch in take(source, range(10)) for name in batch.names}
    assert source.broken() == ["2.mkv: its frames are 24x24 pixels, it is listed with 16x24; list it anew"]


def test_a_crash_of_a_worker_is_one_clear_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(folder, workers=1)
    monkeypatch.setattr(source.dataset, "load", lambda *_: os._exit(1))
    with pytest.raises(DataError, match="clips: a process that loads data crashed"):
        take(source, range(2))


def test_faults_of_our_own_are_not_taken_for_broken_videos(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_folder(folder)
    monkeypatch.setattr(source.dataset, "sizes", ())
    with pytest.raises(IndexError):
        take(source, range(1))


def test_short_videos_are_left_out_and_listed(folder: Path, write_video: WriteVideo) -> None:
    write_video("clips/short.mkv", coded(6, 16, 24)).with_suffix(".txt").write_text("a word of its own")
    source = open_folder(folder, strides=(2, 3), max_broken=0.0)
    assert source.broken() == ["short.mkv: has 6 frames; 4 frames at stride 2 take 7"]
    assert "short.mkv" not in {name for batch in take(source, range(10)) for name in batch.names}
    assert "own" in source.words()  # the words of all stages are the same


def test_only_short_videos_are_an_error(folder: Path) -> None:
    with pytest.raises(DataError, match=r"clips: none of its 5 samples can be used; 0.mkv: has 20 frames; 21 frames"):
        open_folder(folder, frames=21)


def test_missing_captions_are_an_error(folder: Path) -> None:
    (folder / "2.txt").unlink()
    with pytest.raises(CaptionError, match=r"1 of 5 videos have no caption \(2.mkv\)"):
        open_folder(folder)


def test_captions_from_jsonl(folder: Path, tmp_path: Path) -> None:
    lines = "".join(f'{{"file": "{number}.mkv", "caption": "listed {number}"}}\n' for number in range(5))
    (tmp_path / "captions.jsonl").write_text(lines)
    batch = take(open_folder(folder, captions=tmp_path / "captions.jsonl"), range(1))[0]
    assert batch.captions == [f"listed {name[0]}" for name in batch.names]


def test_no_folder_and_an_empty_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="nowhere: no such folder"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(VideoError, match="no videos in this folder"):
        open_folder(tmp_path)


def test_real_clips(real_clips: dict[str, Path], tmp_path: Path) -> None:
    """Two real videos in two buckets; the frames of one found again by decoding and resizing with other libraries."""
    for name in ("bikes.mp4", "carphone_pristine.mp4"):
        (tmp_path / name).symlink_to(real_clips[name])
        (tmp_path / name).with_suffix(".txt").write_text(name)
    source = open_folder(tmp_path, sizes=((32, 32), (32, 80)), strides=(1, 2), batch=2)
    batches = take(source, range(4))
    sizes = {name: tuple(batch.micro[0, :2].int().tolist()) for batch in batches for name in batch.names}
    assert sizes == {"bikes.mp4": (272, 640), "carphone_pristine.mp4": (144, 176)}
    with av.open(str(real_clips["carphone_pristine.mp4"])) as container:
        frames = [frame.to_image().resize((39, 32), Image.Resampling.BICUBIC) for frame in container.decode(video=0)]
    oracle = np.stack([np.asarray(frame) for frame in frames]).astype(np.float64)
    for batch in batches:
        assert batch.video is not None
        if batch.names[0] == "bikes.mp4":
            assert batch.video.shape == (2, 4, 3, 32, 80)
            continue
        for video, micro in zip(batch.video, batch.micro.int().tolist(), strict=True):
            assert micro[2] == 0
            pixels = (video.permute(0, 2, 3, 1).double().numpy() + 1) * 127.5
            # Both resize in fixed point, each rounding once along rows and once along columns: half a level each.
            error = np.abs(pixels[:, None] - oracle[None, :, :, micro[3] : micro[3] + 32]).max((2, 3, 4))
            found = error.argmin(1)
            assert error.min(1).max() <= 2
            assert set(np.diff(found)) == {micro[4]}


def test_interlaced_hdr_and_other_files_are_left_out_and_named(folder: Path, write_video: WriteVideo) -> None:
    combed = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x264-params": "tff=1"}}
    write_video("clips/combed.mp4", coded(20, 16, 24), **combed)
    write_video("clips/bright.mp4", coded(20, 16, 24), transfer=18)
    for name in ("combed", "bright"):
        (folder / f"{name}.txt").write_text("a clip")
    (folder / "sound.wav").touch()
    listing = list_videos_of(VideoData(kind="videos", path=folder))
    assert (len(listing.clips), listing.total, listing.broken) == (5, 7, {})
    source = open_folder(folder)
    assert source.broken() == [
        "*.wav: 1 left out, as no video is called so (sound.wav)",
        "bright.mp4: is HDR; convert it to SDR, or index it with: stiv data cut --keep-hdr",
        "combed.mp4: is interlaced; deinterlace it, or index it with: stiv data cut --keep-interlaced",
    ]
    assert {batch.names[0].partition(".")[0] for batch in take(source, range(6), [range(1)])} <= set("01234")


def test_old_containers_train(write_video: WriteVideo) -> None:
    path = write_video("old/a.wmv", coded(12, 16, 32), codec="wmv2", pix_fmt="yuv420p", options={"g": "6"})
    path.with_suffix(".txt").write_text("a clip")
    (batch,) = take(open_folder(path.parent, batch=2), range(1))
    assert batch.video is not None
    assert batch.video.shape == (2, 4, 3, 16, 16)
