"""Text, and images if given, to video: the public face of the runtime."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Lock, get_ident
from typing import Any, Self, Unpack

import numpy as np

from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.card import nvfp4_note
from stiv_deploy.runtime.bundle.contract import ModelFacts
from stiv_deploy.runtime.bundle.merging import with_loras
from stiv_deploy.runtime.errors import BackendError, Cancelled, RequestError, briefly
from stiv_deploy.runtime.pipeline.call import CallOptions, ClipOptions, requests_of_call
from stiv_deploy.runtime.pipeline.coding import Clean, Coder
from stiv_deploy.runtime.pipeline.given import ImageLike
from stiv_deploy.runtime.pipeline.long_videos import LongVideos
from stiv_deploy.runtime.pipeline.output import OutputType, StivOutput, as_output, check_output_type
from stiv_deploy.runtime.pipeline.plan import GenerationPlan, plan_generation
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.sampling_loop import Follow, Observer, SamplingLoop, Step
from stiv_deploy.runtime.pipeline.timing import PhaseClock
from stiv_deploy.runtime.pipeline.tokenization import lost_line
from stiv_deploy.runtime.pipeline.views import ViewsOutput, chosen_cameras, views_request
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.runtime.sampling.hooks import GraphClock, Mark, unmarked
from stiv_deploy.runtime.sampling.parallel.opening import open_team
from stiv_deploy.runtime.sampling.parallel.placement import parse_devices
from stiv_deploy.runtime.sampling.parallel.team import Team
from stiv_deploy.runtime.sampling.replay import REPLAY

log = logging.getLogger(__name__)
AGAIN = "open one with StivPipeline.from_bundle"
CPU = "onnxruntime"
"""The backend on the CPU."""


class StepValues(Mapping[str, Any]):
    """What a step callback may look at, and change by returning other ``latents``.

    ``latents`` are fp32 [B, T, C, h, w] of the videos that are sampled together, copied only when asked for, ``total``
    is the number of steps of all batches.
    """

    def __init__(self, step: Step, total: int) -> None:
        self._values: dict[str, Callable[[], Any]] = {"latents": step.read_latents, "total": lambda: total}
        self.changed: Any = None

    def __getitem__(self, key: str) -> Any:
        return self._values[key]()

    def __setitem__(self, key: str, value: Any) -> None:
        if key != "latents":
            raise RequestError(f"a step callback can change the latents only, not {briefly(key)}")
        self.changed = value
        self._values[key] = lambda: value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


StepCallback = Callable[["StivPipeline", int, float, StepValues], object]
"""Called after each step with the pipeline, the step (counting on over batches), the time reached, and
:class:`StepValues`. It stops the generation by raising, for instance :class:`Cancelled`. Sampling goes on from other
latents if it sets those of the values and returns them, or returns ``{"latents": ...}``; given frames stay."""


class StivPipeline(LongVideos):
    """Generates videos from a bundle. Close it, or use it with ``with``, to free the device.

    Threads may share it: their calls run one after another. ``profile`` waits for the device after every graph, so that
    ``timings["graphs"]`` is right on a GPU too; ``debug`` names the first step whose latents are not finite. Both cost
    time. Phases and graphs are ranges of ``mark``, for a profiler.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        *,
        profile: bool = False,
        debug: bool = False,
        team: Team | None = None,
        mark: Mark = unmarked,
    ) -> None:
        self.bundle = bundle
        self._profile, self._debug, self._mark = profile, debug, mark
        self._lock = Lock()
        self._user: int | None = None
        self._closed = False
        self._take(backend, team)

    def _take(self, backend: Backend, team: Team | None = None) -> None:
        self.backend, self._team = backend, team
        note = nvfp4_note(self.bundle.manifest, backend.name)
        if note is not None:
            log.warning(note)
        self._clock = GraphClock(backend.synchronize if self._profile else None, self._mark)
        self._loop = SamplingLoop(
            backend, self.bundle, self._clock, capture=not self._profile, debug=self._debug, team=team
        )
        self._coder = Coder(backend, self.bundle, self._clock, team)

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Self:
        """:meth:`from_bundle` by the name that diffusers' users know."""
        return cls.from_bundle(path, **options)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        backend: str | None = None,
        threads: int | None = None,
        *,
        device: int = 0,
        devices: str | Sequence[str] = (),
        parallel: str | None = None,
        processes: bool = False,
        nccl: bool = False,
        loras: Sequence[str] = (),
        profile: bool = False,
        debug: bool = False,
        mark: Mark = unmarked,
    ) -> Self:
        """Open the bundle in the folder ``path`` on ``backend`` (by default the best that works here).

        ``threads`` limits the CPU threads, ``device`` is the GPU's index as CUDA counts. Several ``devices``, indices
        of GPUs or ``cpu`` for each, as in ``"0,1,2,3"``, make clips together: shared as ``parallel`` says
        (``cfg2xdsp4``), by default guidance first, each in a thread of this process or in ``processes`` of their own,
        which exchange over sockets or, on GPUs, by ``nccl``.
        ``loras``, each a file with its scale as ``FILE[:SCALE]``, are merged into the weights at load.
        Raises :class:`~stiv_deploy.runtime.errors.BundleError`, :class:`~stiv_deploy.runtime.errors.BackendError`,
        :class:`~stiv_deploy.runtime.errors.EngineError` or :class:`~stiv_deploy.runtime.errors.LoraError`.
        """
        bundle = with_loras(Bundle.open(path), loras)
        if not devices:
            if parallel is not None or processes or nccl:
                raise BackendError(
                    "--parallel, --processes and --nccl are for several devices; name them with --devices"
                )
            alone = open_backend(backend, bundle, threads, device)
            return cls(bundle, alone, profile=profile, debug=debug, mark=mark)
        names = parse_devices(devices if isinstance(devices, str) else ",".join(map(str, devices)))
        team = open_team(
            bundle, names, parallel=parallel, backend=backend, threads=threads, processes=processes, nccl=nccl
        )
        return cls(bundle, team.backend, profile=profile, debug=debug, team=team, mark=mark)

    def to(self, device: Any) -> Self:
        """This pipeline, moved to ``device``: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, a torch device too.

        On a GPU it takes the best backend there, as :meth:`from_bundle` does. Raises :class:`RequestError` for
        another name, and what that raises; the pipeline then stays where it is.
        """
        name, index = _device(device)
        with self._alone():
            self._check_open()
            if name == self.backend.name == CPU:
                return self
            backend = open_backend(name, self.bundle, device=index)
            if name is None and backend.name == CPU:
                backend.close()
                raise BackendError(f"no backend can use {device} here; 'stiv doctor' says why")
            self._free()
            self._take(backend)
        return self

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

    def views(
        self,
        image: ImageLike,
        *,
        azimuths: Sequence[float] | None = None,
        callback_on_step_end: StepCallback | None = None,
        cancel: Event | None = None,
        **options: Unpack[ClipOptions],
    ) -> ViewsOutput:
        """Views of the object in the picture ``image`` from all around it, those at ``azimuths`` degrees or all.

        The model must have been trained for views; the cameras are those of that training
        (:func:`~stiv_deploy.runtime.pipeline.views.cameras`). ``options`` are those of a call, with the paper's
        guidance scale 3.5 and zero latents for the given view in the unconditional branch by default.

        Raises :class:`RequestError` before anything is computed if this is not possible; else see :meth:`run`.
        """
        plan = self.plan(views_request(self.bundle, image, options))
        chosen = chosen_cameras(plan.size.frames, azimuths)
        return ViewsOutput(output=self.run(plan, callback_on_step_end, cancel), cameras=chosen)

    def plan(self, requests: GenerationRequest | Sequence[GenerationRequest]) -> GenerationPlan:
        """The plan of one request, or of several of one size; no device is touched.

        Raises :class:`RequestError` for everything that a request can have wrong, see :func:`plan_generation`.
        """
        plan = plan_generation(self.bundle, requests)
        if self._team is not None:
            self._team.placement.fitting(*_tokens(self.bundle.manifest.model, plan))
            for batch in plan.batches:
                self._loop.check_shared(batch, plan.size)
        return plan

    def run(
        self,
        plan: GenerationPlan,
        observer: StepCallback | None = None,
        cancel: Event | None = None,
        output_type: OutputType = "np",
    ) -> StivOutput:
        """Generate the videos of ``plan``; waits while another thread's run is on.

        ``observer`` is called after each step. ``output_type`` is ``np``, ``pil``, ``pt`` or ``latent``, see
        :class:`StivOutput`. Raises :class:`Cancelled` between two steps once ``cancel`` is set,
        :class:`~stiv_deploy.runtime.errors.StivError` if the result is not finite, :class:`RequestError` for a plan of
        another bundle, from inside a step callback, and when the pipeline is closed.
        """
        check_output_type(output_type)
        if not (observer is None or callable(observer)):
            raise RequestError(f"callback_on_step_end must be callable, got {briefly(observer)}")
        if not (cancel is None or callable(getattr(cancel, "is_set", None))):
            raise RequestError(f"cancel must be a threading.Event, got {briefly(cancel)}")
        if plan.bundle != self.bundle.hash:
            raise RequestError("the plan was made for another bundle; make it with this pipeline's plan()")
        with self._alone():
            self._check_open()
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled before the first step")
            lost = self._told(plan)
            return self._generate(plan, observer, cancel, output_type, lost)

    def lost(self, plan: GenerationPlan) -> dict[str, str]:
        """As :class:`Maker` says."""
        return self._loop.lost(plan)

    def sample(self, plan: GenerationPlan, progress: Progress = unheard, cancel: Event | None = None) -> np.ndarray:
        """As :class:`Maker` says."""

        def heard(_pipe: Self, step: int, _time: float, values: StepValues) -> None:
            progress("", step + 1, values["total"])

        with self._alone():
            self._check_open()
            return self._generate(plan, heard, cancel, "latent", {}).latents

    def sample_in_step(self, plan: GenerationPlan, follow: Follow) -> np.ndarray:
        """Latents fp32 [B, T, C, h, w] of the videos of ``plan``, which take each step one after the other.

        After it ``follow`` says from which latents all go on. They have one number of steps, of one evaluation each.
        """
        with self._alone():
            self._check_open()
            clean = self._coder.clean_latents(plan)
            given = [[clean[video.given] for video in batch] for batch in plan.batches]
            return self._loop.in_step(plan.batches, plan.size, given, follow)

    def encode(self, plan: GenerationPlan) -> list[Clean]:
        """As :class:`Maker` says."""
        with self._alone():
            self._check_open()
            clean = self._coder.clean_latents(plan)
        return [clean[video.given] for video in plan.videos]

    def decode(self, plan: GenerationPlan, latents: np.ndarray) -> np.ndarray:
        """As :class:`Maker` says."""
        with self._alone():
            self._check_open()
            return self._coder.decoder(plan, len(latents))(latents)

    @property
    def clock(self) -> GraphClock:
        """Calls of each graph so far, and seconds in them; those of a captured sequence are called :data:`REPLAY`."""
        return self._clock

    def forget_texts(self) -> None:
        """Encode every prompt anew from now on, those that were kept too: so that times do not tell of what was."""
        with self._alone():
            self._check_open()
            self._loop.forget_texts()

    def _told(self, plan: GenerationPlan) -> dict[str, str]:
        """What is lost of the prompts, by prompt, after a warning of it, and one for each that the plan has."""
        lost = self._loop.lost(plan)
        if lost:
            log.warning(lost_line(lost))
        for line in dict.fromkeys(line for video in plan.videos for line in video.warnings):
            log.warning(line)
        return lost

    def close(self) -> None:
        """Free buffers, sessions and engines, once a run that is on has ended."""
        with self._alone():
            if self._closed:
                return
            self._closed = True
            self._free()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"this pipeline is closed; {AGAIN}")

    def _free(self) -> None:
        self._loop.free()
        self._coder.free()
        if self._team is not None:
            self._team.close()
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
        self,
        plan: GenerationPlan,
        callback: StepCallback | None,
        cancel: Event | None,
        output_type: OutputType,
        lost: dict[str, str],
    ) -> StivOutput:
        phases, graphs = PhaseClock(self.backend.synchronize, self._mark), self._graph_seconds()
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
            lost=lost,
            warnings=[video.warnings for video in plan.videos],
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
        def observer(step: Step) -> Any:
            values = StepValues(step, total)
            result = callback(self, before + step.index, step.time, values)
            if result is values:
                return values.changed
            return result.get("latents") if isinstance(result, Mapping) else None

        return observer


def _tokens(model: ModelFacts, plan: GenerationPlan) -> tuple[int, int]:
    """Token frames of the clips of ``plan``, and tokens of each."""
    size = plan.size
    side = model.pixel_multiple
    return model.latent_frames(size.frames) // model.patch[0], (size.height // side) * (size.width // side)


def _device(device: Any) -> tuple[str | None, int]:
    """Backend (``None``: the best) and index of ``device``; :class:`RequestError`."""
    match str(device).split(":"):
        case ["cpu"]:
            return CPU, 0
        case ["cuda"]:
            return None, 0
        case ["cuda", index] if index.isdecimal() and len(index) < 4:
            return None, int(index)
    raise RequestError(f"a pipeline moves to 'cpu', 'cuda' or 'cuda:1', got {briefly(device)}")
