"""Text, and images if given, to video: the public face of the runtime."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, get_ident
from typing import Any, Self, Unpack

import numpy as np

from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.errors import Cancelled, RequestError
from stiv_deploy.runtime.pipeline.call import CallOptions, requests_of_call
from stiv_deploy.runtime.pipeline.coding import Coder
from stiv_deploy.runtime.pipeline.output import OutputType, StivOutput, as_output, check_output_type
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.sampling_loop import Observer, SamplingLoop, Step
from stiv_deploy.runtime.pipeline.timing import PhaseClock
from stiv_deploy.runtime.sampling.hooks import GraphClock
from stiv_deploy.runtime.sampling.replay import REPLAY

AGAIN = "open one with StivPipeline.from_bundle"


class StepValues(Mapping[str, Any]):
    """What a step callback may look at.

    ``latents`` are fp32 [B, T, C, h, w] of the videos that are sampled together, copied only when asked for, ``total``
    is the number of steps of all batches.
    """

    def __init__(self, step: Step, total: int) -> None:
        self._values = {"latents": step.read_latents, "total": lambda: total}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


StepCallback = Callable[["StivPipeline", int, float, Mapping[str, Any]], object]
"""Called after each step with the pipeline, the step (counting on over batches), the time reached, and
:class:`StepValues`. It stops the generation by raising, for instance :class:`Cancelled`."""


class StivPipeline:
    """Generates videos from a bundle. Close it, or use it with ``with``, to free the device.

    Threads may share it: their calls run one after another. ``profile`` waits for the device after every graph, so that
    ``timings["graphs"]`` is right on a GPU too; ``debug`` names the first step whose latents are not finite. Both cost
    time.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, profile: bool = False, debug: bool = False) -> None:
        self.bundle = bundle
        self.backend = backend
        self._clock = GraphClock(backend.synchronize if profile else None)
        self._loop = SamplingLoop(backend, bundle, self._clock, capture=not profile, debug=debug)
        self._coder = Coder(backend, bundle, self._clock)
        self._lock = Lock()
        self._user: int | None = None
        self._closed = False

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str | None = None,
        threads: int | None = None,
        *,
        device: int = 0,
        profile: bool = False,
        debug: bool = False,
    ) -> Self:
        """Open the bundle in the folder ``path`` on ``backend`` (by default the best that works here).

        ``threads`` limits the CPU threads, ``device`` is the GPU's index as CUDA counts. Raises
        :class:`~stiv_deploy.runtime.errors.BundleError`, :class:`~stiv_deploy.runtime.errors.BackendError` or
        :class:`~stiv_deploy.runtime.errors.EngineError`.
        """
        bundle = Bundle.open(path)
        return cls(bundle, open_backend(backend, bundle, threads, device), profile=profile, debug=debug)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        output_type: OutputType = "np",
        **options: Unpack[CallOptions],
    ) -> StivOutput:
        """Generate videos of ``prompt``, or of each of several.

        ``options`` are the fields of :class:`GenerationRequest` and the short forms of :class:`CallOptions`; what is
        left out or ``None`` has the default that the checkpoint recommends. Sample i draws its noise from ``seed + i``.

        Raises :class:`RequestError` before anything is computed if the request is not possible; else see :meth:`run`.
        """
        plan = self.plan(requests_of_call(prompt, options))
        return self.run(plan, callback_on_step_end, cancel, output_type)

    def plan(self, requests: GenerationRequest | Sequence[GenerationRequest]) -> GenerationPlan:
        """The plan of one request, or of several of one size; no device is touched.

        Raises :class:`RequestError` for everything that a request can have wrong, see :func:`plan_generation`.
        """
        return plan_generation(self.bundle, requests)

    def run(
        self,
        plan: GenerationPlan,
        observer: StepCallback | None = None,
        cancel: Event | None = None,
        output_type: OutputType = "np",
    ) -> StivOutput:
        """Generate the videos of ``plan``; waits while another thread's run is on.

        ``observer`` is called after each step. ``output_type`` is ``np``, ``pil`` or ``latent``, see
        :class:`StivOutput`. Raises :class:`Cancelled` between two steps once ``cancel`` is set,
        :class:`~stiv_deploy.runtime.errors.StivError` if the result is not finite, :class:`RequestError` for a plan of
        another bundle, from inside a step callback, and when the pipeline is closed.
        """
        check_output_type(output_type)
        if plan.bundle != self.bundle.hash:
            raise RequestError("the plan was made for another bundle; make it with this pipeline's plan()")
        with self._alone():
            if self._closed:
                raise RequestError(f"this pipeline is closed; {AGAIN}")
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled before the first step")
            return self._generate(plan, observer, cancel, output_type)

    def close(self) -> None:
        """Free buffers, sessions and engines, once a run that is on has ended."""
        with self._alone():
            if self._closed:
                return
            self._closed = True
            self._loop.free()
            self._coder.free()
            self.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out, and this one too if it is inside."""
        if self._user == get_ident():
            raise RequestError(f"this pipeline is in a run, whose step callback can not use it; {AGAIN} besides")
        with self._lock:
            self._user = get_ident()
            try:
                yield
            finally:
                self._user = None

    def _generate(
        self, plan: GenerationPlan, callback: StepCallback | None, cancel: Event | None, output_type: OutputType
    ) -> StivOutput:
        phases, graphs = PhaseClock(self.backend.synchronize), self._graph_seconds()
        with phases("encode"):
            clean = self._coder.clean_latents(plan)
        latents: list[np.ndarray] = []
        frames: list[np.ndarray] = []
        for batch, observer in zip(plan.batches, self._observers(plan, callback), strict=True):
            given = [clean[video.given] for video in batch]
            latents.append(self._loop(batch, plan.size, given, phases, observer, cancel))
            if output_type != "latent":
                frames.append(self._decode(plan, latents[-1], phases))
        spent = {name: after - graphs[name] for name, after in self._graph_seconds().items()}
        timings = phases.seconds | spent | {"total": phases.total}
        return StivOutput(
            frames=as_output(frames, output_type),
            latents=np.concatenate(latents),
            requests=[video.request for video in plan.videos],
            bundle=plan.bundle,
            backend=self.backend.name,
            timings=timings,
        )

    def _graph_seconds(self) -> dict[str, float]:
        """Seconds in graphs so far, and of these in replays of captured ones."""
        return {"graphs": self._clock.total, "replays": self._clock.seconds[REPLAY]}

    def _decode(self, plan: GenerationPlan, latents: np.ndarray, phases: PhaseClock) -> np.ndarray:
        with phases("load"):
            decode = self._coder.decoder(plan, len(latents))
        with phases("decode"):
            return decode(latents)

    def _observers(self, plan: GenerationPlan, callback: StepCallback | None) -> Iterator[Observer | None]:
        """``callback`` as the observer of each batch."""
        before, total = 0, sum(map(self._loop.steps, plan.batches))
        for batch in plan.batches:
            yield None if callback is None else self._observer(callback, before, total)
            before += self._loop.steps(batch)

    def _observer(self, callback: StepCallback, before: int, total: int) -> Observer:
        return lambda step: callback(self, before + step.index, step.time, StepValues(step, total))
