"""The few calls of NCCL that an exchange between GPUs needs, every one checked.

They are those of ``nccl.bindings.nccl`` (NVIDIA's package nccl4py), which take bare addresses. ``nccl.core`` above it
would look for torch and cupy in every call, and import them.
"""

import threading
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

from stiv_deploy.runtime.backends.cuda import Cuda
from stiv_deploy.runtime.errors import BackendError, DeviceError, one_line, raise_interrupt

SUCCESS, IN_PROGRESS = 0, 7
"""Of ``ncclResult_t``."""
BYTES = 1
"""``ncclUint8``."""
INSTALL = "pip install 'stiv-deploy[nccl]' nvidia-nccl-cu13"


def load_nccl() -> Any:
    """The bindings, with NCCL itself loaded; :class:`BackendError` if one of them is not installed."""
    try:
        api = import_module("nccl.bindings.nccl")
        api.get_version()
    except (ImportError, RuntimeError) as error:
        raise_interrupt(error)
        raise BackendError(f"NCCL is not installed ({one_line(str(error), 200)}); {INSTALL}") from None
    return api


def new_id(api: Any) -> bytes:
    """What the ranks of one communicator find each other by; made on one of them. :class:`BackendError`."""
    return bytes(_checked(api, "get_unique_id"))


def _checked(api: Any, function: str, *arguments: Any) -> Any:
    try:
        return getattr(api, function)(*arguments)
    except api.NCCLError as error:
        raise BackendError(f"NCCL's {function} failed: {one_line(str(error), 200)}") from None


class Bytes(NamedTuple):
    """So many bytes of GPU memory for, or from, the rank ``peer``."""

    peer: int
    address: int
    size: int


class Communicator:
    """One rank of ``size``, on the GPU of ``cuda``: its host never waits for another rank in a call.

    Every rank makes its own from the same ``unique_id``. What was begun, this included, is under way until ``settled``
    says so; until then nothing else may be begun. ``abort`` may come from any thread at any time.
    """

    def __init__(self, api: Any, cuda: Cuda, unique_id: bytes, size: int, rank: int) -> None:
        self._api = api
        self._lock = threading.Lock()
        cuda.use()
        self._config = api.Config()
        self._config.blocking = 0
        given = (size, rank, 1, bytearray(unique_id), self._config.ptr)
        self._comm: Any | None = _checked(api, "comm_init_rank_scalable", *given)

    def settled(self) -> bool:
        """Whether what was begun is queued on the GPU; :class:`DeviceError` if NCCL reports a fault."""
        with self._lock:
            code = SUCCESS if self._comm is None else int(_checked(self._api, "comm_get_async_error", self._comm))
        if code in (SUCCESS, IN_PROGRESS):
            return code == SUCCESS
        raise DeviceError(f"NCCL reports: {one_line(self._api.get_error_string(code), 200)}")

    def exchange(self, sends: Iterable[Bytes], receives: Iterable[Bytes], stream: int) -> None:
        """Begin to send and to receive on ``stream``, all at a time, so that no rank waits for one who waits.

        Each two ranks pair what they send and receive in the order in which both name it.
        """
        with self._lock:
            if self._comm is None:
                return
            _checked(self._api, "group_start")
            try:
                for function, each in ("send", sends), ("recv", receives):
                    for peer, address, size in each:
                        _checked(self._api, function, address, size, BYTES, peer, self._comm, stream)
            finally:
                _checked(self._api, "group_end")

    def abort(self) -> None:
        """End what is under way on the GPU, and the communicator. May be called again."""
        with self._lock:
            comm, self._comm = self._comm, None
            if comm is not None:
                _checked(self._api, "comm_abort", comm)
