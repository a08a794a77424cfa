"""A bundle from a checkpoint: every graph of the contract traced, written, checked, and described in the manifest."""

import platform
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stiv_deploy.calibration.quantize import require_modelopt
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.golden import golden_answers
from stiv_deploy.export.graphs.lora import check_loras, lora_records, merge_loras
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.onnx_from_module import OPSET
from stiv_deploy.export.graphs.preview import fit_preview
from stiv_deploy.export.graphs.quantization import Quantization, check_shapes, load_quantization
from stiv_deploy.export.graphs.tuned import read_tuned, with_tuned
from stiv_deploy.export.graphs.writer import GRAPH_FOLDER, GraphWriter
from stiv_deploy.export.request import ExportRequest
from stiv_deploy.runtime.bundle.bundle import file_record, manifest_text
from stiv_deploy.runtime.bundle.card import README, readme
from stiv_deploy.runtime.bundle.contract import Frozen, ModelFacts
from stiv_deploy.runtime.bundle.golden import GOLDEN, Golden
from stiv_deploy.runtime.bundle.lora import Lora, read_loras
from stiv_deploy.runtime.bundle.manifest import (
    MANIFEST,
    Bucket,
    FileRecord,
    Manifest,
    Range,
    SamplingDefaults,
    TrainedOn,
)
from stiv_deploy.runtime.bundle.tuned import Tuned
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import check_apart, check_folder, read_json, replaced_folder
from stiv_deploy.runtime.pipeline.limits import GIB, memory_bytes
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS, MAX_FRAMES
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.stiv_ref.checkpoint import Checkpoint, CheckpointConfig, CheckpointFolder, open_checkpoint
from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults as CheckpointDefaults

TOOLS = ("stiv-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


class ExportReport(Frozen):
    """What an export wrote: the bundle's folder, its manifest, whether its graphs were compared, and wall seconds."""

    bundle: Path
    manifest: Manifest
    checked: bool
    seconds: float

    def __str__(self) -> str:
        """One line."""
        from stiv_deploy.runtime.command.inspection import precision_text

        graphs = self.manifest.graphs.values()
        plugins = [graph.plugin for graph in graphs if graph.plugin]
        files = {file for graph in graphs for file in (graph.file, graph.data) if file}  # halves read their block's
        files |= {file for graph in graphs if graph.fp4 for file in (graph.fp4.file, graph.fp4.data)}
        megabytes = sum(file.bytes for file in [*files, *(plugin.file for plugin in plugins)]) / 1e6
        forms = f"{len(graphs)} graphs" + (f" ({len(plugins)} also with plugin nodes)" if plugins else "")
        precision = precision_text(self.manifest)
        return f"{self.bundle}: {forms}, {megabytes:.1f} MB, {precision}, {self._checked}, {self.seconds:.0f} s"

    @property
    def _checked(self) -> str:
        if not self.checked:
            return "not compared with the reference"
        if self.manifest.precision == "bfloat16":
            return "float32 graphs checked (bfloat16 not executed: ONNX Runtime has no such kernels on CPUs)"
        return "all checked against the reference"


def export_bundle(request: ExportRequest, progress: Progress = unheard) -> ExportReport:
    """Write the bundle that ``request`` asks for, whole or not at all.

    An existing bundle is replaced when the new one is complete, any other folder is refused. Raises
    :class:`~stiv_deploy.stiv_ref.errors.CheckpointError`, :class:`~stiv_deploy.calibration.errors.CalibrationError`
    (scales or plan of another model, or no ModelOpt for the comparison),
    :class:`~stiv_deploy.runtime.errors.LoraError` (a file that is none, or of another model), :class:`ExportError`
    (sizes that the model or the plugins cannot take), :class:`OutputError`, all before the checkpoint is loaded where
    possible, or :class:`~stiv_deploy.export.errors.CheckError`.
    """
    started = time.monotonic()
    refuse_bad_target(request.out)
    loras = read_loras(request.loras)
    check_apart([request.out], [request.checkpoint, request.scales, request.plan, *(lora.path for lora in loras)])
    opened = open_checkpoint(request.checkpoint)
    check_loras(loras, opened)
    buckets = buckets_of(request, opened.config)
    quantization = quantization_of(request, opened)
    found = read_tuned(opened) if request.tuned and not loras else None  # it is of the weights without them
    checkpoint = opened.load()
    validate_vocabulary(checkpoint)
    merge_loras(checkpoint, loras)
    if quantization is not None:
        check_shapes(quantization.scales, checkpoint.model)
    with replaced_folder(request.out, "choose another --out") as folder:
        manifest = _write(request, checkpoint, loras, buckets, quantization, found, folder, progress)
    seconds = time.monotonic() - started
    return ExportReport(bundle=request.out, manifest=manifest, checked=request.check, seconds=seconds)


def _write(
    request: ExportRequest,
    checkpoint: Checkpoint,
    loras: tuple[Lora, ...],
    buckets: tuple[Bucket, ...],
    quantization: Quantization | None,
    found: Tuned | None,
    folder: Path,
    progress: Progress,
) -> Manifest:
    """Graphs, tokenizer, manifest and README, into ``folder``."""
    (folder / GRAPH_FOLDER).mkdir()
    writer = GraphWriter(
        checkpoint,
        folder / GRAPH_FOLDER,
        request.precision,
        quantization,
        request.attention,
        request.engine_vae_precision,
        halves=request.halves,
        skips=request.skips,
    )
    graphs = writer.write_all(buckets, request.check, progress)
    manifest = Manifest(
        precision=request.precision,
        opset=OPSET,
        model=writer.facts,
        sampling=sampling_defaults(checkpoint.config.sampling, buckets),
        buckets=buckets,
        graphs=graphs,
        tokenizer=_copy_tokenizer(checkpoint.path, folder),
        checkpoint=checkpoint.sha256,
        lora=lora_records(loras),
        trained=trained_facts(checkpoint.config),
        quantization=None if quantization is None else quantization.record(),
        preview=fit_preview(checkpoint.vae),
        golden=write_golden(folder, golden_answers(writer, graphs, buckets, progress)),
        tools=tool_versions(),
    )
    manifest = with_tuned(manifest, found)
    (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    (folder / README).write_text(readme(manifest), encoding="utf-8")
    return manifest


def write_golden(folder: Path, golden: Golden) -> FileRecord:
    """Write the answers into the bundle in ``folder``."""
    (folder / GOLDEN).write_text(golden.model_dump_json() + "\n", encoding="utf-8")
    return file_record(folder, GOLDEN)


def buckets_of(request: ExportRequest, config: CheckpointConfig) -> tuple[Bucket, ...]:
    """The buckets that ``request`` means for a checkpoint; :class:`ExportError` if its model cannot take them."""
    facts = model_facts(config)
    default = default_bucket(config.sampling, facts).model_copy(update=dict(request.sizes))
    buckets = request.buckets or (default,)
    for bucket in buckets:
        validate_bucket(bucket, facts)
        if request.check:
            validate_memory(bucket)
    if request.attention == "plugin":
        validate_plugins(buckets, facts)
    if request.halves and not facts.temporal:
        raise ExportError("--halves: devices share the frames of a clip, and an image model makes one; leave it out")
    if request.skips and facts.student is not None and facts.student.flow_map:
        raise ExportError("--skips: a flow map has few steps, and each is of its own length; leave it out")
    return buckets


def quantization_of(request: ExportRequest, checkpoint: CheckpointFolder) -> Quantization | None:
    """Scales and plan of ``request``, checked against the checkpoint; None for a bundle without 8-bit layers."""
    if request.format is None or request.scales is None:
        return None
    if request.check and request.precision != "bfloat16":
        require_modelopt()
    return load_quantization(checkpoint, request.format, request.scales, request.plan)


def refuse_bad_target(out: Path) -> None:
    """Raise :class:`OutputError` if ``out`` is something that a bundle must not replace."""
    check_folder(out, "choose another --out")
    if out.is_dir() and any(out.iterdir()) and not _is_bundle(out):
        raise OutputError(f"{out}: this folder is not a bundle and is not empty; choose another --out or remove it")


def _is_bundle(folder: Path) -> bool:
    try:
        return read_json(folder / MANIFEST).get("format") == "stiv-bundle"
    except (ValueError, AttributeError):
        return False


def validate_vocabulary(checkpoint: Checkpoint) -> None:
    """Raise :class:`ExportError` if the tokenizer can give token ids that the text encoder has no embedding for."""
    words, known = checkpoint.tokenizer.get_vocab_size(), checkpoint.config.text.vocabulary
    if words > known:
        raise ExportError(
            f"{checkpoint.path}: tokenizer.json has {words} tokens, the text encoder {known}; use the tokenizer that "
            "it was trained with"
        )


def default_bucket(sampling: CheckpointDefaults, facts: ModelFacts) -> Bucket:
    """From half to twice the size that the checkpoint was trained for, one frame to twice its frames, batch 1 to 4."""

    def around(size: int, multiple: int, smallest: int, padding: int = 0) -> Range:
        low = max(multiple, (smallest + padding) // multiple * multiple)
        return Range(min=min(low - padding, size), typical=size, max=2 * (size + padding) - padding)

    pixels, one = facts.pixel_multiple, Range(min=1, typical=1, max=1)
    frames = around(sampling.frames, facts.frame_multiple, 1, facts.frame_padding) if facts.temporal else one
    return Bucket(
        name="default",
        batch=Range(min=1, typical=1, max=4),
        frames=frames,
        height=around(sampling.height, pixels, sampling.height // 2),
        width=around(sampling.width, pixels, sampling.width // 2),
    )


def validate_bucket(bucket: Bucket, facts: ModelFacts) -> None:
    """Raise :class:`ExportError` if the model cannot take the sizes of ``bucket``."""
    for what, allowed, multiple, padding in (
        ("frames", bucket.frames, facts.frame_multiple, facts.frame_padding),
        ("height", bucket.height, facts.pixel_multiple, 0),
        ("width", bucket.width, facts.pixel_multiple, 0),
    ):
        sizes = (allowed.min, allowed.typical, allowed.max)
        if any((size + padding) % multiple for size in sizes):
            given = ":".join(map(str, sizes))
            some = ", ".join(str(count * multiple - padding) for count in (1, 2, 3))
            takes = f"{some}, ..." if padding else f"multiples of {multiple}"
            raise ExportError(f"{what} {given}: this model takes {takes}; change --{what}")
    if not facts.temporal and bucket.frames.max != 1:
        raise ExportError(f"frames up to {bucket.frames.max}: an image model makes one frame; use --frames 1:1:1")


def validate_memory(bucket: Bucket) -> None:
    """:class:`ExportError` if this machine cannot hold the videos that graphs are compared on: fp32, twice."""
    largest = bucket.batch.max * bucket.frames.max * bucket.height.max * bucket.width.max
    needed, there = 2 * 3 * 4 * largest, memory_bytes()
    if there is not None and needed > there:
        raise ExportError(
            f"bucket {bucket.name}: its largest videos need {needed / GIB:.3g} GiB of memory to compare graphs on, "
            f"here are {there / GIB:.3g}; make its ranges smaller, or give --no-check"
        )


def validate_plugins(buckets: Sequence[Bucket], facts: ModelFacts) -> None:
    """Raise :class:`ExportError` if the plugins cannot take the model's heads or the frames of a bucket."""
    if facts.head_dim not in HEAD_DIMS:
        known = ", ".join(map(str, HEAD_DIMS))
        raise ExportError(
            f"--attention plugin: the plugins take heads of {known}, this model has {facts.head_dim}; "
            "use --attention native"
        )
    for bucket in buckets if facts.temporal else ():
        frames = bucket.dims(facts, "max")["token_frames"]
        if frames > MAX_FRAMES:
            raise ExportError(
                f"--attention plugin: the plugins take at most {MAX_FRAMES} token frames, bucket {bucket.name} has up "
                f"to {frames} (frames up to {bucket.frames.max}); change --frames or use --attention native"
            )


def sampling_defaults(sampling: CheckpointDefaults, buckets: Sequence[Bucket]) -> SamplingDefaults:
    """The checkpoint's recommendations; the first bucket's typical size where no bucket holds its own size."""
    values = sampling.model_dump(mode="json") | {"stride": sampling.stride or 1}
    size = {name: values[name] for name in ("frames", "height", "width")}
    if not any(bucket.holds(batch=bucket.batch.min, **size) for bucket in buckets):
        size = {name: getattr(buckets[0], name).typical for name in size}
    return SamplingDefaults(**values | size)


def trained_facts(config: CheckpointConfig) -> TrainedOn | None:
    """What the checkpoint says that it was trained on, for the manifest; None if it does not."""
    return None if config.trained is None else TrainedOn(**config.trained.model_dump())


def _copy_tokenizer(checkpoint_path: Path, folder: Path) -> FileRecord:
    shutil.copyfile(checkpoint_path / "tokenizer.json", folder / "tokenizer.json")
    return file_record(folder, "tokenizer.json")


def tool_versions() -> dict[str, str]:
    """Versions of what made the bundle."""
    found = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}
