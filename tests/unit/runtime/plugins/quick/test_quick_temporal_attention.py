"""The quickly deployable plugin against small stand-ins for ``tensorrt.plugin``: what it would tell TensorRT."""

import inspect
import re
import sys
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from stiv_deploy.runtime.errors import KernelError
from stiv_deploy.runtime.plugins.library import POINTERS, KernelDtype, KernelLibrary, Plan, TemporalAttention
from stiv_deploy.runtime.plugins.quick.temporal_attention import (
    EPSILON,
    EXTRA_ARGUMENTS,
    MAX_SHARED_BYTES,
    PLUGIN_ID,
    ptx_file,
    register_temporal_attention,
)
from stiv_deploy.runtime.plugins.spec import HEAD_DIMS, TEMPORAL_ATTENTION

SOURCE = Path(__file__).parents[5] / "runtime" / "plugins" / "attention" / "temporal_attention_ptx.cu"
INPUTS = [tensor.name for tensor in TEMPORAL_ATTENTION.inputs if not tensor.optional]


@dataclass(frozen=True)
class Size:
    """Stands for ``ShapeExpr``: an expression as text, and its value for one set of sizes."""

    text: str
    value: int

    def _with(self, sign: str, other: "Size | int", value: int) -> "Size":
        return Size(f"({self.text} {sign} {other.text if isinstance(other, Size) else other})", value)

    def __mul__(self, other: "Size | int") -> "Size":
        return self._with("*", other, self.value * int(other))

    def __floordiv__(self, other: int) -> "Size":
        return self._with("//", other, self.value // other)

    def __int__(self) -> int:
        return self.value


class FakeShape(tuple[int, ...]):
    """Stands for ``Shape``: sizes, -1 where they change, with the profile's."""

    is_dynamic = False
    opt: tuple[int, ...] = ()
    max: tuple[int, ...] = ()


@dataclass
class FakeTensor:
    """Stands for ``TensorDesc``."""

    shape_expr: list[Size]
    dtype: Any
    shape: FakeShape

    def like(self) -> "FakeTensor":
        return replace(self, shape_expr=list(self.shape_expr))


@dataclass
class FakeLaunch:
    """Stands for ``KernelLaunchParams``."""

    grid_x: Any = 1
    block_x: Any = 1
    shared_mem: Any = 0


class FakeExpressions(list[Any]):
    """Stands for ``SymIntExprs``."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


@dataclass
class FakeTensorRT:
    """``tensorrt`` and ``tensorrt.plugin``; keeps what was registered."""

    functions: dict[str, Any] = field(default_factory=dict)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trt, trtp = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
        trt.DataType = SimpleNamespace(FP8=SimpleNamespace(name="FP8"))  # type: ignore[attr-defined]
        trt.plugin = trtp  # type: ignore[attr-defined]
        members = {
            "TensorDesc": FakeTensor,
            "KernelLaunchParams": FakeLaunch,
            "SymIntExprs": FakeExpressions,
            "AutoTuneCombination": type("AutoTuneCombination", (SimpleNamespace,), {"__init__": _combination}),
            "SymInt32": lambda value: int(value),
            "cdiv": lambda a, b: Size(f"cdiv({a.text}, {b})", -(-a.value // b)),
        }
        members |= {kind: self._decorator(kind) for kind in ("register", "autotune", "aot_impl")}
        for name, member in members.items():
            setattr(trtp, name, member)
        monkeypatch.setitem(sys.modules, "tensorrt", trt)
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)

    def _decorator(self, kind: str) -> Any:
        def decorate(plugin_id: str) -> Any:
            assert plugin_id == PLUGIN_ID == "stiv::StivTemporalAttention"
            return lambda function: self.functions.setdefault(kind, function)

        return decorate


def _combination(self: Any, io_types: str, layouts: str) -> None:
    self.io_types, self.layouts = io_types, layouts


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRT:
    fake = FakeTensorRT()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def ptx_folder(tmp_path: Path) -> Path:
    """PTX files that hold their own names."""
    for dtype, head_dim, fp8 in product(("float16", "bfloat16"), HEAD_DIMS, ("", "_fp8")):
        name = f"stiv_temporal_attention_{dtype}_{head_dim}{fp8}"
        (tmp_path / f"{name}.ptx").write_text(f".visible .entry {name}(")
    return tmp_path


def tensor(sizes: dict[str, int], dtype: str = "BF16", **profile: tuple[int, ...]) -> FakeTensor:
    """qkv of ``sizes``; with a ``profile`` (opt, max) the leading sizes change."""
    shape = FakeShape((-1, -1, -1, sizes["C"]) if profile else sizes.values())
    shape.is_dynamic = bool(profile)
    for name, values in profile.items():
        setattr(shape, name, values)
    expressions = [Size(name, value) for name, value in sizes.items()]
    return FakeTensor(expressions, SimpleNamespace(name=dtype), shape)


def compiled(tensorrt: FakeTensorRT, qkv: FakeTensor, heads: int, epsilon: float = 1e-6, inputs: int = 6) -> Any:
    return tensorrt.functions["aot_impl"](*[qkv] * inputs, heads, epsilon, (qkv,), 0)


def plan(library: KernelLibrary, dtype: KernelDtype, sizes: dict[str, int], heads: int) -> Plan:
    call = TemporalAttention(
        **dict.fromkeys((*POINTERS, "output"), 0),
        batch=sizes["B"],
        frames=sizes["T"],
        positions=sizes["S"],
        heads=heads,
        head_dim=sizes["C"] // heads // 3,
        dtype=dtype,
        output_dtype=dtype,
    )
    return library.temporal_attention_plan(call)


@pytest.mark.parametrize("fp8", [False, True])
def test_signatures_are_those_of_the_specification(
    tensorrt: FakeTensorRT, emulated: KernelLibrary, ptx_folder: Path, fp8: bool
) -> None:
    register_temporal_attention(fp8, emulated, ptx_folder)
    inputs = [*INPUTS, *(["output_scale"] if fp8 else [])]
    wanted = {
        "register": [*inputs, "heads", "epsilon"],
        "autotune": [*inputs, "heads", "epsilon", "outputs"],
        "aot_impl": [*inputs, "heads", "epsilon", "outputs", "tactic"],
    }
    for kind, names in wanted.items():
        signature = inspect.signature(tensorrt.functions[kind])
        assert list(signature.parameters) == names
        annotations = [parameter.annotation for parameter in signature.parameters.values()]
        assert annotations[: len(inputs) + 2] == [FakeTensor] * len(inputs) + [int, float]


@pytest.mark.parametrize("fp8", [False, True])
def test_output_and_types(tensorrt: FakeTensorRT, emulated: KernelLibrary, ptx_folder: Path, fp8: bool) -> None:
    register_temporal_attention(fp8, emulated, ptx_folder)
    qkv = tensor({"B": 2, "T": 5, "S": 7, "C": 288})
    output = tensorrt.functions["register"](*[qkv] * (7 if fp8 else 6), heads=3, epsilon=1e-6)
    assert [int(size) for size in output.shape_expr] == [2, 5, 7, 96]
    assert output.dtype.name == ("FP8" if fp8 else "BF16")
    assert qkv.shape_expr[3].value == 288, "the input's descriptor stays as it is"
    (combination,) = tensorrt.functions["autotune"](*[qkv] * (7 if fp8 else 6), 3, 1e-6, (output,))
    sixteen = ["FP16|BF16"] * 6
    assert combination.io_types.split(", ") == sixteen + (["FP32", "FP8"] if fp8 else ["FP16|BF16"])
    assert combination.layouts == "LINEAR"


@pytest.mark.parametrize("frames", [1, 5, 20, 40, 64])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_launch_is_that_of_the_cxx_plugin(
    tensorrt: FakeTensorRT, emulated: KernelLibrary, ptx_folder: Path, frames: int, head_dim: int
) -> None:
    register_temporal_attention(False, emulated, ptx_folder)
    heads = 12
    sizes = {"B": 2, "T": frames, "S": 1000, "C": 3 * heads * head_dim}
    name, ptx, launch, extra = compiled(tensorrt, tensor(sizes, "HALF"), heads)
    wanted = plan(emulated, KernelDtype.FLOAT16, sizes, heads)
    assert name == f"stiv_temporal_attention_float16_{head_dim}"
    assert ptx == f".visible .entry {name}(".encode()
    assert (int(launch.grid_x), launch.block_x, launch.shared_mem) == (
        wanted.blocks,
        wanted.threads,
        wanted.shared_bytes,
    )
    assert launch.shared_mem <= MAX_SHARED_BYTES
    assert extra == [frames, 1000, heads, wanted.heads_per_block, wanted.positions_per_block, wanted.splits]


def test_dynamic_shapes_are_planned_for_the_most_frames(
    tensorrt: FakeTensorRT, emulated: KernelLibrary, ptx_folder: Path
) -> None:
    register_temporal_attention(True, emulated, ptx_folder)
    now, channels = {"B": 1, "T": 9, "S": 77, "C": 3 * 16 * 72}, 3 * 16 * 72
    qkv = tensor(now, opt=(2, 20, 1024, channels), max=(4, 40, 4096, channels))
    name, _, launch, extra = compiled(tensorrt, qkv, 16, inputs=7)
    wanted = plan(emulated, KernelDtype.BFLOAT16, {"B": 2, "T": 40, "S": 1024, "C": channels}, 16)
    assert name == "stiv_temporal_attention_bfloat16_72_fp8"
    assert extra[:3] == [9, 77, 16], "the sizes of the call, not of the profile"
    assert extra[3:] == [wanted.heads_per_block, wanted.positions_per_block, wanted.splits]
    groups = f"cdiv(S, {wanted.positions_per_block})"
    assert launch.grid_x.text == f"((B * {groups}) * {-(-16 // wanted.heads_per_block)})"
    assert launch.shared_mem == wanted.shared_bytes


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_shared_memory_of_the_most_frames_is_enough_for_fewer(emulated: KernelLibrary, head_dim: int) -> None:
    def needed(frames: int, items: int, row: int) -> int:
        """Rows of q, k, v for every item, and a row of zeros where frames do not fill tiles of 16."""
        return 3 * frames * items * row + (2 * head_dim if frames % 16 else 0)

    for most in range(1, 65):
        sizes = {"B": 2, "T": most, "S": 1024, "C": 3 * 12 * head_dim}
        cut = plan(emulated, KernelDtype.FLOAT16, sizes, 12)
        items = cut.heads_per_block * cut.positions_per_block
        row = (cut.shared_bytes - needed(most, 0, 0)) // (3 * most * items)
        assert needed(most, items, row) == cut.shared_bytes <= MAX_SHARED_BYTES
        assert all(needed(frames, items, row) <= cut.shared_bytes for frames in range(1, most))


def test_kernel_takes_inputs_then_numbers_then_output() -> None:
    text = " ".join(SOURCE.read_text().split())
    start = text.index("STIV_PTX_NAME(const")
    arguments = text[start : text.index(")", start)].replace("STIV_SCALE_ARGUMENT", "const float* output_scale,")
    names = [argument.split()[-1].lstrip("*") for argument in arguments.split(",")]
    numbers = ["frames", "positions", "heads", "heads_per_block", "positions_per_block", "splits"]
    assert names == [*(tensor.name for tensor in TEMPORAL_ATTENTION.inputs), *numbers, "output"]
    assert list(EXTRA_ARGUMENTS) == numbers
    (epsilon,) = re.findall(r"kEpsilon = ([0-9e.-]+)f;", text)
    (default,) = (item.default for item in TEMPORAL_ATTENTION.attributes if item.name == "epsilon")
    assert float(epsilon) == EPSILON == default


@pytest.mark.parametrize(
    ("sizes", "heads", "dtype", "epsilon", "text"),
    [
        ({"T": 65}, 3, "BF16", 1e-6, "1 to 64 frames, the graph may have 65"),
        ({}, 3, "FLOAT", 1e-6, "float16 or bfloat16, given FLOAT"),
        ({}, 3, "BF16", 1e-5, "epsilon 1e-06, the graph wants 1e-05"),
        ({}, 5, "BF16", 1e-6, "288 channels, which is not divisible by 3 * heads = 15"),
        ({}, 0, "BF16", 1e-6, "288 channels, which is not divisible"),
        ({"C": 360}, 3, "BF16", 1e-6, "unsupported head size"),
    ],
)
def test_what_the_kernel_cannot_do(
    tensorrt: FakeTensorRT,
    emulated: KernelLibrary,
    ptx_folder: Path,
    sizes: dict[str, int],
    heads: int,
    dtype: str,
    epsilon: float,
    text: str,
) -> None:
    register_temporal_attention(False, emulated, ptx_folder)
    qkv = tensor({"B": 2, "T": 5, "S": 7, "C": 288} | sizes, dtype)
    with pytest.raises(KernelError) as raised:
        compiled(tensorrt, qkv, heads, epsilon)
    assert text in str(raised.value)


def test_missing_ptx_names_the_build_command(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match="no PTX at .*float16_72_fp8.ptx; build it with `make plugins`"):
        ptx_file(KernelDtype.FLOAT16, 72, True, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "text"),
    [(KernelDtype.FLOAT32, 64, "given float32"), (KernelDtype.FLOAT16, 40, "head size 40 is not supported")],
)
def test_no_ptx_for_these(tmp_path: Path, dtype: KernelDtype, head_dim: int, text: str) -> None:
    with pytest.raises(KernelError, match=text):
        ptx_file(dtype, head_dim, False, tmp_path)


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch, emulated: KernelLibrary) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(KernelError, match=r"need TensorRT 10\.9 or later in Python"):
        register_temporal_attention(False, emulated)
