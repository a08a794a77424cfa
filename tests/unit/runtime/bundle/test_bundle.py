import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.bundle.bundle import Bundle, file_record, read_manifest, write_manifest
from stiv_deploy.runtime.bundle.contract import Student
from stiv_deploy.runtime.bundle.manifest import Bucket, Manifest, ParityRow, Range
from stiv_deploy.runtime.errors import BundleError, OutputError, RequestError

Edit = Callable[[dict[str, Any]], object]


def edit_manifest(folder: Path, edit: Edit) -> None:
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def one_line(caught: pytest.ExceptionInfo[BundleError]) -> str:
    text = str(caught.value)
    assert "\n" not in text
    assert "stiv export" in text
    return text


def test_open_gives_the_manifest_and_verified_files(bundle_path: Path) -> None:
    toy_bundle = Bundle.open(bundle_path)
    assert toy_bundle.manifest.model.name == "toy"
    assert toy_bundle.graph_file("block_00") == bundle_path / "onnx/block_00.onnx"
    assert toy_bundle.tokenizer_file() == bundle_path / "tokenizer.json"


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder") as caught:
        Bundle.open(tmp_path / "nothing")
    one_line(caught)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no bundle here \(manifest.json is missing\)") as caught:
        Bundle.open(tmp_path)
    one_line(caught)


@pytest.mark.parametrize("text", ["", "{", "\x00\x01", "[1, 2]", "{}", '{"format": "stiv-checkpoint"}'])
def test_manifest_that_is_none(own_bundle: Path, text: str) -> None:
    (own_bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="manifest.json: (cannot be read as JSON|not the manifest)") as caught:
        Bundle.open(own_bundle)
    one_line(caught)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (lambda m: m.update(format_version=99), "format version 99, this runtime reads 2"),
        (
            lambda m: m.update(format_version=1),
            "format version 1, this runtime reads 2; make .* again with 'stiv export'",
        ),
        (lambda m: m.update(colour="red"), "colour: Extra inputs are not permitted"),
        (lambda m: m["model"].update(depth=3), "model.depth: Extra inputs are not permitted"),
        (lambda m: m.pop("precision"), "precision: Field required"),
        (lambda m: m.update(buckets=[]), "buckets: Tuple should have at least 1 item"),
        (lambda m: m["buckets"][0]["frames"].update(min=7), "want min <= typical <= max"),
        (lambda m: m["graphs"].pop("head"), "missing graphs head for model 'toy'"),
        (lambda m: m["graphs"].update(tail=m["graphs"]["head"]), "unknown graphs tail"),
        (lambda m: m["model"].update(blocks=3), "missing graphs block_02"),
        (lambda m: m["model"].update(width=8), "graph text_kv does not fit the contract: text_k is float32"),
        (lambda m: m["graphs"]["head"]["spec"]["inputs"].pop(), "graph head .*: inputs lack model_input"),
        (
            lambda m: m["graphs"]["decoder"]["spec"]["outputs"][0].update(name="film"),
            "graph decoder .*: outputs lack video",
        ),
        (lambda m: m.update(precision="bfloat16"), "graph text_encoder .*: text_states is float32"),
        *(
            (lambda m, path=path: m["tokenizer"].update(path=path), "tokenizer.path: the path leaves the bundle")
            for path in ("../../secret", "/etc/passwd", "C:secret", "a\\..\\b", "a//b", "", ".", "a\x00b")
        ),
        (
            lambda m: swap(m["graphs"], "block_00", "block_01"),
            "graph block_00 does not fit the contract: its file is onnx/block_01.onnx, wanted block_00.onnx",
        ),
        (lambda m: swap(m["graphs"], "head", "decoder"), "its file is onnx/decoder.onnx, wanted head.onnx"),
    ],
)
def test_manifest_that_does_not_fit(own_bundle: Path, edit: Edit, fault: str) -> None:
    edit_manifest(own_bundle, edit)
    with pytest.raises(BundleError, match=fault) as caught:
        Bundle.open(own_bundle)
    assert str(own_bundle / "manifest.json") in one_line(caught)


NUMBERS = [
    *(("model.blocks", number) for number in (0, 10**3 + 1, 10**6, 10**30, 10**400)),
    *(("model.max_text_tokens", number) for number in (0, 2**14 + 1, 10**9)),
    *(("model.patch", value) for value in ([0, 0], [1, 10**9], [1], [1, 2, 3])),
    *(("model.base_grid", value) for value in ([0, 1], [-1, 2])),
    *((f"model.{name}", 10**12) for name in ("width", "heads", "latent_channels", "text_width", "base_frames")),
    *((f"model.{name}", number) for name in ("spatial_factor", "temporal_factor") for number in (0, 10**5)),
    *(("model.rope_theta", number) for number in (0, math.inf, math.nan)),
    ("model.heads", 3),
    *(("sampling.frames_per_second", number) for number in (0, 1001, 10**30)),
    *(("sampling.steps", number) for number in (0, 10**20)),
    *((f"sampling.{name}", n) for name in ("guidance_scale", "image_scale") for n in (1e300, -1e300, math.nan)),
    *(("sampling.time_shift", number) for number in (0, 1e9)),
    *(("buckets.0.frames.max", number) for number in (0, 2**16 + 1, 10**30)),
    ("tokenizer.bytes", -1),
    ("tokenizer.sha256", "0" * 65),
    ("opset", 10**9),
    ("checkpoint", "0" * 100_000),
    ("model.name", "x" * 100_000),
    ("tools", {"x": "y" * 100_000}),
    ("graphs", {"x" * 100_000: {}}),
]


@pytest.mark.parametrize(("where", "value"), NUMBERS, ids=[f"{where}={str(value)[:12]}" for where, value in NUMBERS])
def test_every_number_and_name_has_a_bound(own_bundle: Path, where: str, value: object) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        place: Any = manifest
        *folders, last = where.split(".")
        for name in folders:
            place = place[int(name) if name.isdecimal() else name]
        place[last] = value

    edit_manifest(own_bundle, edit)
    with pytest.raises(BundleError, match=f"manifest.json: {where.split('.')[0]}") as caught:
        Bundle.open(own_bundle)
    assert len(one_line(caught).replace(str(own_bundle), "")) < 500
    assert "Value error" not in str(caught.value)


def swap(graphs: dict[str, Any], one: str, other: str) -> None:
    for part in ("file", "data"):
        graphs[one][part], graphs[other][part] = graphs[other][part], graphs[one][part]


def test_long_lists_of_graphs_are_shortened(own_bundle: Path) -> None:
    edit_manifest(own_bundle, lambda m: m["model"].update(blocks=1000))
    with pytest.raises(BundleError, match="missing graphs block_02, block_03, block_04 and 995 more for model 'toy'"):
        Bundle.open(own_bundle)


@pytest.mark.parametrize("text", ["[" * 50_000, '{"format": ' * 50_000, '{"format": ' + "1" * 5000 + "}", "\udcff"])
def test_manifest_that_no_parser_takes(own_bundle: Path, text: str) -> None:
    (own_bundle / "manifest.json").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BundleError, match="manifest.json: cannot be read as JSON") as caught:
        Bundle.open(own_bundle)
    assert len(one_line(caught)) < 500


def test_a_byte_order_mark_is_no_fault(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Bundle.open(own_bundle).manifest.model.name == "toy"


def test_a_bundle_of_links_as_in_the_cache_of_a_model_hub(own_bundle: Path, tmp_path: Path) -> None:
    """Every file is a link to one named by its hash, outside the folder; a damaged one is refused as ever."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for file in [each for each in own_bundle.rglob("*") if each.is_file()]:
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        file.replace(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    opened = Bundle.open(own_bundle)
    assert opened.tokenizer_file() == own_bundle / "tokenizer.json"
    for graph in opened.manifest.graphs:
        assert opened.graph_file(graph).is_symlink()
    write_manifest(own_bundle, opened.manifest)
    assert not (own_bundle / "manifest.json").is_symlink()
    assert all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in blobs.iterdir())
    (own_bundle / "onnx/head.onnx").resolve().write_bytes(bytes(opened.manifest.graphs["head"].file.bytes))
    with pytest.raises(BundleError, match="head.onnx: damaged .*SHA-256"):
        Bundle.open(own_bundle).graph_file("head")


def test_a_name_that_no_file_system_takes() -> None:
    for name in ("x" * 300, "a\0b", "\udcff" * 200):
        with pytest.raises(BundleError, match="no such folder"):
            Bundle.open(name)


@pytest.mark.parametrize("name", ["onnx/head.onnx", "onnx/text_encoder.onnx.data", "tokenizer.json"])
def test_missing_or_short_file(own_bundle: Path, name: str) -> None:
    path = own_bundle / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: damaged .* bytes, the manifest says") as caught:
        Bundle.open(own_bundle)
    one_line(caught)
    path.unlink()
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: missing from the bundle") as caught:
        Bundle.open(own_bundle)
    one_line(caught)


@pytest.fixture
def plugin_path(own_bundle: Path) -> Path:
    """The file of a plugin form that was put into the small bundle for ``block_00``."""
    path = own_bundle / "onnx/block_00.plugin.onnx"
    path.write_bytes(b"nodes of plugins over block_00.onnx.data")
    record = file_record(own_bundle, "onnx/block_00.plugin.onnx").model_dump()
    form = {"file": record, "topology": "0" * 64, "plugins": ["StivSpatialQkv/1"]}
    edit_manifest(own_bundle, lambda m: m["graphs"]["block_00"].update(plugin=form))
    return path


def test_a_graph_may_have_a_plugin_form(own_bundle: Path, plugin_path: Path) -> None:
    opened = Bundle.open(own_bundle)
    assert opened.plugin_file("block_00") == plugin_path
    assert opened.graph_file("block_00") == own_bundle / "onnx/block_00.onnx"
    with pytest.raises(BundleError, match="graph head has no plugin form here; .* --attention plugin'") as caught:
        opened.plugin_file("head")
    one_line(caught)


def test_a_plugin_form_is_checked_as_other_files_are(own_bundle: Path, plugin_path: Path) -> None:
    plugin_path.write_bytes(b"nodes of plugging over block_00.onnx.data")
    with pytest.raises(BundleError, match=f"{re.escape(str(plugin_path))}: damaged .* bytes, the manifest says"):
        Bundle.open(own_bundle)
    plugin_path.write_bytes(b"nodes of plugons over block_00.onnx.data")
    opened = Bundle.open(own_bundle)
    opened.graph_file("block_00")
    with pytest.raises(BundleError, match=f"{re.escape(str(plugin_path))}: damaged .*SHA-256"):
        opened.plugin_file("block_00")
    plugin_path.unlink()
    with pytest.raises(BundleError, match=f"{re.escape(str(plugin_path))}: missing from the bundle"):
        Bundle.open(own_bundle)


def test_weights_are_verified_for_the_plugin_form_too(own_bundle: Path, plugin_path: Path) -> None:
    data = read_manifest(own_bundle).graphs["block_00"].data
    assert data is not None
    path = own_bundle / data.path
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: damaged .*SHA-256"):
        Bundle.open(own_bundle).plugin_file("block_00")


@pytest.mark.parametrize("name", ["onnx/text_encoder.onnx", "onnx/text_encoder.onnx.data"])
def test_changed_byte_is_found_before_first_use(own_bundle: Path, name: str) -> None:
    path = own_bundle / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    toy_bundle = Bundle.open(own_bundle)
    toy_bundle.graph_file("head")
    with pytest.raises(BundleError, match=f"{re.escape(str(path))}: damaged .*SHA-256") as caught:
        toy_bundle.graph_file("text_encoder")
    one_line(caught)


def test_unreadable_file(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stiv_deploy.runtime.bundle.bundle.sha256", fail)
    with pytest.raises(BundleError, match=r"head.onnx: cannot be read \(Permission denied\)") as caught:
        Bundle.open(bundle_path).graph_file("head")
    one_line(caught)


def test_a_file_is_hashed_once(bundle_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_bundle = Bundle.open(bundle_path)
    toy_bundle.graph_file("head")
    monkeypatch.setattr("stiv_deploy.runtime.bundle.bundle.sha256", lambda _: pytest.fail("hashed again"))
    toy_bundle.graph_file("head")


def test_file_record(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx/a.onnx").write_bytes(b"abc")
    record = file_record(tmp_path, "onnx/a.onnx")
    assert record.model_dump() == {"path": "onnx/a.onnx", "sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}


def test_manifest_is_replaced_whole(own_bundle: Path, toy_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (own_bundle / "manifest.json").read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        write_manifest(own_bundle, toy_bundle.manifest.model_copy(update={"opset": 99}))
    assert (own_bundle / "manifest.json").read_text() == before
    assert not list(own_bundle.glob("*.partial")) + list(own_bundle.glob(".*.partial"))
    monkeypatch.undo()
    write_manifest(own_bundle, toy_bundle.manifest.model_copy(update={"opset": 99}))
    assert Bundle.open(own_bundle).manifest.opset == 99


def test_bucket_for(toy_bundle: Bundle) -> None:
    assert toy_bundle.bucket_for(3, 6, 12, 4).name == "small"
    assert toy_bundle.max_batch(6, 12, 4) == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((4, 4, 8, 8), r"batch is 4; this bundle takes 1 to 3$"),
        ((1, 7, 8, 8), r"frames is 7; this bundle takes 1 to 6$"),
        ((1, 0, 8, 8), r"frames is 0; this bundle takes 1 to 6$"),
        ((1, 4, 14, 8), r"height is 14; this bundle takes 4 to 12 in multiples of 2$"),
        ((1, 4, 8, 7), r"width is 7; this bundle takes 4 to 12 in multiples of 2$"),
        ((1, 4, -2, 8), r"height is -2;"),
    ],
)
def test_size_outside_the_buckets(toy_bundle: Bundle, sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        toy_bundle.bucket_for(*sizes)


def bucket(name: str, frames: int, size: int, batch: int) -> Bucket:
    fixed = {"height": Range(min=size, typical=size, max=size), "width": Range(min=size, typical=size, max=size)}
    return Bucket(
        name=name,
        batch=Range(min=1, typical=1, max=batch),
        frames=Range(min=frames, typical=frames, max=frames),
        **fixed,
    )


@pytest.fixture
def two_buckets(toy_bundle: Bundle) -> Bundle:
    buckets = (bucket("long", 8, 4, 4), bucket("large", 2, 12, 1))
    return Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update={"buckets": buckets}))


def test_one_of_several_buckets(two_buckets: Bundle) -> None:
    assert two_buckets.bucket_for(4, 8, 4, 4).name == "long"
    assert two_buckets.bucket_for(1, 2, 12, 12).name == "large"
    assert (two_buckets.max_batch(8, 4, 4), two_buckets.max_batch(2, 12, 12)) == (4, 1)


def test_sizes_that_fit_different_buckets_only(two_buckets: Bundle) -> None:
    with pytest.raises(
        RequestError, match="no bucket holds batch 1, 8 frames of 12x12 .*long: .*large: batch 1, frames 2"
    ):
        two_buckets.bucket_for(1, 8, 12, 12)
    with pytest.raises(RequestError, match="frames is 5; this bundle takes 8 or 2"):
        two_buckets.bucket_for(1, 5, 4, 4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.tuples(*[st.integers(-2, 14)] * 4))
def test_bucket_for_refuses_exactly_what_is_outside(toy_bundle: Bundle, sizes: tuple[int, int, int, int]) -> None:
    batch, frames, height, width = sizes
    sides = all(4 <= side <= 12 and side % 2 == 0 for side in (height, width))
    inside = 1 <= batch <= 3 and 1 <= frames <= 6 and sides
    try:
        toy_bundle.bucket_for(*sizes)
    except RequestError:
        assert not inside
    else:
        assert inside


@pytest.mark.parametrize(("frames", "fits"), [(1, True), (5, True), (4, False), (6, False), (9, False)])
def test_frames_of_a_causal_vae(own_bundle: Path, frames: int, fits: bool) -> None:
    """It codes 4k + 1 frames; the bucket goes to 6."""
    manifest = read_manifest(own_bundle)
    causal = manifest.model.model_copy(update={"temporal_factor": 4, "causal_vae": True})
    bundle = Bundle(own_bundle, manifest.model_copy(update={"model": causal}))
    if fits:
        assert bundle.bucket_for(1, frames, 8, 8).name == "small"
    else:
        with pytest.raises(RequestError, match=f"frames is {frames}; this bundle takes 1 to 6 in steps of 4"):
            bundle.bucket_for(1, frames, 8, 8)


def test_a_manifest_from_before_causal_vaes_is_read(own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    values = json.loads(path.read_text())
    del values["model"]["causal_vae"]
    path.write_text(json.dumps(values))
    assert not read_manifest(own_bundle).model.causal_vae


def test_bundle_hash_is_of_what_the_results_follow_from(toy_bundle: Bundle) -> None:
    manifest = toy_bundle.manifest
    first = manifest.bundle_hash
    assert len(first) == 64
    assert Manifest.model_validate(manifest.model_dump()).bundle_hash == first

    def with_graph(**changes: Any) -> Manifest:
        graph = manifest.graphs["embed"]
        return manifest.model_copy(update={"graphs": manifest.graphs | {"embed": graph.model_copy(update=changes)}})

    record = manifest.graphs["embed"].file.model_copy(update={"sha256": "1" * 64})
    differ = [
        with_graph(file=record),
        with_graph(data=record),
        manifest.model_copy(update={"tokenizer": record}),
        manifest.model_copy(update={"model": manifest.model.model_copy(update={"max_text_tokens": 6})}),
    ]
    assert len({first, *(each.bundle_hash for each in differ)}) == 5
    parity = ParityRow(level="op", name="x", backend="x", precision="x", rel_l2=0, max_abs=0, gate=1, passed=True)
    same = [
        with_graph(file=manifest.graphs["embed"].file.model_copy(update={"path": "elsewhere.onnx"})),
        manifest.model_copy(update={"parity": (parity,)}),
        manifest.model_copy(update={"tools": {}}),
        manifest.model_copy(update={"buckets": manifest.buckets * 2}),
    ]
    assert {each.bundle_hash for each in same} == {first}
    student = manifest.model_copy(
        update={"model": manifest.model.model_copy(update={"student": Student(guidance=(2.0, 6.0))})}
    )
    assert student.bundle_hash != first


def test_bundles_of_before_there_were_students_have_the_hash_that_they_had(toy_bundle: Bundle) -> None:
    """By it tuned defaults, verdicts and records know them."""
    manifest = toy_bundle.manifest
    facts = {"format_version": 2, "model": manifest.model.model_dump(mode="json"), "precision": "float32"}
    del facts["model"]["student"]
    data = {name: graph.data and graph.data.sha256 for name, graph in manifest.graphs.items()}
    graphs = {name: [graph.file.sha256, data[name]] for name, graph in sorted(manifest.graphs.items())}
    text = json.dumps(facts | {"graphs": graphs, "tokenizer": manifest.tokenizer.sha256}, sort_keys=True)
    assert manifest.bundle_hash == hashlib.sha256(text.encode()).hexdigest()


def test_long_names_of_a_contract_are_shortened(bundle_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bundle_path, tmp_path / "bundle")
    values = json.loads((folder / "manifest.json").read_text())
    values["graphs"]["step"]["spec"]["outputs"][0]["shape"][-1] = "x" * 2000
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(BundleError, match="does not fit the contract") as caught:
        Bundle.open(folder)
    assert len(str(caught.value).replace(str(folder), "")) < 500
