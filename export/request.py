"""What a bundle is to be made of: the request of the export, checked before anything is opened."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from stiv_deploy.export.errors import ExportError
from stiv_deploy.runtime.bundle.contract import FORMATS, Format, Precision
from stiv_deploy.runtime.bundle.engine_files import Attention
from stiv_deploy.runtime.bundle.manifest import Bucket, Range

SIZES = ("batch", "frames", "height", "width")


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """A bundle of ``checkpoint``, to be written to the folder ``out``.

    ``precision`` is the type of its tensors. With ``format`` layers run in 8 or 4 bits, by the ranges of the file
    ``scales`` and the file ``plan`` (None: the usual plan). ``sizes`` are ranges of the default bucket, which goes from
    half to twice the checkpoint's own sizes; ``buckets``, if any, stand instead of it. With ``attention`` ``plugin``
    each block has a second file with plugin nodes for its attention in space and time, over the same weights.
    ``vae_precision`` is what engines compute the VAE in, None for :attr:`engine_vae_precision`; on a CPU it is always
    float32. With ``halves`` each block is there in two halves too, which several devices need to share a clip, with
    ``skips`` there are the graphs by which steps skip the blocks. ``loras`` are files with their scales, as
    ``FILE[:SCALE]``, merged into the weights before all else. With ``tuned`` the bundle has what ``stiv tune`` found of
    the checkpoint, if it did and nothing is merged. With ``check`` each graph is compared with the reference at the
    sizes of every bucket; the structural checks always run.

    Raises :class:`ExportError` where these do not go together.
    """

    checkpoint: Path
    out: Path
    precision: Precision = "float32"
    format: Format | None = None
    scales: Path | None = None
    plan: Path | None = None
    sizes: Mapping[str, Range] = field(default_factory=dict)
    buckets: tuple[Bucket, ...] = ()
    attention: Attention = "native"
    vae_precision: Precision | None = None
    halves: bool = False
    skips: bool = False
    loras: tuple[str, ...] = ()
    tuned: bool = True
    check: bool = True

    def __post_init__(self) -> None:
        self._check_names()
        if self.format is not None and self.scales is None:
            raise ExportError(
                f"--precision {self.format} needs --scales FILE; make it with: stiv calibrate {self.checkpoint} "
                f"--precision {self.format} --out {self.format}.safetensors"
            )
        for option, value in (("scales", self.scales), ("plan", self.plan)):
            if self.format is None and value is not None:
                raise ExportError(f"--{option} is for --precision {', '.join(FORMATS)}, not for {self.precision}")
        if self.format == "nvfp4" and (self.attention != "native" or self.halves):
            option = "--halves" if self.halves else f"--attention {self.attention}"
            raise ExportError(
                f"{option} is not for --precision nvfp4: its blocks are built whole, by TensorRT-RTX; leave it out"
            )
        if self.sizes and self.buckets:
            raise ExportError("sizes are of the default bucket, and buckets stand instead of it; give one of them")

    @property
    def engine_vae_precision(self) -> Precision:
        """What is asked for, else bfloat16, and float32 of a bundle that is float32 throughout."""
        return self.vae_precision or ("float32" if self.precision == "float32" else "bfloat16")

    def _check_names(self) -> None:
        for what, given, known in (
            ("precision", self.precision, get_args(Precision)),
            ("format", self.format or FORMATS[0], FORMATS),
            ("attention", self.attention, get_args(Attention)),
            ("VAE precision", self.vae_precision or "float32", get_args(Precision)),
            *(("size", name, SIZES) for name in self.sizes),
        ):
            if given not in known:
                raise ExportError(f"{what} {given!r}: there is none; use {', '.join(known)}")
