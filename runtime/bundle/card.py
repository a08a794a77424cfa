"""The README of a bundle: what to do with it, and its model card, all from its manifest."""

from collections.abc import Iterator, Mapping

from stiv_deploy.runtime.bundle.manifest import Bucket, Manifest, Range

README = "README.md"
FP8_OPTION = "session.disable_quant_qdq"
"""The option of an ONNX Runtime session, set to 1, without which FP8 graphs do not load."""

NEVER_RUN = "builds and audits, never run by us"
"""What is known of NVFP4 on the GPUs that have it."""
FP4_TEXT = f"""
Linears of the blocks are in NVFP4. Engines for GPUs of SM 120 and 121 are built from the files `onnx/*.nvfp4.onnx`,
which TensorRT alone reads: **{NEVER_RUN}**. The other files are twins of them: any runtime computes
the same rounded values with them, in products of the bundle's own type.
"""


def nvfp4_note(manifest: Manifest, backend: str) -> str | None:
    """One line on a bundle in NVFP4 that runs on ``backend``; None for any other bundle."""
    if manifest.quantization is None or manifest.quantization.format != "nvfp4":
        return None
    if not backend.startswith("onnxruntime"):
        return f"NVFP4 engines: {NEVER_RUN}; prove them here with 'stiv verify'"
    return (
        f"NVFP4: {backend} computes with values rounded to it, in {manifest.precision} and no faster; engines for SM "
        f"120 and 121 multiply in 4 bits ({NEVER_RUN})"
    )


def readme(manifest: Manifest) -> str:
    """A page of Markdown."""
    rows = "".join(f"| {name} | {text} |\n" for name, text in _facts(manifest))
    return f"""# {manifest.model.name}: a bundle of stiv-deploy

Video from text, and from text and pictures, by the STIV recipe (arXiv 2412.07730): one ONNX graph for each part of the
model, its tokenizer, and engines if some were built. `manifest.json` describes all of it, with the SHA-256 of every
file. Given that this folder is called `bundle`:

```sh
stiv inspect bundle
stiv generate bundle --prompt "what to show" --out clip.mp4
```
{_other_runtimes(manifest)}
## Model card

| | |
|---|---|
{rows}
It draws what its training data showed, and prompts of other words mislead it. Data, licence and known faults are those
of the checkpoint; whoever passes the bundle on should say them here.
"""


def _other_runtimes(manifest: Manifest) -> str:
    if manifest.quantization is not None and manifest.quantization.format == "nvfp4":
        return FP4_TEXT
    if manifest.quantization is None or manifest.quantization.format != "fp8":
        return ""
    return f"""
The graphs hold FP8 (E4M3) weights between QuantizeLinear and DequantizeLinear. TensorRT makes FP8 products of them.
ONNX Runtime has no such kernels and refuses to load the graphs in a session with default options; with the session
option `{FP8_OPTION}` set to `1`, as stiv-deploy does, it simulates them.
"""


def _facts(manifest: Manifest) -> Iterator[tuple[str, str]]:
    model, sampling, record = manifest.model, manifest.sampling, manifest.quantization
    yield "model", f"{model.name}: {model.blocks} blocks of width {model.width}, {model.heads} heads"
    yield "prompts", f"up to {model.max_text_tokens} tokens, longer ones are cut"
    layers = "" if record is None else f", {record.format} in {_quantized(record.layers)} layers"
    yield "precision", f"{manifest.precision}{layers}"
    for bucket in manifest.buckets:
        yield f"sizes, {bucket.name}", _sizes(bucket)
    yield (
        "recommended",
        f"{sampling.frames} frames of {sampling.width}x{sampling.height} at {sampling.frames_per_second} a second, "
        f"{sampling.steps} {sampling.solver} steps, guidance {sampling.guidance_mode} {sampling.guidance_scale:g}",
    )
    if model.student is not None:
        steps = "; few steps are enough, it is a flow map" if model.student.flow_map else ""
        yield "student", f"guidance in one row of the model, at scales {model.student.scales}{steps}"
    if manifest.trained is not None:
        yield "trained for", f"{', '.join(manifest.trained.tasks)}; given: {', '.join(manifest.trained.givings)}"
    for lora in manifest.lora:
        yield "LoRA", f"{lora.name}, merged with scale {lora.scale:g}, SHA-256 `{lora.sha256}`"
    yield "checkpoint", f"SHA-256 `{manifest.checkpoint}`"
    yield "made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())


def _quantized(layers: Mapping[str, str]) -> str:
    return f"{sum(choice != 'high' for choice in layers.values())} of {len(layers)}"


def _sizes(bucket: Bucket) -> str:
    clips, frames, height, width = map(_range, (bucket.batch, bucket.frames, bucket.height, bucket.width))
    return f"{clips} clips at once, {frames} frames, {height} pixels high, {width} wide"


def _range(size: Range) -> str:
    return f"{size.min}" if size.min == size.max else f"{size.min} to {size.max}"
