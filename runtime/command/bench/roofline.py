"""What an evaluation of the model has to compute and to move at least, and how near a measured time comes to that.

Operations are those of the reference's block (``stiv_ref/block.py``): a multiply and an add count two, norms and
element-wise work nothing. Bytes are a lower bound: every weight once, tokens in and out of every block, keys and values
of the text once. Peaks are those of NVIDIA's data sheets, dense, with accumulation in float32.
"""

from collections.abc import Mapping
from typing import NamedTuple

from stiv_deploy.runtime.backends.base import ITEM_BYTES
from stiv_deploy.runtime.bundle.contract import Frozen, ModelFacts, block_names
from stiv_deploy.runtime.bundle.manifest import Manifest

TERA, GIGA = 1e12, 1e9
SQUARES = 6
"""Weights of width x width in a block besides the FFN and attention in time: qkv and out, and of the text q and out."""
TEMPORAL_SQUARES = 4


class Peak(NamedTuple):
    """Operations a second in 16 bits, FP8, INT8 and FP4, of bytes a second; None: there is no such arithmetic."""

    half: float
    fp8: float | None
    int8: float
    bandwidth: float
    fp4: float | None = None

    def of(self, quantization: str | None) -> float | None:
        """Operations a second of the linear layers."""
        return {None: self.half, "fp8": self.fp8, "int8": self.int8, "nvfp4": self.fp4}[quantization]


PEAKS = {
    "RTX 4090": Peak(165 * TERA, 330 * TERA, 661 * TERA, 1008 * GIGA),
    "RTX 5090": Peak(210 * TERA, 419 * TERA, 838 * TERA, 1792 * GIGA, 1676 * TERA),
    "L40S": Peak(362 * TERA, 733 * TERA, 733 * TERA, 864 * GIGA),
    "A100": Peak(312 * TERA, None, 624 * TERA, 2039 * GIGA),
    "H100": Peak(989 * TERA, 1979 * TERA, 1979 * TERA, 3350 * GIGA),
    "H200": Peak(989 * TERA, 1979 * TERA, 1979 * TERA, 4800 * GIGA),
    "B200": Peak(2250 * TERA, 4500 * TERA, 4500 * TERA, 8000 * GIGA, 9000 * TERA),
}
"""By a part of the device's name; the A100 with 80 GB, the H100 as SXM."""


class Roofline(Frozen):
    """Of one evaluation over all rows: operations of linear layers and of attention, least bytes, rates reached.

    ``least_seconds`` is what the machine's peaks allow, None where they are not known; ``share`` of it in the measured.
    """

    linear: float
    attention: float
    bytes: float
    operations_per_second: float
    bytes_per_second: float
    least_seconds: float | None
    share: float | None


def ffn_ratio(manifest: Manifest) -> int:
    """Hidden size of the FFN by the width, from the bytes of a block's weights: the manifest does not say it."""
    model, record = manifest.model, manifest.graphs["block_00"]
    nbytes = (record.file if record.data is None else record.data).bytes
    return max(1, round((nbytes / _weight_bytes(manifest) / model.width**2 - _squares(model)) / 2))


def _squares(model: ModelFacts) -> int:
    return SQUARES + TEMPORAL_SQUARES * model.temporal


def _weight_bytes(manifest: Manifest) -> float:
    """Bytes of a weight: the mean over the first block's layers where some are in 8 bits; those of NVFP4's twin."""
    plain = ITEM_BYTES[manifest.precision]
    if manifest.quantization is None or manifest.quantization.format == "nvfp4":
        return plain
    layers = [choice for name, choice in manifest.quantization.layers.items() if name.startswith("block_00.")]
    high = sum(choice == "high" for choice in layers) / max(1, len(layers))
    return high * plain + (1 - high)


def operations(model: ModelFacts, ffn: int, dims: Mapping[str, float]) -> tuple[float, float]:
    """Of linear layers and of attention, in all blocks over all rows of ``dims``."""
    frames, places, text = dims["token_frames"], dims["tokens"], dims["text_tokens"]
    tokens = dims["model_batch"] * frames * places * model.blocks
    linear = 2 * (_squares(model) + 2 * ffn) * model.width**2
    attention = 4 * model.width * (places + text + (frames if model.temporal else 0))
    return float(tokens * linear), float(tokens * attention)


def least_bytes(manifest: Manifest, dims: Mapping[str, float]) -> float:
    """Bytes that all blocks have to read and write over all rows of ``dims``: in NVFP4 those of engines."""
    model, item = manifest.model, ITEM_BYTES[manifest.precision]
    records = [manifest.graphs[name] for name in block_names(model.blocks)]
    files = [each.data or each.file if each.fp4 is None else each.fp4.data for each in records]
    weights = sum(file.bytes for file in files)
    tokens = dims["token_frames"] * dims["tokens"] + dims["text_tokens"]
    return weights + 2.0 * model.blocks * dims["model_batch"] * tokens * model.width * item


def peak_of(device: str) -> Peak | None:
    """The peak of a device by its name, None if it is not known."""
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def roofline(manifest: Manifest, dims: Mapping[str, float], seconds: float, device: str) -> Roofline:
    """Where an evaluation of ``seconds`` over ``dims`` stands."""
    linear, attention = operations(manifest.model, ffn_ratio(manifest), dims)
    nbytes, peak = least_bytes(manifest, dims), peak_of(device)
    quantization = None if manifest.quantization is None else manifest.quantization.format
    fast = None if peak is None else peak.of(quantization)
    least = None
    if peak is not None and fast is not None and manifest.precision != "float32":
        least = max(linear / fast + attention / peak.half, nbytes / peak.bandwidth)
    return Roofline(
        linear=linear,
        attention=attention,
        bytes=nbytes,
        operations_per_second=(linear + attention) / seconds,
        bytes_per_second=nbytes / seconds,
        least_seconds=least,
        share=None if least is None else least / seconds,
    )
