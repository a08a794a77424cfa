"""A bundle from a checkpoint: every graph of the contract traced, written, checked, and described in the manifest."""

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stiv_deploy.calibration.quantize import require_modelopt
from stiv_deploy.export.errors import ExportError
from stiv_deploy.export.graphs.modules import model_facts
from stiv_deploy.export.graphs.onnx_from_module import OPSET
from stiv_deploy.export.graphs.quantization import Quantization, check_quantization
from stiv_deploy.export.graphs.writer import GRAPH_FOLDER, GraphWriter, Progress
from stiv_deploy.runtime.bundle.bundle import file_record, manifest_text
from stiv_deploy.runtime.bundle.contract import ModelFacts, Precision
from stiv_deploy.runtime.bundle.engine_files import Attention
from stiv_deploy.runtime.bundle.manifest import MANIFEST, Bucket, FileRecord, Manifest, Range, SamplingDefaults
from stiv_deploy.runtime.errors import OutputError
from stiv_deploy.runtime.files import replaced_folder
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS, MAX_FRAMES
from stiv_deploy.stiv_ref.checkpoint import (
    Checkpoint,
    CheckpointConfig,
    checkpoint_hash,
    load_checkpoint,
)
from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults as CheckpointDefaults
from stiv_deploy.stiv_ref.config import read_config

TOOLS = ("stiv-deploy", "torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime")


def export_bundle(
    checkpoint_path: Path,
    out: Path,
    precision: Precision = "float32",
    buckets: Sequence[Bucket] | None = None,
    check: bool = True,
    progress: Progress = lambda text, done, total: None,
    quantization: Quantization | None = None,
    attention: Attention = "native",
) -> Path:
    """Write the bundle of a checkpoint to the folder ``out`` and return its path.

    An existing bundle at ``out`` is replaced when the new one is complete, any other folder is refused. ``buckets``
    default to half to twice the checkpoint's own sizes. With ``check``, each graph is compared with the reference at
    the sizes of every bucket; the structural checks always run. With ``quantization``, layers run in 8 bits by its plan
    and ``precision`` is the type of everything else. With ``attention`` ``plugin``, each block has a second file with
    plugin nodes for its attention in space and time, over the same weights.

    Raises :class:`CheckpointError`, :class:`CalibrationError` (scales or plan of another model, or no ModelOpt for the
    comparison), :class:`ExportError` (sizes that the model or the plugins cannot take), :class:`OutputError`, or
    :class:`CheckError`.
    """
    refuse_bad_target(out)
    checkpoint = load_checkpoint(checkpoint_path)
    validate_vocabulary(checkpoint, checkpoint_path)
    facts = model_facts(checkpoint.config)
    if quantization is not None:
        if check and precision != "bfloat16":
            require_modelopt()
        check_quantization(quantization, checkpoint_path, checkpoint.config.model, checkpoint.model)
    chosen = tuple(buckets or (default_bucket(checkpoint.config.sampling, facts),))
    for bucket in chosen:
        validate_bucket(bucket, facts)
    if attention == "plugin":
        validate_plugins(chosen, facts)
    with replaced_folder(out, "choose another --out") as folder:
        (folder / GRAPH_FOLDER).mkdir()
        writer = GraphWriter(checkpoint, folder / GRAPH_FOLDER, precision, quantization, attention)
        graphs = writer.write_all(chosen, check, progress)
        manifest = Manifest(
            precision=precision,
            opset=OPSET,
            model=facts,
            sampling=sampling_defaults(checkpoint.config.sampling, chosen),
            buckets=chosen,
            graphs=graphs,
            tokenizer=_copy_tokenizer(checkpoint_path, folder),
            checkpoint=checkpoint_hash(checkpoint_path),
            quantization=None if quantization is None else quantization.record(),
            tools=tool_versions(),
        )
        (folder / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    return out


def refuse_bad_target(out: Path) -> None:
    """Raise :class:`OutputError` if ``out`` is something that a bundle must not replace."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: this is a file; a bundle is a folder, choose another --out")
    target = out.resolve()
    ancestor = next(folder for folder in target.parents if folder.exists())  # the bundle is renamed into its parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise OutputError(
            f"{out}: cannot be written, {ancestor} is not a folder that takes files; choose another --out"
        )
    if out.is_dir() and any(out.iterdir()) and not _is_bundle(out):
        raise OutputError(f"{out}: this folder is not a bundle and is not empty; choose another --out or remove it")


def _is_bundle(folder: Path) -> bool:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8")).get("format") == "stiv-bundle"
    except (OSError, ValueError, AttributeError):
        return False


def validate_vocabulary(checkpoint: Checkpoint, path: Path) -> None:
    """Raise :class:`ExportError` if the tokenizer can give token ids that the text encoder has no embedding for."""
    words, known = checkpoint.tokenizer.get_vocab_size(), checkpoint.config.text.vocabulary
    if words > known:
        raise ExportError(
            f"{path}: tokenizer.json has {words} tokens, the text encoder {known}; use the tokenizer that it was "
            "trained with"
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


def buckets_for(checkpoint_path: Path, ranges: Mapping[str, Range]) -> tuple[Bucket, ...]:
    """The default bucket of a checkpoint with some of its ranges (batch, frames, height, width) given."""
    config = read_config(CheckpointConfig, checkpoint_path / "config.json")
    return (default_bucket(config.sampling, model_facts(config)).model_copy(update=dict(ranges)),)


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
    values = sampling.model_dump()
    size = {name: values[name] for name in ("frames", "height", "width")}
    if not any(bucket.holds(batch=bucket.batch.min, **size) for bucket in buckets):
        size = {name: getattr(buckets[0], name).typical for name in size}
    return SamplingDefaults(**values | size)


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
