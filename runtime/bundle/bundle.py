"""The bundle on disk: opened, checked against its manifest, and written whole or not at all."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from stiv_deploy.runtime.bundle.contract import FRAMES, GraphSpec, block_of, has_layer
from stiv_deploy.runtime.bundle.faults import fault_text
from stiv_deploy.runtime.bundle.lora import Lora
from stiv_deploy.runtime.bundle.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Bucket,
    EngineRecord,
    FileRecord,
    GraphRecord,
    Manifest,
    Range,
)
from stiv_deploy.runtime.errors import BundleError, RequestError, briefly, few
from stiv_deploy.runtime.files import draft, is_folder, read_json, sha256, told, write_text

REMEDY = "make it with 'stiv export CHECKPOINT --out BUNDLE'"
AGAIN = "make the bundle again with 'stiv export'"


def file_record(folder: Path, relative: str) -> FileRecord:
    """Record of the file ``relative`` (forward slashes) of a bundle in ``folder``."""
    path = folder / relative
    return FileRecord(path=relative, sha256=sha256(path), bytes=path.stat().st_size)


def manifest_text(manifest: Manifest) -> str:
    """What ``manifest.json`` says."""
    return json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n"


def write_manifest(folder: Path, manifest: Manifest) -> Path:
    """Write ``manifest`` into ``folder`` in place of the old one, or of a link, whose file is others' too.

    Raises :class:`~stiv_deploy.runtime.errors.OutputError`.
    """
    target = folder / MANIFEST
    with told(target, "choose a folder you may write to"), draft(target) as temporary:
        write_text(temporary, manifest_text(manifest))
        temporary.replace(target)
    return target


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise BundleError(f"{path.parent}: no bundle here ({MANIFEST} is missing); {REMEDY}")
    try:
        values = read_json(path)
    except ValueError as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); {AGAIN}") from None
    if not isinstance(values, dict) or values.get("format") != "stiv-bundle":
        raise BundleError(f"{path}: not the manifest of a STIV bundle (its 'format' is not 'stiv-bundle'); {REMEDY}")
    return values


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; raises a one-line :class:`BundleError` that names file, fault and remedy."""
    path = folder / MANIFEST
    values = _read_json(path)
    if values.get("format_version") != FORMAT_VERSION:
        version = briefly(values.get("format_version"))
        raise BundleError(f"{path}: format version {version}, this runtime reads {FORMAT_VERSION}; {AGAIN}")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise BundleError(f"{path}: {fault_text(error)}; {AGAIN}") from None


def _differences(found: GraphSpec, wanted: GraphSpec) -> Iterator[str]:
    for kind in ("inputs", "outputs"):
        have = {tensor.name: tensor for tensor in getattr(found, kind)}
        want = {tensor.name: tensor for tensor in getattr(wanted, kind)}
        yield from (f"{kind} lack {name}" for name in want if name not in have)
        yield from (f"{kind} have an unknown {briefly(name)}" for name in have if name not in want)
        yield from (
            f"{name} is {have[name].dtype}{briefly(list(have[name].shape))}, wanted {spec.dtype}{list(spec.shape)}"
            for name, spec in want.items()
            if name in have and have[name] != spec
        )


def check_contract(path: Path, manifest: Manifest) -> None:
    """Compare the graphs of ``manifest`` (read from ``path``) with the contract; raises :class:`BundleError`."""
    wanted = manifest.specs
    for what, names in (
        ("missing", [name for name in wanted if name not in manifest.graphs and name != FRAMES]),
        ("unknown", [name for name in manifest.graphs if name not in wanted]),
    ):
        if names:
            raise BundleError(f"{path}: {what} graphs {few(names)} for model {manifest.model.name!r}; {AGAIN}")
    for name, record in manifest.graphs.items():
        faults = (*_differences(record.spec, wanted[name]), *_misnamed(name, record), *_formless(name, manifest))
        for difference in faults:
            raise BundleError(f"{path}: graph {name} does not fit the contract: {difference}; {AGAIN}")


def check_tuned(path: Path, manifest: Manifest) -> None:
    """:class:`BundleError` where ``manifest`` (read from ``path``) has the tuned defaults of another bundle."""
    tuned = manifest.tuned
    if tuned is not None and tuned.bundle != manifest.bundle_hash:
        raise BundleError(
            f"{path}: its tuned defaults are of the bundle {briefly(tuned.bundle[:12])}, this is "
            f"{manifest.bundle_hash[:12]}; remove 'tuned' from it, and run 'stiv tune' again"
        )


def _misnamed(name: str, record: GraphRecord) -> Iterator[str]:
    """Files of graph ``name`` that are called like those of another one: hashes hold for swapped graphs too."""
    plugin, reduced, fp4 = record.plugin, record.reduced, record.fp4
    for file, wanted in (
        (record.file, f"{name}.onnx"),
        (record.data, f"{block_of(name)}.onnx.data"),
        (None if plugin is None else plugin.file, f"{name}.plugin.onnx"),
        (None if reduced is None else reduced.file, f"{name}.{reduced and reduced.precision}.onnx"),
        (None if fp4 is None else fp4.file, f"{name}.nvfp4.onnx"),
        (None if fp4 is None else fp4.data, f"{name}.nvfp4.onnx.data"),
    ):
        if file is not None and PurePosixPath(file.path).name != wanted:
            yield f"its file is {file.path}, wanted {wanted}"


def _formless(name: str, manifest: Manifest) -> Iterator[str]:
    """Graph ``name`` with layers in NVFP4 and no form for engines: they would be built from its twin, and be slow."""
    layers = manifest.quantization.layers if manifest.quantization else {}
    planned = any(choice == "nvfp4" and has_layer(name, layer) for layer, choice in layers.items())
    if planned and manifest.graphs[name].fp4 is None:
        yield "it has layers in NVFP4 and no form for engines"


def _describe(sizes: Iterable[Range], multiple: int, padding: int = 0) -> str:
    """Allowed values in words, per bucket: ``1 to 8``, ``32 to 64 in multiples of 8``, ``5 to 9 in steps of 4``

    ``multiple`` divides the allowed values plus ``padding``.
    """
    ranges = dict.fromkeys(f"{size.min} to {size.max}" if size.min < size.max else f"{size.min}" for size in sizes)
    kind = "steps" if padding else "multiples"
    return " or ".join(ranges) + (f" in {kind} of {multiple}" if multiple > 1 else "")


def _readable_sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); {AGAIN}") from None


class Bundle:
    """An opened bundle: its manifest and the paths of its files. Open with :meth:`open`.

    ``loras`` are merged into its weights where a backend loads them; its files stay as they are.
    """

    def __init__(self, folder: Path, manifest: Manifest, loras: Sequence[Lora] = ()) -> None:
        self.folder = folder
        self.manifest = manifest
        self.loras = tuple(loras)
        self._verified: set[str] = set()

    @cached_property
    def hash(self) -> str:
        """:attr:`Manifest.bundle_hash`, computed once; with LoRAs one over theirs too, as results follow from them."""
        own = self.manifest.bundle_hash
        if not self.loras:
            return own
        text = json.dumps([own, *([lora.sha256, lora.scale] for lora in self.loras)])
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Check the manifest, the contract, and that every file is there with its size.

        Contents are verified on first use, see :meth:`graph_file`. Raises :class:`BundleError`.
        """
        folder = Path(path)
        if not is_folder(folder):
            raise BundleError(f"{folder}: no such folder; {REMEDY}")
        manifest = read_manifest(folder)
        check_contract(folder / MANIFEST, manifest)
        check_tuned(folder / MANIFEST, manifest)
        bundle = cls(folder, manifest)
        for record in bundle._files():
            bundle._check_present(record)
        return bundle

    def _files(self) -> Iterator[FileRecord]:
        for graph in self.manifest.graphs.values():
            forms = [form.file for form in (graph.plugin, graph.reduced, graph.fp4) if form is not None]
            weights = None if graph.fp4 is None else graph.fp4.data
            yield from (record for record in (graph.file, graph.data, weights, *forms) if record is not None)
        yield self.manifest.tokenizer
        if self.manifest.golden is not None:
            yield self.manifest.golden

    def _check_present(self, record: FileRecord) -> None:
        path = self.folder / record.path
        if not path.is_file():
            raise BundleError(f"{path}: missing from the bundle; {AGAIN}")
        size = path.stat().st_size
        if size != record.bytes:
            raise BundleError(f"{path}: damaged ({size} bytes, the manifest says {record.bytes}); {AGAIN}")

    def verified(self, record: FileRecord) -> Path:
        """Path of a recorded file (an engine's too) after checking presence, size and, once, its SHA-256."""
        self._check_present(record)
        path = self.folder / record.path
        if record.path not in self._verified:
            if _readable_sha256(path) != record.sha256:
                raise BundleError(f"{path}: damaged (its SHA-256 differs from the manifest's); {AGAIN}")
            self._verified.add(record.path)
        return path

    def trust(self, written: Manifest) -> None:
        """Take the files that ``written`` names as verified: the manifest of an export by this very process."""
        known = set(Bundle(self.folder, written)._files())
        self._verified |= {record.path for record in self._files() if record in known}

    def with_engines(self, records: Iterable[EngineRecord]) -> "Bundle":
        """The same bundle with these of its engines alone."""
        view = Bundle(self.folder, self.manifest.model_copy(update={"engines": tuple(records)}), self.loras)
        view._verified = self._verified
        return view

    def with_loras(self, loras: Sequence[Lora]) -> "Bundle":
        """The same bundle with ``loras``, which were checked, merged into its weights."""
        view = Bundle(self.folder, self.manifest, loras)
        view._verified = self._verified
        return view

    def graph_file(self, name: str) -> Path:
        """Path of the ONNX file of graph ``name``, it and its external weights verified before first use."""
        record = self.manifest.graphs[name]
        return self._with_weights(record.file, record.data)

    def _with_weights(self, file: FileRecord, data: FileRecord | None) -> Path:
        """Path of an ONNX file that reads the weights ``data`` and no others, both verified."""
        weights = None if data is None else self.verified(data).name
        path = self.verified(file)
        if weights is not None and weights.encode() not in path.read_bytes():  # the format has the name as it is
            raise BundleError(f"{path}: does not read its own weights, {weights}; {AGAIN}")
        return path

    def plugin_file(self, name: str) -> Path:
        """Path of the ONNX file of graph ``name`` with plugin nodes, it and its external weights verified.

        Raises :class:`BundleError` where the bundle has no such form of the graph.
        """
        record = self.manifest.graphs[name]
        if record.plugin is None:
            raise BundleError(
                f"{self.folder}: graph {name} has no plugin form here; make the bundle again with 'stiv export "
                "--attention plugin'"
            )
        return self._with_weights(record.plugin.file, record.data)

    def reduced_file(self, name: str) -> Path:
        """Path of the ONNX file of graph ``name``, which has one, in 16 bits; it and its weights verified."""
        record = self.manifest.graphs[name]
        assert record.reduced is not None, name
        return self._with_weights(record.reduced.file, record.data)

    def fp4_file(self, name: str) -> Path:
        """Path of the ONNX file of graph ``name``, which has one, in NVFP4; it and its own weights verified."""
        form = self.manifest.graphs[name].fp4
        assert form is not None, name
        return self._with_weights(form.file, form.data)

    def tokenizer_file(self) -> Path:
        """Path of ``tokenizer.json``, verified."""
        return self.verified(self.manifest.tokenizer)

    def bucket_for(self, batch: int, frames: int, height: int, width: int) -> Bucket:
        """The first bucket that holds a request of this size; :class:`RequestError` naming what is out of range."""
        sizes = {"batch": batch, "frames": frames, "height": height, "width": width}
        model, buckets = self.manifest.model, self.manifest.buckets
        multiples = {"frames": model.frame_multiple, "height": model.pixel_multiple, "width": model.pixel_multiple}
        for name, size in sizes.items():
            allowed = [getattr(bucket, name) for bucket in buckets]
            multiple, padding = multiples.get(name, 1), model.frame_padding if name == "frames" else 0
            if (size + padding) % multiple or not any(each.min <= size <= each.max for each in allowed):
                raise RequestError(f"{name} is {size}; this bundle takes {_describe(allowed, multiple, padding)}")
        for bucket in buckets:
            if bucket.holds(**sizes):
                return bucket
        shapes = "; ".join(
            f"{bucket.name}: " + ", ".join(f"{name} {_describe([getattr(bucket, name)], 1)}" for name in sizes)
            for bucket in buckets
        )
        raise RequestError(
            f"no bucket holds batch {batch}, {frames} frames of {height}x{width} (H x W) together; {shapes}"
        )

    def max_batch(self, frames: int, height: int, width: int) -> int:
        """The largest batch of such requests; :class:`RequestError` if there is none."""
        buckets = self.manifest.buckets
        self.bucket_for(min(bucket.batch.min for bucket in buckets), frames, height, width)
        return max(
            bucket.batch.max
            for bucket in buckets
            if bucket.holds(batch=bucket.batch.min, frames=frames, height=height, width=width)
        )
