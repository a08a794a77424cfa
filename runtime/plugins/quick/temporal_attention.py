"""Temporal attention as a quickly deployable TensorRT plugin: one kernel, as PTX, that goes into the engine file.

``stiv build --attention quick`` does all that it takes. The kernel is that of the C++ plugin, compiled ahead of time
(``make plugins``) for each 16-bit type and head size. TensorRT launches it with the inputs, then
:data:`EXTRA_ARGUMENTS` as int32, then the output. Limits of this packaging against the C++ plugin: no fp32,
``epsilon`` is part of the PTX, and a process registers the plugin either with the output scale or without, under one
name, as TensorRT has no optional inputs here.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stiv_deploy.runtime.errors import KernelError, raise_interrupt
from stiv_deploy.runtime.plugins.library import (
    BUILD_HINT,
    FOLDER,
    POINTERS,
    KernelDtype,
    KernelLibrary,
    Plan,
    TemporalAttention,
    open_library,
)
from stiv_deploy.runtime.plugins.spec import DOMAIN, HEAD_DIMS, MAX_FRAMES, TEMPORAL_ATTENTION

PLUGIN_ID = f"{DOMAIN}::{TEMPORAL_ATTENTION.name}"
EXTRA_ARGUMENTS = ("frames", "positions", "heads", "heads_per_block", "positions_per_block", "splits")
"""int32 arguments of the kernel between inputs and output; ``attention/temporal_attention_ptx.cu``."""
EPSILON = 1e-6
"""``epsilon`` that the PTX is compiled with."""
MAX_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel gets without asking for more, which a PTX plugin cannot."""
_KERNEL_DTYPES = {"HALF": KernelDtype.FLOAT16, "BF16": KernelDtype.BFLOAT16}
_ATTRIBUTE_TYPES = {"int": int, "float": float}


def ptx_file(dtype: KernelDtype, head_dim: int, fp8_output: bool, folder: Path = FOLDER / "ptx") -> Path:
    """PTX of the kernel for ``dtype`` (16-bit) and ``head_dim``; its stem is the kernel's name.

    Raises :class:`KernelError` if there is none for these, or if it was not built.
    """
    if dtype not in _KERNEL_DTYPES.values():
        raise KernelError(f"temporal attention as PTX takes float16 or bfloat16, given {dtype.name.lower()}")
    if head_dim not in HEAD_DIMS:
        raise KernelError(f"head size {head_dim} is not supported; want one of {', '.join(map(str, HEAD_DIMS))}")
    path = folder / f"stiv_temporal_attention_{dtype.name.lower()}_{head_dim}{'_fp8' if fp8_output else ''}.ptx"
    if not path.is_file():
        raise KernelError(f"no PTX at {path}; {BUILD_HINT}")
    return path


def _dimensions(tensor: Any) -> tuple[int, ...]:
    """Sizes of a tensor that its launch is planned for: those known, else the profile's optimum, frames the most."""
    shape = tensor.shape
    if not shape.is_dynamic:
        return tuple(shape)
    batch, _, positions, channels = shape.opt
    return batch, shape.max[1], positions, channels


def head_dim(channels: int, heads: int) -> int:
    """Head size of ``channels`` = 3 * heads * head size; :class:`KernelError` if that does not fit."""
    if heads < 1 or channels % (3 * heads):
        raise KernelError(f"qkv has {channels} channels, which is not divisible by 3 * heads = {3 * heads}")
    return channels // (3 * heads)


@dataclass(frozen=True)
class QuickTemporalAttention:
    """The three functions that TensorRT's decorators want, for one form of the plugin.

    ``trt`` is the module ``tensorrt``, ``trtp`` ``tensorrt.plugin``. ``library`` cuts the work into blocks as the C++
    plugin does; it is needed while an engine is built, not where it runs.
    """

    trt: Any
    trtp: Any
    library: KernelLibrary
    fp8_output: bool
    ptx_folder: Path

    def describe(self, *arguments: Any, **attributes: Any) -> Any:
        """Output descriptor: qkv [B, T, S, 3 * H * Dh] gives [B, T, S, H * Dh]."""
        qkv = arguments[0]
        output = qkv.like()
        output.shape_expr[3] = qkv.shape_expr[3] // 3
        if self.fp8_output:
            output.dtype = self.trt.DataType.FP8
        return output

    def autotune(self, *arguments: Any) -> Any:
        """One combination: fp16 or bf16 everywhere, fp32 scale, FP8 output with it; linear layouts, no tactics."""
        scale, output = (["FP32"], "FP8") if self.fp8_output else ([], "FP16|BF16")
        types = ["FP16|BF16"] * sum(not tensor.optional for tensor in TEMPORAL_ATTENTION.inputs)
        return [self.trtp.AutoTuneCombination(", ".join([*types, *scale, output]), "LINEAR")]

    def compile(self, *arguments: Any) -> tuple[str, bytes, Any, Any]:
        """Kernel's name, PTX, launch parameters and extra arguments, the last two as expressions of qkv's sizes."""
        qkv, (heads, epsilon) = arguments[0], arguments[-4:-2]
        if abs(epsilon - EPSILON) > 1e-3 * EPSILON:
            raise KernelError(
                f"the PTX of temporal attention has epsilon {EPSILON:g}, the graph wants {epsilon:g}; "
                "use the C++ plugin (libstiv_plugins.so)"
            )
        plan = self._plan(qkv, heads)
        file = ptx_file(self._dtype(qkv), head_dim(_dimensions(qkv)[3], heads), self.fp8_output, self.ptx_folder)
        return file.stem, file.read_bytes(), self._launch(qkv, heads, plan), self._extra_arguments(qkv, heads, plan)

    def _dtype(self, qkv: Any) -> KernelDtype:
        name = getattr(qkv.dtype, "name", str(qkv.dtype))
        if name not in _KERNEL_DTYPES:
            raise KernelError(f"temporal attention as PTX takes float16 or bfloat16, given {name}")
        return _KERNEL_DTYPES[name]

    def _plan(self, qkv: Any, heads: int) -> Plan:
        """Plan for the most frames: fewer need less shared memory, and the kernel takes the sizes as arguments."""
        batch, frames, positions, channels = _dimensions(qkv)
        if not 1 <= frames <= MAX_FRAMES:
            raise KernelError(f"temporal attention takes 1 to {MAX_FRAMES} frames, the graph may have {frames}")
        dtype = self._dtype(qkv)
        sizes = TemporalAttention(
            **dict.fromkeys((*POINTERS, "output"), 0),
            batch=batch,
            frames=frames,
            positions=positions,
            heads=heads,
            head_dim=head_dim(channels, heads),
            dtype=dtype,
            output_dtype=KernelDtype.FLOAT8_E4M3 if self.fp8_output else dtype,
            epsilon=EPSILON,
        )
        plan = self.library.temporal_attention_plan(sizes)
        if plan.shared_bytes > MAX_SHARED_BYTES:
            raise KernelError(
                f"{frames} frames of head size {sizes.head_dim} need {plan.shared_bytes} bytes of shared memory, "
                f"a PTX plugin has {MAX_SHARED_BYTES}; use the C++ plugin (libstiv_plugins.so)"
            )
        return plan

    def _launch(self, qkv: Any, heads: int, plan: Plan) -> Any:
        batch, _, positions, _ = qkv.shape_expr
        head_groups = -(-heads // plan.heads_per_block)
        launch = self.trtp.KernelLaunchParams()
        launch.grid_x = batch * self.trtp.cdiv(positions, plan.positions_per_block) * head_groups
        launch.block_x = plan.threads
        launch.shared_mem = plan.shared_bytes
        return launch

    def _extra_arguments(self, qkv: Any, heads: int, plan: Plan) -> Any:
        _, frames, positions, _ = qkv.shape_expr
        values = (frames, positions, heads, plan.heads_per_block, plan.positions_per_block, plan.splits)
        extra = self.trtp.SymIntExprs(len(values))
        for i, value in enumerate(values):
            extra[i] = self.trtp.SymInt32(value)
        return extra


def _with_signature(
    function: Callable[..., Any], trtp: Any, fp8_output: bool, last: dict[str, Any], returns: Any
) -> Callable[..., Any]:
    """``function`` with the signature that TensorRT reads: the tensors and attributes of spec.py, then ``last``."""
    tensors = [tensor.name for tensor in TEMPORAL_ATTENTION.inputs if fp8_output or not tensor.optional]
    annotations = {name: trtp.TensorDesc for name in tensors}
    if last or returns is trtp.TensorDesc:
        annotations |= {item.name: _ATTRIBUTE_TYPES[item.kind] for item in TEMPORAL_ATTENTION.attributes}
    annotations |= last
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=type_) for name, type_ in annotations.items()]

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        return function(*arguments, **keywords)

    wrapped.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return wrapped


def require_tensorrt() -> None:
    """Raise :class:`KernelError` without TensorRT's ``tensorrt.plugin``, or its part for kernels as PTX."""
    try:
        from tensorrt.plugin import aot_impl  # noqa: F401 - younger than the module
    except ImportError as error:
        raise_interrupt(error)
        raise KernelError(
            f"quickly deployable plugins of PTX need TensorRT 10.9 or later in Python ({error})"
        ) from error


def register_temporal_attention(
    fp8_output: bool, library: KernelLibrary | None = None, ptx_folder: Path = FOLDER / "ptx"
) -> None:
    """Register the plugin with TensorRT in this process, before a graph is parsed; :data:`PLUGIN_ID`, version 1.

    With ``fp8_output`` it has the input ``output_scale`` and writes FP8. Nodes must carry every attribute of
    :mod:`~stiv_deploy.runtime.plugins.spec`, as there are no defaults here, with ``plugin_version`` and
    ``plugin_namespace``; the function body of ``StivTemporalAttention`` must be out of the model, as
    ``export/engines/plugin_graphs.py`` takes it, or an early parser expands it instead. The network needs no creation
    flag and the nodes no attribute ``aot``: they choose between two implementations, and this is the only one. Do not
    load ``libstiv_plugins.so`` in the same process: the names are the same.

    Raises :class:`KernelError` without TensorRT's ``tensorrt.plugin`` or without the built kernels.
    """
    require_tensorrt()
    import tensorrt as trt
    import tensorrt.plugin as trtp

    quick = QuickTemporalAttention(trt, trtp, library or open_library(), fp8_output, ptx_folder)
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    kernel = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    combinations = list[trtp.AutoTuneCombination]

    def signed(function: Callable[..., Any], last: dict[str, Any], returns: Any) -> Callable[..., Any]:
        return _with_signature(function, trtp, fp8_output, last, returns)

    trtp.register(PLUGIN_ID)(signed(quick.describe, {}, trtp.TensorDesc))
    trtp.autotune(PLUGIN_ID)(signed(quick.autotune, outputs, combinations))
    trtp.aot_impl(PLUGIN_ID)(signed(quick.compile, outputs | {"tactic": int}, kernel))
