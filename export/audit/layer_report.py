"""The builder's layer report: which kernels an engine has, the types they work in, and the ONNX nodes inside each.

TensorRT and TensorRT-RTX end a verbose build log with one line per engine layer (profiling verbosity DETAILED), and
TensorRT writes the same as JSON (``trtexec --exportLayerInfo``). It is what tells, without a GPU, what was fused.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiv_deploy.export.errors import ReportError

NO_KERNEL = frozenset({"shape_call", "signal", "wait", "noop", "constant"})
"""Layer types that launch nothing: shapes worked out on the host, synchronization, constants."""
TYPES = (  # the first that a type's name in a report contains; TensorRT also writes "Row major linear FP16 format"
    ("fp4", "FP4"),
    ("e2m1", "FP4"),
    ("fp8", "FP8"),
    ("e4m3", "FP8"),
    ("int8", "Int8"),
    ("bfloat16", "BFloat16"),
    ("bf16", "BFloat16"),
    ("fp16", "Half"),
    ("half", "Half"),
    ("float", "Float"),
    ("fp32", "Float"),
    ("int32", "Int32"),
    ("int64", "Int64"),
    ("bool", "Bool"),
)
_TENSORS = r"\[((?: ?\{[^{}]*\},?)*) ?\]"
_LINE = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+), Inputs: {_TENSORS}(?:, Constants: {_TENSORS})?, "
    rf"Outputs: {_TENSORS}(?P<rest>.*)"
)
_TENSOR = re.compile(r"\{ Name: ([^{}]*?), (?:Location: \w+, )?Dimensions: \[([^\]]*)\][^{}]*?Datatype: ([^,{}]*)")
_PROFILE = re.compile(r" \[profile (\d+)\]")
_GROUP = re.compile(r"_myl(\d+)_\d+$")


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """A tensor of an engine layer: element type by TensorRT's name (``Half``, ``FP8``) and shape, -1 where dynamic."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether at least two sizes are more than 1: a weight matrix, where a bias or scale is not."""
        return sum(size != 1 for size in self.shape) > 1


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One layer of an engine; ``nodes`` are the ONNX nodes that it computes. TensorRT lists no ``constants``."""

    name: str
    kind: str
    inputs: tuple[EngineTensor, ...]
    constants: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    tactic: str
    nodes: tuple[str, ...]
    profile: int = 0

    @property
    def is_kernel(self) -> bool:
        """Whether the layer launches a kernel."""
        return self.kind.lower() not in NO_KERNEL

    @property
    def is_attention(self) -> bool:
        """Whether the layer is a whole attention, both products and the softmax, in one kernel."""
        return "_mha_" in f"{self.name}{self.tactic}" or "fmha" in f"{self.name}{self.tactic}".lower()

    @property
    def is_product(self) -> bool:
        """Whether the layer is a matrix product: of two tensors, or with a weight."""
        named = self.kind in ("gemm", "MatrixMultiply") or re.search(r"gemm|_Fc|__fc", f"{self.name}{self.tactic}")
        return bool(named) and not self.is_attention

    @property
    def is_convolution(self) -> bool:
        """Whether the layer computes a convolution of the graph."""
        return any(node.rpartition(".")[2].startswith("Conv") for node in self.nodes)

    @property
    def operands(self) -> str:
        """Types of what a product multiplies, ``FP8 x FP8``; ``FP8 x ?`` where the report does not show the weight.

        Beside a weight in FP4 its block scales are a matrix too.
        """
        matrices = [tensor for tensor in self.constants if tensor.is_matrix] or list(self.inputs[1:2])
        matrices = [tensor for tensor in matrices if tensor.dtype == "FP4"] or matrices
        left = self.inputs[0].dtype if self.inputs else "?"
        return f"{left} x {matrices[-1].dtype if matrices else '?'}"


def type_name(text: str) -> str:
    """The type that a report means by ``text``, as one of the names in :data:`TYPES`; ``text`` itself if unknown."""
    lowered = text.lower()
    return next((name for part, name in TYPES if part in lowered), text.strip())


def parse_report(text: str, source: str) -> tuple[EngineLayer, ...]:
    """The layers that a build log or a layer-information JSON tells of; other lines are skipped.

    Raises :class:`ReportError`, with ``source`` for the place, if there are none.
    """
    layers = list(_from_json(text, source) if text.lstrip().startswith("{") else _from_log(text))
    if not layers:
        raise ReportError(
            f"{source}: no layers in it; give the log of a build with verbose messages and profiling "
            "verbosity DETAILED (trtexec --verbose --profilingVerbosity=detailed), or the JSON of --exportLayerInfo"
        )
    return tuple(_with_profiles(layers))


def read_report(path: Path) -> tuple[EngineLayer, ...]:
    """:func:`parse_report` of a file."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); give a build log") from None
    return parse_report(text, str(path))


def _from_log(text: str) -> Iterator[EngineLayer]:
    for line in text.splitlines():
        found = _LINE.search(line) if "LayerType: " in line else None
        if found is not None:
            inputs, constants, outputs = found.group(3, 4, 5)
            tactic = re.search(r"TacticName: ([^,]*)", found["rest"])
            yield EngineLayer(
                name=found["name"],
                kind=found["kind"],
                inputs=_tensors(inputs),
                constants=_tensors(constants or ""),
                outputs=_tensors(outputs),
                tactic=tactic[1] if tactic else "",
                nodes=_nodes(found["rest"]),
            )


def _tensors(text: str) -> tuple[EngineTensor, ...]:
    return tuple(
        EngineTensor(name=name, dtype=type_name(dtype), shape=tuple(int(size) for size in shape.split(",") if size))
        for name, shape, dtype in _TENSOR.findall(text)
    )


def _nodes(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(re.findall(r"\[ONNX Layer: (.*?)(?: \[profile \d+\])?\]", text)))


def _from_json(text: str, source: str) -> Iterator[EngineLayer]:
    try:
        layers = json.loads(text)["Layers"]
        for layer in layers:
            yield _layer_of_json(layer)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ReportError(
            f"{source}: not the layer information of a TensorRT engine; build with --profilingVerbosity=detailed "
            "and write it with --exportLayerInfo"
        ) from None


def _layer_of_json(layer: Mapping[str, Any]) -> EngineLayer:
    def tensors(field: str) -> tuple[EngineTensor, ...]:
        return tuple(
            EngineTensor(
                name=each["Name"],
                dtype=type_name(each.get("Format/Datatype") or each["Datatype"]),
                shape=tuple(each["Dimensions"]),
            )
            for each in layer.get(field, ())
        )

    return EngineLayer(
        name=layer["Name"],
        kind=layer["LayerType"],
        inputs=tensors("Inputs"),
        constants=tensors("Constants"),
        outputs=tensors("Outputs"),
        tactic=layer.get("TacticName", ""),
        nodes=_nodes(layer.get("Metadata", "")),
    )


def _with_profiles(layers: Iterable[EngineLayer]) -> Iterator[EngineLayer]:
    """The layers with their optimization profile: every profile has kernels of its own, numbered in their names.

    Only some names say ``[profile 1]``; the others of the same numbered group (``_myl1_7``) belong to it too.
    """
    layers = list(layers)
    profiles: dict[str, int] = {}
    for layer in layers:
        for tensor in (*layer.inputs, *layer.outputs):
            if said := _PROFILE.search(tensor.name):
                profiles[_group(layer)] = int(said[1])
    for layer in layers:
        yield EngineLayer(**{**layer.__dict__, "profile": profiles.get(_group(layer), 0)})


def _group(layer: EngineLayer) -> str:
    found = _GROUP.search(layer.name)
    return found[1] if found else ""
