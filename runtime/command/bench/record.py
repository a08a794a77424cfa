"""What a measurement is kept as: JSON with all that somebody needs to repeat it, and to judge it again."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationError

from stiv_deploy.runtime.bundle.bounds import Digest, Name
from stiv_deploy.runtime.bundle.contract import Format, Frozen, ModelFacts, Precision
from stiv_deploy.runtime.bundle.faults import fault_text
from stiv_deploy.runtime.bundle.verified import State
from stiv_deploy.runtime.command.bench.mllog import LoadgenResult
from stiv_deploy.runtime.command.bench.roofline import Roofline
from stiv_deploy.runtime.command.bench.statistics import Estimate
from stiv_deploy.runtime.errors import MeasurementError
from stiv_deploy.runtime.files import read_json

Seconds = Annotated[float, Field(ge=0, le=1e9)]
Took = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=0, le=2**63)]
Line = Annotated[str, Field(max_length=1_000)]
Share = Annotated[float, Field(ge=0, le=1)]
STAGES = ("load", "text", "encode", "denoise", "decode", "write", "rest")
"""Parts of a sample: graphs and buffers of a new size, prompts, given pictures, all steps, latents to frames, frames to
mp4 files, and what is left."""


def share_of(percentile: str) -> float:
    """The share of ``p90``: 0.9; a ``ValueError`` for anything else."""
    share = float(percentile.removeprefix("p")) / 100
    if not (percentile.startswith("p") and 0 < share < 1):
        raise ValueError("want a percentile above 0 and below 100, such as p90")
    return share


def _checked(percentile: str) -> str:
    share_of(percentile)
    return percentile


Percentile = Annotated[str, Field(max_length=20), AfterValidator(_checked)]


class Stages(Frozen):
    """Seconds of each of :data:`STAGES`."""

    load: Seconds
    text: Seconds
    encode: Seconds
    denoise: Seconds
    decode: Seconds
    write: Seconds
    rest: Seconds

    def __getitem__(self, stage: str) -> float:
        seconds: float = getattr(self, stage)
        return seconds


class Work(Frozen):
    """What one sample makes: ``batch`` clips, and all that their time may follow from.

    ``guidance`` has the mode, the scales, renormalization and the interval; ``rows`` of the model are the most that all
    clips need at once, ``row_evaluations`` those of all evaluations together; ``given`` are pictures of a clip.
    """

    batch: Count
    frames: Count
    height: Count
    width: Count
    steps: Count
    evaluations: Count
    solver: Name
    guidance: Name
    rows: Count
    row_evaluations: Count
    given: Count
    decode_tile: Count | None

    def __str__(self) -> str:
        clips = "1 clip" if self.batch == 1 else f"{self.batch} clips"
        return f"{clips} of {self.frames}x{self.height}x{self.width}, {self.steps} steps"


class Sample(Frozen):
    """One measured piece of work, in seconds; CPU time is that of all threads of the process."""

    seconds: Took
    stages: Stages
    cpu_seconds: Seconds
    graph_seconds: dict[Name, Seconds]
    """Until the calls of a graph returned, by graph, blocks as one; a device may work on."""
    launches: Count
    """Calls of graphs, or replays of captured ones, in all steps."""
    bound: Count
    """Graphs that were loaded or given buffers for a size that was new; none, if the warm-up was of this size."""


class WarmUp(Frozen):
    """What ran before the samples, and whether it had ceased to get faster."""

    work: Work
    seconds: tuple[Took, ...]
    stable: bool


class Clocks(Frozen):
    """What the speed of processors is set to, as far as the system tells; the GPU's was read after the samples."""

    governor: Name | None = None
    cpu_most_mhz: Seconds | None = None
    gpu_mhz: Count | None = None
    gpu_memory_mhz: Count | None = None


class Point(Frozen):
    """Samples of one piece of work, and what follows from them; a dictionary of estimates has medians."""

    work: Work
    warm_up: WarmUp
    samples: tuple[Sample, ...] = Field(min_length=1)
    latency: dict[Percentile, Estimate | None]
    """Seconds of a sample by percentile (``p50``); None where the samples are too few for it."""
    stages: Stages
    evaluation_seconds: Seconds
    """Of the steps by their evaluations of the model, the median."""
    clips_per_second: float
    cpu_seconds: Seconds
    graphs: Count
    """Graphs that an evaluation computes."""
    launches: float
    """Calls that an evaluation takes."""
    host_gap: Share | None
    """Of the steps' time, what passed outside graphs; None where calls only queue work."""
    roofline: Roofline
    joules: float | None = None
    """Energy of a clip on the GPU, by its own meter."""
    device_bytes: Count | None = None
    """Memory of the GPU that was in use after the samples, by whomever."""
    others: Share | None
    """Of all cores, what other processes kept busy meanwhile."""
    clocks: Clocks


class ColdStart(Frozen):
    """A fresh process, files in the system's cache: seconds from its start to the first clip, and its peak memory."""

    seconds: Seconds
    imported: Seconds
    opened: Seconds
    first: Seconds
    peak_bytes: Count


class CacheProbe(Frozen):
    """Seconds of the same request again and again, and by turns of ever new ones: results that were kept show."""

    repeated: tuple[Took, ...] = Field(min_length=1)
    fresh: tuple[Took, ...] = Field(min_length=1)
    ratio: Estimate


class Machine(Frozen):
    """Where it was measured."""

    cpu: Name
    cores: Count
    memory_gib: float | None
    gpus: tuple[Name, ...]
    system: Name


class BundleFacts(Frozen):
    """Which bundle; ``hash`` is that of what its results follow from."""

    hash: Digest
    precision: Precision
    quantization: Format | None
    model: ModelFacts
    engines: Count


class Verification(Frozen):
    """What ``stiv verify`` knows of this bundle on this machine by this backend, and why, in one line."""

    state: State
    reason: Line


class Circumstances(Frozen):
    """When, by what command, of which bundle, and where something was measured."""

    date: Name
    command: str
    bundle: BundleFacts
    verification: Verification
    backend: Name
    device: Name
    threads: Count
    machine: Machine
    versions: dict[Name, Name]


class BenchReport(Circumstances):
    """A whole measurement. ``invalid`` has every reason why it should not be believed: it was asked for anyway."""

    format: Literal["stiv-bench"] = "stiv-bench"
    version: Literal[1] = 1
    seed: Count
    """Of the first clip; the others count on."""
    transport: Literal["in-process", "http"] = "in-process"
    caches: tuple[Name, ...] = ()
    """What is kept from sample to sample, by name."""
    nvtx: bool = False
    """Whether phases and graphs were ranges of NVTX."""
    points: tuple[Point, ...] = Field(min_length=1)
    cold: ColdStart | None = None
    loadgen: LoadgenResult | None = None
    probe: CacheProbe | None = None
    invalid: tuple[Line, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Self:
        """The report in the file ``path``; :class:`~stiv_deploy.runtime.errors.MeasurementError` for anything else."""
        remedy = "give what 'stiv bench --json FILE' wrote"
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise MeasurementError(f"{path}: cannot be read as JSON ({error}); {remedy}") from None
        if not isinstance(values, dict) or values.get("format") != "stiv-bench":
            raise MeasurementError(f"{path}: no measurement of 'stiv bench'; {remedy}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise MeasurementError(f"{path}: {fault_text(error)}; {remedy}") from None
