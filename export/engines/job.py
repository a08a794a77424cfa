"""What a builder process is told and what it answers: plain values that travel as JSON.

Only the standard library is imported here, so that a builder process starts fast.
"""

import json
from dataclasses import asdict, dataclass

from stiv_deploy.runtime.tensorrt_library import Flavour

BUILDER_REVISION = 1
"""Part of every plan's key: raise it whenever ``engine_from_onnx`` would build a different engine from the same job.

Flags are in the key themselves.
"""
FLAGS_SET: dict[Flavour, tuple[str, ...]] = {"tensorrt": (), "tensorrt-rtx": ("REQUIRE_USER_ALLOCATION",)}
"""``BuilderFlag`` names. RTX may allocate while it runs unless told not to, and cannot be captured then."""
FLAGS_CLEARED = ("TF32",)
"""TF32 would round the inputs of fp32 products to 10 bits of mantissa; who wants speed takes a 16-bit bundle.

Its VAE, where it is float32, may have it."""

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, Shape, Shape]]
"""Shapes of every graph input: smallest, what the engine is tuned for, largest."""


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One engine to build: ``onnx`` file -> ``plan`` file, with one optimization profile per size bucket.

    ``sm`` is a compute capability without the dot (``"89"``), or ``None`` for an engine not bound to one.
    ``timing_cache`` is a file that TensorRT reads and extends (RTX measures nothing while building and has none).
    ``report`` is a text file to write the builder's layer report to: which kernels it chose, and their types.
    ``plugins`` is the plugin library that the plugin nodes of ``onnx`` need; with ``quick`` they become quickly
    deployable plugins instead, as far as there are such. With ``tf32`` float32 products may be rounded to TF32.
    With ``weights_as_inputs`` the weights of ``onnx`` become inputs, and are among ``profiles``.
    """

    graph: str
    onnx: str
    plan: str
    backend: Flavour
    sm: str | None
    profiles: tuple[Profile, ...]
    optimization_level: int | None = None
    timing_cache: str | None = None
    report: str | None = None
    plugins: str | None = None
    quick: bool = False
    tf32: bool = False
    weights_as_inputs: bool = False

    @property
    def flags_cleared(self) -> tuple[str, ...]:
        """``BuilderFlag`` names that are cleared for it."""
        return tuple(name for name in FLAGS_CLEARED if not (self.tf32 and name == "TF32"))

    def to_json(self) -> str:
        """This job as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineJob":
        """The job that :meth:`to_json` wrote."""
        values = json.loads(text)
        profiles = tuple(
            {name: (tuple(low), tuple(typical), tuple(high)) for name, (low, typical, high) in profile.items()}
            for profile in values.pop("profiles")
        )
        return cls(profiles=profiles, **values)


@dataclass(frozen=True, kw_only=True)
class EngineResult:
    """How a job went: wall seconds of parsing and building, the plan's size and SHA-256 (hex), or what was wrong.

    ``error`` is the builder's, ``unwritten`` why the finished plan could not be written, each in one line.
    """

    seconds: float = 0.0
    bytes: int = 0
    sha256: str = ""
    unwritten: str | None = None
    error: str | None = None

    def to_json(self) -> str:
        """This result as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "EngineResult":
        """The result that :meth:`to_json` wrote."""
        return cls(**json.loads(text))
