"""The parity ladder: op -> block -> one step -> teacher-forced trajectory -> free run, and gates on the video itself.

The truth is the reference in fp64. The yardstick is the reference in the bundle's own precision: what plain PyTorch
loses there is what nobody can ask a backend not to lose. Gates (relative L2 error against the truth):

- op and block: 2 x yardstick + 4 units of rounding, and in float32 never looser than 1e-5;
- step and teacher-forced (each step from the oracle's latents): the same rule, in float32 never looser than 1e-4;
- free run: 4 x yardstick + 4 units of rounding, because both errors are amplified by the same trajectory but start from
  different roundings.

The float32 caps are the project's promise; the floor covers sums taken in another order.

A bundle with 8-bit layers has the same levels. Graphs without such layers keep the rules above; for everything else the
yardstick is the fake-quantized reference, with the rules of :mod:`~stiv_deploy.export.graphs.draws`, and a second row
each (level ``direct_...``) compares the backend with that model instead of the truth.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from stiv_deploy.calibration.scales import Scales
from stiv_deploy.export.graphs.draws import UNIT_ROUNDING, quantized_gate, rel_l2
from stiv_deploy.export.graphs.precision import torch_dtype
from stiv_deploy.export.graphs.reduced_check import LEAST_PSNR, psnr, reduced_session
from stiv_deploy.export.parity.draws import Draws
from stiv_deploy.export.parity.lean import OneAtATime, only
from stiv_deploy.export.parity.oracle import Oracle, Tensors
from stiv_deploy.export.parity.requests import Request, parity_requests
from stiv_deploy.export.parity.runs import TeacherForced, free_run, probe
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import FRAMES, VAE_GRAPHS, Precision, block_of, dimensions, is_block
from stiv_deploy.runtime.bundle.manifest import ParityRow
from stiv_deploy.runtime.pipeline.images import frames_from_video
from stiv_deploy.runtime.progress import Progress, unheard
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.sampler import sample

FLOAT32_CAPS = {"op": 1e-5, "block": 1e-5, "step": 1e-4, "teacher_forced": 1e-4}
FACTORS = {"op": 2.0, "block": 2.0, "step": 2.0, "teacher_forced": 2.0, "free_run": 4.0}
FLOOR = 4.0
SAME = 0.999
"""Least share of 8-bit values that are equal: where two levels meet, a fused product and sum round apart by one."""
DIRECT = "direct_"
"""Prefix of the levels that compare with the fake-quantized reference."""


class News:
    """Tells ``progress`` what is measured: the next of ``total`` pieces, or how far the one at hand is."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, -1

    def next(self, what: str) -> None:
        """Another piece begins."""
        self._done += 1
        self.more(what)

    def more(self, what: str) -> None:
        """The same piece goes on."""
        self._progress(what, self._done, self._total)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured: a bundle, the checkpoint it was exported from, and the scales if it has 8-bit layers."""

    bundle: Bundle
    checkpoint: Checkpoint
    scales: Scales | None = None


class Walk(NamedTuple):
    """The float64 reference's run of a request.

    ``points`` are its latents [1, T, C, h, w] before each step, in float32, ``velocities`` the guided ones there,
    ``end`` the latents that it comes to.
    """

    request: Request
    points: list[Tensor]
    velocities: list[Tensor]
    end: Tensor


def walk(truth: Oracle, request: Request, news: News) -> Walk:
    """Let the reference ``truth`` sample ``request``."""
    points: list[Tensor] = []
    velocities: list[Tensor] = []
    news.next(f"the reference: {request.name}")

    def keep(step: int, before: Tensor, velocity: Tensor) -> None:
        points.append(before.float())
        velocities.append(velocity)
        news.more(f"the reference: {request.name}, step {step + 1}")

    end = sample(truth.boundary, truth.sampling_inputs(request), request.settings, keep)
    return Walk(request, points, velocities, end)


class Sides(NamedTuple):
    """What a backend is measured by: the reference in float64 and in the bundle's precision, and draws in 8 bits."""

    truth: Oracle
    plain: Oracle
    draws: Draws | None


def sides_of(subject: Subject, *, lean: bool = False) -> Sides:
    """The sides of ``subject``; with ``lean`` they hold one graph at a time, and can run nothing else."""
    checkpoint, manifest, scales = subject.checkpoint, subject.bundle.manifest, subject.scales

    def oracle(dtype: torch.dtype) -> Oracle:
        return OneAtATime(lambda graph: Oracle(only(checkpoint, graph), dtype)) if lean else Oracle(checkpoint, dtype)

    draws = None if scales is None else Draws(checkpoint, manifest, scales, lean=lean)
    return Sides(oracle(torch.float64), oracle(torch_dtype(manifest.precision)), draws)


@dataclass(frozen=True)
class VideoGate:
    """A check that norms do not make: ``value`` must be at least ``gate``."""

    name: str
    backend: str
    value: float
    gate: float

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.value >= self.gate


@dataclass(frozen=True)
class ParityReport:
    """All rows of a run; ``yardsticks`` holds plain PyTorch's error (of 8-bit rows the mean over draws), row by row."""

    rows: tuple[ParityRow, ...]
    yardsticks: tuple[float, ...]
    video: tuple[VideoGate, ...]

    @property
    def passed(self) -> bool:
        """Whether every row and every video gate passed."""
        return all(row.passed for row in self.rows) and all(gate.passed for gate in self.video)


def gate_of(level: str, precision: str, yardstick: float) -> float:
    """The largest relative L2 error that passes; see the module's text for the rule."""
    derived = FACTORS[level] * yardstick + FLOOR * UNIT_ROUNDING[precision]
    return min(derived, FLOAT32_CAPS.get(level, derived)) if precision == "float32" else derived


class Ladder:
    """Collects rows for one backend."""

    def __init__(self, backend: Backend, bundle: Bundle, sides: Sides, news: News) -> None:
        self.backend, self.bundle, self.news = backend, bundle, news
        self.truth, self.plain, self.draws = sides
        self.manifest = bundle.manifest
        self.precision = self.manifest.precision
        self.rows: list[ParityRow] = []
        self.yardsticks: list[float] = []
        self.video: list[VideoGate] = []

    def add(
        self, level: str, name: str, got: Tensor, plain: Tensor, truth: Tensor, precision: Precision | None = None
    ) -> None:
        """Record one comparison of what was computed in ``precision``, by default the bundle's."""
        yardstick = rel_l2(plain, truth)
        self._record(level, name, got, truth, yardstick, gate_of(level, precision or self.precision, yardstick))

    def type_of(self, graph: str) -> Precision:
        """The coarsest type in which ``graph`` is computed; TF32, which engines may take, rounds as float16 does."""
        if graph not in VAE_GRAPHS or not self.backend.engines or self.precision == "float32":
            return self.precision
        reduced = self.manifest.vae_precision
        types: tuple[Precision, ...] = (self.precision, "float16" if reduced == "float32" else reduced)
        return max(types, key=UNIT_ROUNDING.__getitem__)

    def add_quantized(self, level: str, name: str, got: Tensor, draws: Sequence[Tensor], truth: Tensor) -> None:
        """Record the comparisons with the truth and with the first of ``draws``."""
        for prefix, others, reference in (("", draws, truth), (DIRECT, draws[1:], draws[0])):
            errors = [rel_l2(each, reference) for each in others]
            gate = quantized_gate(self.precision, errors)
            self._record(prefix + level, name, got, reference, statistics.fmean(errors), gate)

    def _record(self, level: str, name: str, got: Tensor, truth: Tensor, yardstick: float, gate: float) -> None:
        error, quantization = rel_l2(got, truth), self.manifest.quantization
        row = ParityRow(
            level=level,
            name=name,
            backend=self.backend.name,
            precision=f"{quantization.format}/{self.precision}" if quantization else self.precision,
            rel_l2=error,
            max_abs=(got.double() - truth.double()).abs().max().item(),
            gate=gate,
            passed=error <= gate,
        )
        self.rows.append(row)
        self.yardsticks.append(yardstick)

    def dims(self, request: Request) -> dict[str, int]:
        """Symbol values of ``request``."""
        _, frames, _, height, width = request.inputs.noise.shape
        model = self.manifest.model
        return dimensions(
            model,
            batch=1,
            model_batch=request.branches,
            video_frames=model.video_frames(frames),
            height=height * model.spatial_factor,
            width=width * model.spatial_factor,
            text_tokens=request.token_ids.shape[1],
        )

    def execute(self, graph: str, inputs: Mapping[str, Tensor], dims: dict[str, int]) -> Tensors:
        """Run one graph of the bundle on host tensors."""
        spec = self.manifest.specs[graph]
        buffers = {}
        for tensor in spec.inputs:
            buffers[tensor.name] = self.backend.empty(tensor.sized(dims), tensor.dtype)
            self.backend.write(buffers[tensor.name], inputs[tensor.name].numpy())
        outputs = {tensor.name: self.backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.outputs}
        self.backend.bind(graph, buffers, outputs)()
        return {name: torch.from_numpy(self.backend.read(buffer)) for name, buffer in outputs.items()}

    def graphs(self, request: Request) -> None:
        """Levels op and block: every graph alone, on inputs that the oracle really feeds it half-way through a run."""
        for graph, inputs in probe(self.truth, request, self.manifest):
            self.news.next(f"{self.backend.name}: {graph}")
            self.graph(graph, self.as_given(graph, inputs), self.dims(request))

    def graph(self, graph: str, given: Tensors, dims: dict[str, int]) -> list[ParityRow]:
        """The rows of one graph, a block or an op, on ``given`` inputs of the contract's types."""
        before = len(self.rows)
        truth = self.truth.run(graph, given)
        quantized = self.draws is not None and self.draws.judge(graph)
        draws = self.draws.graph(graph, given) if self.draws is not None and quantized else []
        plain = {} if quantized else self.plain.run(graph, given)
        level = "block" if is_block(block_of(graph)) else "op"
        for name, got in self.execute(graph, given, dims).items():
            label = graph if level == "block" else f"{graph}.{name}"
            if quantized:
                self.add_quantized(level, label, got, [draw[name] for draw in draws], truth[name])
            else:
                self.add(level, label, got, plain[name], truth[name], self.type_of(graph))
        return self.rows[before:]

    def as_given(self, graph: str, inputs: Mapping[str, Tensor]) -> Tensors:
        """``inputs`` rounded to the types of the contract, which all three sides then start from."""
        spec = self.manifest.specs[graph]
        types = {tensor.name: getattr(torch, tensor.dtype) for tensor in spec.inputs}
        return {name: inputs[name].to(dtype).contiguous() for name, dtype in types.items()}

    def trajectory(self, walk: Walk) -> None:
        """Levels step and teacher-forced: each step of the oracle's run, from the oracle's latents."""
        request = walk.request
        self.news.next(f"{self.backend.name}: {request.name}, {len(walk.points)} steps from the reference's latents")
        runner = TeacherForced(self.backend, self.bundle, self.dims(request), request)
        got = [runner.velocity(latents, step) for step, latents in enumerate(walk.points)]
        if self.draws is None:
            self._steps(walk, got)
        else:
            draws = self.draws.velocities(request, walk.points)
            self._quantized_steps(request.name, torch.cat(got), draws, walk.velocities)

    def _steps(self, walk: Walk, got: Sequence[Tensor]) -> None:
        """The teacher-forced row is the step that comes nearest to its gate."""
        request, truth = walk.request, walk.velocities
        inputs, steps = self.plain.sampling_inputs(request), pairwise(request.times())
        plain = [
            self.plain.guided_velocity(latents, inputs, request.settings, times)
            for latents, times in zip(walk.points, steps, strict=True)
        ]
        gates = [gate_of("teacher_forced", self.precision, rel_l2(*pair)) for pair in zip(plain, truth, strict=True)]
        shares = [rel_l2(*pair) / gate for *pair, gate in zip(got, truth, gates, strict=True)]
        worst = max(range(len(shares)), key=lambda step: math.inf if math.isnan(shares[step]) else shares[step])
        for level, step in (("step", 0), ("teacher_forced", worst)):
            self.add(level, request.name, got[step], plain[step], truth[step])

    def _quantized_steps(self, name: str, got: Tensor, draws: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
        """The teacher-forced row is the error over all steps [steps, T, C, h, w]: its spread over draws is small."""
        whole = torch.cat(list(truth))
        self.add_quantized("step", name, got[0], [draw[0] for draw in draws], whole[0])
        self.add_quantized("teacher_forced", name, got, draws, whole)

    def free_run(self, walk: Walk) -> None:
        """Level free_run: the whole loop by itself; given frames must be bit-equal; then the gates on the video."""
        request, truth = walk.request, walk.end
        self.news.next(f"{self.backend.name}: {request.name}, free run")
        latents = torch.from_numpy(free_run(self.backend, self.bundle, self.dims(request), request))
        if self.draws is None:
            plain = sample(self.plain.boundary, self.plain.sampling_inputs(request), request.settings)
            self.add("free_run", request.name, latents, plain, truth)
        else:
            self.add_quantized("free_run", request.name, latents, self.draws.free_runs(request), truth)
        self.gate_video(request, latents, truth)

    def gate_video(self, request: Request, latents: Tensor, truth: Tensor) -> None:
        """Finite, not constant, not frozen (against the oracle's clip), and given frames untouched.

        A VAE in 16 bits is emulated, whatever the backend: what engines give is a row of its own.
        """

        def gate(name: str, value: float, least: float) -> None:
            self.video.append(VideoGate(f"{request.name}: {name}", self.backend.name, value, least))

        decoded = self.execute("decoder", {"latents": latents}, self.dims(request))["video"]
        expected = self.truth.run("decoder", {"latents": truth})["video"]
        gate("finite share", torch.isfinite(decoded).double().mean().item(), 1.0)
        gate("contrast, of the oracle's", decoded.std().item() / expected.std().item(), 0.9)
        if decoded.shape[1] > 1:
            gate("motion, of the oracle's", _motion(decoded) / _motion(expected), 0.9)
        if FRAMES in self.manifest.graphs:
            frames = self.execute(FRAMES, {"video": decoded}, self.dims(request))["frames"].numpy()
            gate("8-bit frames as by numpy, share", float((frames == frames_from_video(decoded.numpy())).mean()), SAME)
        reduced = self.manifest.graphs["decoder"].reduced
        if reduced is not None:
            session = reduced_session(self.bundle.reduced_file("decoder"), reduced.precision)
            (found,) = session.run(None, {"latents": latents.numpy()})
            right = self.truth.run("decoder", {"latents": latents.to(truth.dtype)})["video"]
            gate(f"decoder in {reduced.precision}, dB", psnr(found, right.numpy()), LEAST_PSNR)
        mask = request.inputs.frame_mask
        if mask.any():
            equal = (latents[mask] == request.inputs.clean[mask]).double().mean().item()
            gate("given frames bit-equal, share", equal, 1.0)


def _motion(video: Tensor) -> float:
    return video.diff(dim=1).abs().mean().item()


def climb(subject: Subject, backends: Sequence[str], steps: int, progress: Progress = unheard) -> ParityReport:
    """Run the ladder for each of ``backends``.

    It goes along the requests of :func:`~stiv_deploy.export.parity.requests.parity_requests`, of so many ``steps``.
    """
    bundle, checkpoint = subject.bundle, subject.checkpoint
    requests = parity_requests(bundle.manifest, checkpoint, steps)
    sides = sides_of(subject)
    graphs = bundle.manifest.graphs.keys() - {FRAMES}  # whose row is the clip's
    # A skipped step's velocity hangs on those before it: it has no row of its own.
    whole = sum(not each.settings.skipped_steps for each in requests)
    news = News(progress, len(requests) + len(backends) * (len(graphs) + whole + len(requests)))
    walks = [walk(sides.truth, request, news) for request in requests]
    ladders = []
    for name in backends:
        with open_backend(name, bundle, quarantined=True) as backend:
            ladder = Ladder(backend, subject.bundle, sides, news)
            ladder.graphs(requests[-1])
            for each in walks:
                if not each.request.settings.skipped_steps:
                    ladder.trajectory(each)
            for each in walks:
                ladder.free_run(each)
        ladders.append(ladder)
    return ParityReport(
        rows=tuple(row for ladder in ladders for row in ladder.rows),
        yardsticks=tuple(value for ladder in ladders for value in ladder.yardsticks),
        video=tuple(gate for ladder in ladders for gate in ladder.video),
    )
