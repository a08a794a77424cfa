"""LoRA files: low-rank changes of a transformer's linears, read, checked, and merged into their weights.

A linear with the weight W [out, in] becomes one with W + scale * alpha / r * B A, where A is [r, in] and B [out, r]
(Hu et al., arXiv 2106.09685, section 4.1). Files are safetensors in the layout of PEFT and diffusers:
``transformer.<linear>.lora_A.weight`` is A, ``transformer.<linear>.lora_B.weight`` is B, and alpha is the tensor
``transformer.<linear>.alpha`` of one value, else what ``lora_adapter_metadata`` in the file's metadata says, else r.
``<linear>`` is the name of a linear in the reference's model, such as ``blocks.0.spatial.qkv``. Files of
``stiv train`` also name the checkpoint that they are for, by its hash.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.errors import LoraError, briefly, few, one_line
from stiv_deploy.runtime.files import parse_json

PREFIX = "transformer."
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
METADATA, BASE = "lora_adapter_metadata", "stiv.base"
"""Key of a file's metadata under which diffusers keeps settings, as JSON; among them we keep the checkpoint's hash."""
LAYOUT = f"'{PREFIX}<linear>{DOWN}' and '{PREFIX}<linear>{UP}', as PEFT and diffusers write them"
SCALE_LIMIT = 100.0
SIZE_LIMIT = 2**34
"""Most bytes of a file: more than the largest rank makes of the largest model."""
HEADER_LIMIT = 2**26
WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that factors are read from, and their bytes."""


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The change of one linear: ``down`` fp32 [r, in] (A), ``up`` fp32 [out, r] (B), and ``alpha``."""

    down: np.ndarray
    up: np.ndarray
    alpha: float

    @property
    def shape(self) -> tuple[int, int]:
        """That of the weight, [out, in]."""
        return self.up.shape[0], self.down.shape[1]

    def change(self, scale: float) -> np.ndarray:
        """What is added to the weight, fp32 [out, in]."""
        return np.float32(scale * self.alpha / len(self.down)) * (self.up @ self.down)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file, read and checked in itself, and the ``scale`` that it is merged with.

    ``base`` is the hash of the checkpoint that it was trained for, None where the file does not tell.
    """

    path: Path
    sha256: str
    scale: float
    base: str | None
    factors: Mapping[str, Factors] = field(repr=False)


def parse_lora(text: str) -> tuple[Path, float]:
    """File and scale of ``FILE[:SCALE]``, by default 1; raises :class:`LoraError`."""
    head, colon, tail = text.rpartition(":")
    try:
        scale = float(tail) if colon and head else None
    except ValueError:
        scale = None
    if scale is not None and not abs(scale) <= SCALE_LIMIT:
        raise LoraError(f"--lora {briefly(text)}: the scale is {tail}; give one between -100 and 100")
    return (Path(text), 1.0) if scale is None else (Path(head), scale)


def read_loras(texts: Iterable[str]) -> tuple[Lora, ...]:
    """The files of options ``FILE[:SCALE]``; raises :class:`LoraError`."""
    return tuple(read_lora(*parse_lora(text)) for text in texts)


def read_lora(path: Path, scale: float = 1.0) -> Lora:
    """Read a LoRA file; :class:`LoraError` if it is missing, damaged or laid out otherwise."""
    content = _content(path)
    metadata, tensors = _tensors(path, content)
    settings = _settings(path, metadata)
    _check_keys(path, tensors)
    names = [key.removeprefix(PREFIX).removesuffix(DOWN) for key in tensors if key.endswith(DOWN)]
    return Lora(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        scale=scale,
        base=_base(path, settings),
        factors={name: _factors(path, name, tensors, settings) for name in names},
    )


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraError(f"{path}: cannot be read ({reason}); name a LoRA file") from None
    if len(content) > SIZE_LIMIT:
        raise LoraError(f"{path}: larger than a LoRA is; name another file")
    return content


def _tensors(path: Path, content: bytes) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors (fp32) of a safetensors file."""
    try:
        length = int.from_bytes(content[:8], "little")
        if not 2 <= length <= min(HEADER_LIMIT, len(content) - 8):
            raise ValueError("its header does not fit into it")
        header = parse_json(content[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata is not text")
        data = memoryview(content)[8 + length :]
        return metadata, {name: _array(name, entry, data) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) else "its header is none"
        raise LoraError(f"{path}: not a readable safetensors file ({briefly(reason, 200)}); name a LoRA file") from None


def _array(name: str, entry: Mapping[str, Any], data: memoryview) -> np.ndarray:
    """A tensor by its entry in the header, as fp32; ``ValueError`` if it is of another type or not inside."""
    kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if kind not in WIDTHS:
        raise ValueError(f"{name} is of type {kind}, weights are of {', '.join(WIDTHS)}")
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, start, end)):
        raise ValueError(f"{name} has no whole sizes")
    if not (start <= end <= len(data) and end - start == math.prod(shape) * WIDTHS[kind]):
        raise ValueError(f"{name} does not lie in it in its full size")
    raw = np.frombuffer(data[start:end], np.uint8)
    if kind == "BF16":  # the upper half of a float32
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return raw.view(f"<f{WIDTHS[kind]}").astype(np.float32).reshape(shape)


def _settings(path: Path, metadata: Mapping[str, str]) -> Mapping[str, Any]:
    """Settings of the adapter by their names in PEFT; empty where the file has none."""
    try:
        settings = parse_json(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise LoraError(f"{path}: its metadata {METADATA} cannot be read ({error}); write the file again") from None
    if not isinstance(settings, dict):
        raise LoraError(f"{path}: its metadata {METADATA} is not an object of settings; write the file again")
    own = {key.removeprefix(PREFIX): value for key, value in settings.items()}
    if used := [key for key in ("use_dora", "use_rslora", "alpha_pattern", "lora_bias") if own.get(key)]:
        raise LoraError(f"{path}: it uses {few(used)}, which cannot be merged here; train it without")
    return own


def _base(path: Path, settings: Mapping[str, Any]) -> str | None:
    """Hash of the checkpoint that the file is for; None where it does not tell."""
    base = settings.get(BASE)
    if not isinstance(base, str | None):
        raise LoraError(f"{path}: its metadata {METADATA} has no hash under {BASE}; write the file again")
    return base


def _check_keys(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """:class:`LoraError` unless all keys are of the layout and come in pairs, and all values are finite."""
    endings = (DOWN, UP, ALPHA)
    if unknown := [key for key in tensors if not (key.startswith(PREFIX) and key.endswith(endings))]:
        raise LoraError(f"{path}: unknown keys {few(unknown)}; want {LAYOUT}")
    have = {end: {key.removesuffix(end) for key in tensors if key.endswith(end)} for end in endings}
    if alone := sorted((have[DOWN] ^ have[UP]) | (have[ALPHA] - have[DOWN])):
        raise LoraError(f"{path}: {few(alone)} has not both factors; want {LAYOUT}")
    if not have[DOWN]:
        raise LoraError(f"{path}: no LoRA in it; want {LAYOUT}")
    if bad := [key for key, values in tensors.items() if not np.isfinite(values).all()]:
        raise LoraError(f"{path}: NaN or infinity in {few(bad)}; it has diverged, train it with a lower learning_rate")


def _factors(path: Path, name: str, tensors: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Factors:
    """The factors of the linear ``name``; :class:`LoraError` if they have no rank in common, or no alpha."""
    down, up = (tensors[f"{PREFIX}{name}{end}"] for end in (DOWN, UP))
    if not (down.ndim == up.ndim == 2 and len(down) == up.shape[1] > 0):
        raise LoraError(
            f"{path}: {name} has lora_A {list(down.shape)} and lora_B {list(up.shape)}; want [rank, in] and [out, rank]"
        )
    own = tensors.get(f"{PREFIX}{name}{ALPHA}")
    alpha: Any = settings.get("lora_alpha", len(down)) if own is None else own.item() if own.size == 1 else None
    if not (isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) <= 1e6):
        raise LoraError(f"{path}: alpha of {name} is {briefly(alpha)}; want one number")
    return Factors(down=down, up=up, alpha=float(alpha))


def check_lora(lora: Lora, linears: Mapping[str, tuple[int, int]], base: str) -> None:
    """:class:`LoraError` unless ``lora`` is for the checkpoint with the hash ``base``.

    ``linears`` are the model's, by name, with the shapes [out, in] of their weights.
    """
    if lora.base not in (None, base):
        raise LoraError(
            f"{lora.path}: trained for the checkpoint {one_line(lora.base[:12])}, this one is {base[:12]}; name a LoRA "
            "of this one"
        )
    if unknown := [name for name in lora.factors if name not in linears]:
        raise LoraError(f"{lora.path}: the model has no linears {few(unknown)}; name a LoRA of this model")
    for name, factors in lora.factors.items():
        if factors.shape != linears[name]:
            raise LoraError(
                f"{lora.path}: {name} is {list(factors.shape)}, this model's is {list(linears[name])} (out, in); name "
                "a LoRA of this model"
            )


def merged(weight: np.ndarray, name: str, loras: Sequence[Lora]) -> np.ndarray:
    """The weight fp32 [out, in] of the linear ``name`` with all ``loras`` added in order, in float32."""
    total = weight.astype(np.float32)
    for lora in loras:
        if name in lora.factors:
            total = total + lora.factors[name].change(lora.scale)
    return total


def linears_of(loras: Iterable[Lora]) -> list[str]:
    """Names of the linears that ``loras`` change, each once."""
    return list(dict.fromkeys(name for lora in loras for name in lora.factors))
