"""Bytes of tensors alive, counted operator by operator: the memory of a step that no machine here could run.

Works on real and on fake tensors (``FakeTensorMode``: shapes and types without data), through autograd's backward pass
and FSDP's gathering and freeing. What an allocator adds (rounding, fragments) and what a kernel needs inside itself is
not counted.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOW = ("linear", "scaled_dot_product_attention")
HIGH = ("layer_norm", "rms_norm")
"""What the model calls of CUDA autocast's two lists (torch/include/ATen/autocast_mode.h): to bf16, and to fp32."""


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """Where ``tensor`` lies, of a sharded one the local share."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


class LiveBytes(TorchDispatchMode):
    """Context in which every storage that an operator returns is counted until it is freed.

    ``now`` and ``peak`` are bytes. What existed before counts nothing; name in ``existing`` whatever operators may
    return views of.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._existing = {storage._cdata: storage for storage in map(storage_of, existing)}
        self._known: dict[int, int] = {}

    def __enter__(self) -> "LiveBytes":
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = self._resize(storage, size)  # how FSDP frees and remakes what it gathered; no operator sees it
            self._count(storage)
            return resized

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(
        self, operator: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(storage_of(leaf))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._existing:
            return
        if key not in self._known:
            weakref.finalize(storage, self._gone, key)
        self.now += size - self._known.get(key, 0)
        self._known[key] = size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)


class _FusedNorm(torch.autograd.Function):
    """The RMS norm as CUDA's kernel has it: it saves its input, its scale and one number per row. Fake tensors only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
        y, scale = torch.ops.aten._fused_rms_norm(x, shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        back = torch.ops.aten._fused_rms_norm_backward(gradients[0], x, ctx.shape, scale, weight, [True, True])
        return back[0], None, back[1], None


def fused_norm(x: Tensor, shape: Sequence[int], weight: Tensor, eps: float) -> Tensor:
    """``F.rms_norm`` by :class:`_FusedNorm`."""
    result: Tensor = _FusedNorm.apply(x, shape, weight, eps)
    return result


@contextmanager
def gpu_kernels(low: torch.dtype | None) -> Iterator[None]:
    """On fake CPU tensors, what a GPU would keep: CUDA autocast's types if ``low`` is given, and the fused RMS norm.

    Attention needs nothing: like the flash kernels of GPUs, the CPU's saves q, k, v, the output and one number per row.
    The functions are replaced, for modes of torch do not reach what a checkpoint computes again.
    """
    originals = {name: getattr(F, name) for name in (*LOW, *HIGH)}

    for name, function in originals.items():
        wanted = None if low is None else low if name in LOW else torch.float32
        setattr(F, name, _casting(fused_norm if name == "rms_norm" else function, wanted))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(F, name, function)


def _casting(function: Callable[..., Any], wanted: torch.dtype | None) -> Callable[..., Any]:
    """``function`` with its floating arguments cast to ``wanted``."""

    def cast(value: Any) -> Any:
        return value.to(wanted) if wanted and isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*(cast(each) for each in args), **{name: cast(each) for name, each in kwargs.items()})

    return call


class Saved:
    """Bytes that autograd saves for the backward pass inside the context, each storage once, parameters not."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._not = {each.untyped_storage()._cdata for each in module.parameters()}
        self._sizes: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._not:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor

    @property
    def bytes(self) -> int:
        """The sum so far; ask while what was saved is alive."""
        return sum(self._sizes.values())
