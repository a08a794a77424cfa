"""WebDataset shards: written and read by the library too, any sample at any time, damage named."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from stiv_deploy.stiv_ref.data.clips import Clip, write_clips
from stiv_deploy.stiv_ref.data.loader import DatasetSource
from stiv_deploy.stiv_ref.data.shards import list_video_shards, pack_videos
from stiv_deploy.stiv_ref.data.tars import read_shard, shard_paths, split_name, write_shard
from stiv_deploy.stiv_ref.data.videos import Listing, VideoDataset, list_videos_of
from stiv_deploy.stiv_ref.errors import CaptionError, DataError
from stiv_deploy.stiv_ref.recipe import VideoData

WriteVideo = Callable[..., Path]


def coded(frames: int, height: int = 16, width: int = 24, blue: int = 0) -> np.ndarray:
    """uint8 [F, H, W, 3]: red is the number of the frame, the others ``blue``."""
    images = np.full((frames, height, width, 3), blue, np.uint8)
    images[..., 0] = np.arange(frames)[:, None, None]
    return images


@pytest.fixture
def folder(write_video: WriteVideo) -> Path:
    """Five videos with captions, of which one is in a folder inside."""
    for number, name in enumerate(["a.mkv", "b.mkv", "c.c.mkv", "d[0:3].mkv", "inside/e.mkv"]):
        path = write_video(f"clips/{name}", coded(12 + number, blue=number))
        path.with_suffix(".txt").write_text(f"Number {number} è")
    return path.parents[1]


def listed(path: Path) -> Listing:
    return list_videos_of(VideoData(kind="videos", path=path))


def pack(listing: Listing, out: Path, per_shard: int = 2) -> int:
    return pack_videos(listing, out, per_shard)


def source_of(listing: Listing, **options: object) -> DatasetSource:
    dataset = VideoDataset(listing, sizes=((16, 16),), frames=3, strides=(1, 2))
    return DatasetSource(dataset, **{"seed": 0, "stage": 1, "batch": 4, **options})  # type: ignore[arg-type]


def opened(out: Path) -> Listing:
    return list_video_shards(str(out), shard_paths(str(out)))


def rows(source: DatasetSource, steps: range) -> list[tuple[str, str, bytes, bytes]]:
    return [
        (name, caption, video.numpy().tobytes(), micro.numpy().tobytes())
        for (batch,) in source.batches(steps, [range(4)])
        for name, caption, video, micro in zip(batch.names, batch.captions, batch.video, batch.micro, strict=True)
    ]


def test_training_on_shards_is_training_on_the_folder(folder: Path, tmp_path: Path) -> None:
    assert pack(listed(folder), tmp_path / "shards") == 5
    assert [path.name for path in shard_paths(str(tmp_path / "shards"))] == [f"videos-00000{n}.tar" for n in range(3)]
    wanted = rows(source_of(listed(folder)), range(6))
    assert rows(source_of(opened(tmp_path / "shards")), range(6)) == wanted
    assert rows(source_of(opened(tmp_path / "shards"), workers=2), range(3, 6)) == wanted[12:]


def test_clips_of_an_index_are_packed_once_a_video(folder: Path, tmp_path: Path) -> None:
    facts = {"fps": 25, "width": 24, "height": 16, "motion": 1, "sharpness": 1}
    clips = [
        Clip(file="a.mkv", start=0, end=5, caption="first", **facts),
        Clip(file="d[0:3].mkv", start=2, end=9, caption="other", **facts),
        Clip(file="a.mkv", start=5, end=9, caption="first", **facts),
        Clip(file="b.mkv", start=0, end=9, caption="not kept", dropped=("dark",), **facts),
    ]
    write_clips(folder / "clips.jsonl", clips)
    listing = listed(folder / "clips.jsonl")
    assert [(clip.name, clip.frames) for clip in listing.clips] == [
        ("a.mkv[0:5]", 5),
        ("d[0:3].mkv[2:9]", 7),
        ("a.mkv[5:9]", 4),
    ]
    assert listing.clips[1].read(1, 2, 3)[:, 0, 0].tolist() == [[3, 3, 3], [6, 3, 3]]  # frames 2 + 1 and 2 + 4
    assert pack(listing, tmp_path / "shards") == 2
    packed = opened(tmp_path / "shards")
    assert sorted(clip.name for clip in packed.clips) == sorted(clip.name for clip in listing.clips)
    by_name = {clip.name: clip for clip in packed.clips}
    assert by_name["d[0:3].mkv[2:9]"].read(1, 2, 3)[:, 0, 0].tolist() == [[3, 3, 3], [6, 3, 3]]
    assert by_name["a.mkv[5:9]"].read(0, 1, 1)[0, 0, 0].tolist() == [5, 0, 0]
    assert by_name["a.mkv[5:9]"].caption == "first"


def test_an_index_without_captions_or_without_clips_is_an_error(folder: Path, tmp_path: Path) -> None:
    facts = {"fps": 25, "width": 24, "height": 16, "motion": 1, "sharpness": 1}
    write_clips(folder / "clips.jsonl", [Clip(file="a.mkv", start=0, end=5, **facts)])
    with pytest.raises(CaptionError, match=r"1 of 1 clips have no caption \(first: a.mkv\)"):
        listed(folder / "clips.jsonl")
    captions = tmp_path / "captions.jsonl"
    captions.write_text('{"file": "a.mkv", "caption": "given"}\n')
    given = list_videos_of(VideoData(kind="videos", path=folder / "clips.jsonl", captions=captions))
    assert given.captions == ["given"]
    write_clips(folder / "clips.jsonl", [])
    with pytest.raises(DataError, match="keeps no clips"):
        listed(folder / "clips.jsonl")


def test_a_video_that_an_index_names_and_that_is_gone_is_broken(folder: Path) -> None:
    facts = {"fps": 25, "width": 24, "height": 16, "motion": 1, "sharpness": 1, "caption": "x"}
    write_clips(folder / "clips.jsonl", [Clip(file=name, start=0, end=9, **facts) for name in ("a.mkv", "z.mkv")])
    source = source_of(listed(folder / "clips.jsonl"))
    assert source.broken() == ["z.mkv: no such file"]
    assert {row[0] for row in rows(source, range(3))} == {"a.mkv[0:9]"}


def test_the_library_reads_what_is_packed(folder: Path, tmp_path: Path) -> None:
    import webdataset

    pack(listed(folder), tmp_path / "shards")
    shards = [str(path) for path in shard_paths(str(tmp_path / "shards"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    found = {json.loads(sample["json"])["name"]: sample for sample in samples}
    assert set(found) == {"a.mkv", "b.mkv", "c.c.mkv", "d[0:3].mkv", "inside/e.mkv"}
    assert len({sample["__key__"] for sample in samples}) == 5
    assert found["inside/e.mkv"]["txt"].decode() == "Number 4 è"
    assert found["a.mkv"]["mkv"] == (folder / "a.mkv").read_bytes()


@pytest.mark.parametrize("caption", [{"txt": "Number 0 è"}, {"json": {"caption": " Number  0 è", "url": "..."}}])
def test_shards_of_others_are_looked_into(folder: Path, tmp_path: Path, caption: dict[str, object]) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as tar:
        tar.write({"__key__": "some/video", "mkv": (folder / "a.mkv").read_bytes(), **caption})
        tar.write({"__key__": "some/text", "txt": "no video here"})
    (clip,) = list_video_shards("theirs", [tmp_path / "theirs.tar"]).clips
    assert (clip.name, clip.caption, clip.size, clip.frames) == ("theirs.tar/some/video", "Number 0 è", (16, 24), 12)
    assert clip.read(2, 3, 4)[:, 0, 0, 0].tolist() == [2, 6, 10]


def test_interlaced_videos_in_shards_of_others_are_left_out(tmp_path: Path, write_video: WriteVideo) -> None:
    import webdataset

    combed = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"x264-params": "tff=1"}}
    path = write_video("a.mp4", np.zeros((4, 16, 16, 3), np.uint8), **combed)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar")) as tar:
        tar.write({"__key__": "a", "mp4": path.read_bytes(), "txt": "a clip"})
    listing = list_video_shards("theirs", [tmp_path / "theirs.tar"])
    assert (listing.clips, listing.broken, listing.total) == ([], {}, 1)
    assert listing.left_out["theirs.tar/a"].startswith("is interlaced; deinterlace it")


def test_names_are_split_as_the_library_splits_them() -> None:
    from webdataset.tariterators import base_plus_ext

    for name in ("a.mp4", "b/a.MP4", "b.c/a.seg.json", "b/c.d/e.f.g", "x"):
        key, extension = base_plus_ext(name)
        assert split_name(name) == ((key, extension.lower()) if key else (name, ""))
    assert split_name("b/.hidden") == ("b/.hidden", "")


def test_equal_videos_make_equal_shards(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        pack(listed(folder), tmp_path / name)
    for one, other in zip(*(shard_paths(str(tmp_path / name)) for name in ("one", "other")), strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_nothing_half_written(tmp_path: Path) -> None:
    def samples():  # noqa: ANN202
        yield {"txt": b"one"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "x.tar", samples())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("share", [0.45, 0.6, 0.97])
def test_a_truncated_shard_keeps_what_is_before_the_cut(folder: Path, tmp_path: Path, share: float) -> None:
    pack(listed(folder), tmp_path / "shards", per_shard=5)
    (path,) = shard_paths(str(tmp_path / "shards"))
    whole, fault = read_shard(path)
    assert fault is None
    ends = [max(each.offset + each.size for each in record.members.values()) for record in whole]
    length = int(ends[-1] * share)
    path.write_bytes(path.read_bytes()[:length])
    found, fault = read_shard(path)
    assert fault is not None
    assert "truncated" in fault
    assert [record.members for record in found] == [record.members for record in whole[: len(found)]]
    assert sum(end <= length for end in ends) - len(found) in (0, 1)
    source = source_of(opened(tmp_path / "shards"), max_broken=1.0)
    assert source.broken()[-1].startswith("videos-000000.tar: is truncated")
    assert len({row[0] for row in rows(source, range(5))}) == len(found)


def test_a_tar_that_just_stops_after_a_sample_is_truncated(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [{"txt": b"one"}, {"txt": b"two"}])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:1024])  # one header, one block
    records, fault = read_shard(tmp_path / "x.tar")
    assert (records, fault) == ([], "is truncated or damaged after 0 whole samples")


def test_an_empty_shard_is_whole(tmp_path: Path) -> None:
    assert write_shard(tmp_path / "x.tar", []) == 0
    assert read_shard(tmp_path / "x.tar") == ([], None)


@pytest.mark.parametrize("how", ["text", "empty", "gzip"])
def test_what_is_no_tar_is_broken(folder: Path, tmp_path: Path, how: str) -> None:
    pack(listed(folder), tmp_path / "shards")
    bad = tmp_path / "shards" / "videos-000001.tar"
    if how == "gzip":
        with tarfile.open(bad, "w:gz") as tar:
            tar.addfile(tarfile.TarInfo("x.txt"), io.BytesIO())
    else:
        bad.write_bytes(b"" if how == "empty" else b"hello" * 500)
    source = source_of(opened(tmp_path / "shards"))
    (line,) = source.broken()
    assert line.startswith("videos-000001.tar: is not an uncompressed tar file")
    assert len({row[0] for row in rows(source, range(4))}) == 3


def test_a_video_that_is_damaged_inside_is_replaced_and_named(folder: Path, tmp_path: Path) -> None:
    pack(listed(folder), tmp_path / "shards", per_shard=5)
    (path,) = shard_paths(str(tmp_path / "shards"))
    record = next(record for record in read_shard(path)[0] if b"Number 1" in record.members["txt"].read())
    member = record.members["mkv"]
    with path.open("r+b") as file:
        file.seek(member.offset)
        file.write(bytes(member.size))
    source = source_of(opened(tmp_path / "shards"))
    assert "b.mkv" not in {row[0] for row in rows(source, range(6))}
    (line,) = source.broken()
    assert line.startswith("b.mkv: cannot be read as a video")
    assert "stiv-" not in line  # the name of the temporary file


def test_bad_places_are_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no shards there; give a .tar file, a folder of them, or a pattern"):
        shard_paths(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="no shards there"):
        shard_paths(str(folder))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(DataError, match="full: is there already"):
        pack(listed(folder), tmp_path / "full")
    write_shard(tmp_path / "x.tar", [{"txt": b"one"}])
    with pytest.raises(DataError, match="no videos in these shards"):
        list_video_shards("x", [tmp_path / "x.tar"])


def test_a_video_without_caption_in_a_shard_is_an_error(folder: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "x.tar", [{"mkv": (folder / "a.mkv").read_bytes()}])
    with pytest.raises(CaptionError, match=r"1 of 1 videos have no caption \(first: x.tar/x-000000\)"):
        list_video_shards("x", [tmp_path / "x.tar"])


def test_patterns_name_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("s/train-1.tar", "s/train-0.tar", "s/test-0.tar", "s/.train-2.tar.partial"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in shard_paths(f"{tmp_path}/s/train-*.tar")] == ["train-0.tar", "train-1.tar"]
    assert [path.name for path in shard_paths(f"{tmp_path}/*/test*")] == ["test-0.tar"]
    assert shard_paths(f"{tmp_path}/s/test-0.tar") == [tmp_path / "s" / "test-0.tar"]
    monkeypatch.chdir(tmp_path)
    assert shard_paths("s/test-*.tar") == [Path("s/test-0.tar")]


def test_without_the_library_packing_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install 'stiv-deploy\[data\]'"):
        pack(listed(folder), tmp_path / "shards")
    assert not (tmp_path / "shards").exists()


def test_stills_of_shards(folder: Path, tmp_path: Path) -> None:
    pack(listed(folder), tmp_path / "shards")
    assert torch.equal(source_of(opened(tmp_path / "shards")).stills(7), source_of(listed(folder)).stills(7))
