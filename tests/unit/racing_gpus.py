"""Stand-in GPUs that tell races: two uses of the same bytes, one of them a write, that nothing puts in an order.

Work runs at once, in the order in which the host queues it, as on GPUs that happen to be fast enough; what is noted is
whether streams and events would have forced that order. A stream knows of each other stream how far that had come at
the last event that it waited for (*vector clocks*), so that a wait that is left out shows whatever the threads do.
"""

# ruff: noqa: N802, N815 - the names are CUDA's

import bisect
import ctypes
import threading
from types import SimpleNamespace
from typing import Any


def own_of_a_thread(name: str) -> property:
    """An attribute that each thread has its own value of."""
    return property(lambda self: getattr(self.mine, name, None), lambda self, value: setattr(self.mine, name, value))


def racing(base: type) -> type:
    """The stand-in of CUDA's API, ``base``, for several GPUs, that notes races in ``races``."""

    class Racing(base):  # type: ignore[misc, valid-type]
        cudaEventDisableTiming = 2
        cudaMemcpy3DPeerParms = SimpleNamespace

        def __init__(self, gpus: int) -> None:
            self.mine = threading.local()
            self.lock = threading.RLock()
            self.clocks: dict[int, dict[int, int]] = {}
            self.events: dict[int, dict[int, int]] = {}
            self.uses: dict[int, dict[tuple[int, int, int, bool], int]] = {}
            self.sorted: list[int] | None = None
            self.races: list[str] = []
            self.waits = 0
            self.left_out: int | None = None
            """Which wait is not waited for, counted from 0."""
            self.peer_bytes = 0
            self.reached: set[tuple[int, int]] = set()
            super().__init__(gpus=gpus)

        captured, graph, stream = map(own_of_a_thread, ("captured", "graph", "stream"))
        """Of each thread its own, as captures and their graphs are that are local to a thread."""

        def takes(self, stream: int) -> bool:
            self.stream = stream
            return super().takes(stream)

        def cudaDeviceCanAccessPeer(self, device: int, peer: int) -> tuple:
            return 0, 1

        def cudaDeviceEnablePeerAccess(self, peer: int, flags: int) -> tuple:
            pair = self.gpu(), peer
            known = pair in self.reached
            self.reached.add(pair)
            return (704 if known else 0,)

        def cudaEventCreateWithFlags(self, flags: int) -> tuple:
            assert flags == self.cudaEventDisableTiming
            self.gpu()
            event = next(self.handles)
            self.events[event] = {}
            return 0, event

        def cudaEventDestroy(self, event: int) -> tuple:
            del self.events[event]
            return (0,)

        def cudaEventRecord(self, event: int, stream: int) -> tuple:
            assert self.takes(stream), "an event is recorded by a thread of the stream's GPU"
            with self.lock:
                self.events[event] = dict(self.clock(stream))
            return (0,)

        def cudaStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple:
            with self.lock:
                self.waits += 1
                if self.waits - 1 != self.left_out:
                    mine = self.clock(stream)
                    for other, ticks in self.events[event].items():
                        mine[other] = max(mine.get(other, 0), ticks)
            return (0,)

        def clock(self, stream: int) -> dict[int, int]:
            return self.clocks.setdefault(stream, {stream: 0})

        def touched(self, address: int, size: int, *, written: bool) -> None:
            """The stream of this thread uses ``size`` bytes at ``address``."""
            stream = self.stream
            with self.lock:
                mine = self.clock(stream)
                mine[stream] += 1
                uses = self.uses.setdefault(self.base(address), {})
                for (start, end, other, wrote), ticks in uses.items():
                    conflict = other != stream and (wrote or written) and start < address + size and address < end
                    if conflict and mine.get(other, 0) < ticks:
                        self.races.append(f"stream {stream} {'writes' if written else 'reads'} what {other} used")
                uses[address, address + size, stream, written] = mine[stream]

        def base(self, address: int) -> int:
            """The allocation that ``address`` is in."""
            if self.sorted is None:
                self.sorted = sorted(self.memory)
            return self.sorted[bisect.bisect_right(self.sorted, address) - 1]

        def cudaMalloc(self, size: int) -> tuple:
            with self.lock:
                self.sorted = None
                return super().cudaMalloc(size)

        def cudaFree(self, address: int) -> tuple:
            with self.lock:
                self.sorted = None
                self.uses.pop(address, None)
                return super().cudaFree(address)

        def cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> tuple:
            result = super().cudaMemcpyAsync(target, source, size, kind, stream)
            kinds = self.cudaMemcpyKind
            if kind != kinds.cudaMemcpyHostToDevice:
                self.touched(source, size, written=False)
            if kind != kinds.cudaMemcpyDeviceToHost:
                self.touched(target, size, written=True)
            return result

        def make_cudaPitchedPtr(self, address: int, pitch: int, width: int, height: int) -> tuple:
            assert width <= pitch
            return address, pitch, pitch * height

        def make_cudaExtent(self, width: int, height: int, depth: int) -> tuple:
            return width, height, depth

        def cudaMemcpy3DPeerAsync(self, asked: Any, stream: int) -> tuple:
            assert self.takes(stream)
            width, height, depth = asked.extent
            (source, pitch, plane), (target, pitch_out, plane_out) = asked.srcPtr, asked.dstPtr
            for deep in range(depth):
                for high in range(height):
                    origin, goal = source + deep * plane + high * pitch, target + deep * plane_out + high * pitch_out
                    ctypes.memmove(goal, origin, width)
                    self.touched(origin, width, written=False)
                    self.touched(goal, width, written=True)
            if asked.srcDevice != asked.dstDevice:
                self.peer_bytes += width * height * depth
            return (0,)

    return Racing
