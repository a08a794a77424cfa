"""The parity ladder: op -> block -> one step -> teacher-forced trajectory -> free run, and gates on the video itself.

The truth is the reference in fp64. The yardstick is the reference in the bundle's own precision: what plain PyTorch
loses there is what nobody can ask a backend not to lose. Gates (relative L2 error against the truth):

- op and block: 2 x yardstick + 4 units of rounding, and in float32 never looser than 1e-5;
- step and teacher-forced (each step from the oracle's latents): the same rule, in float32 never looser than 1e-4;
- free run: 4 x yardstick + 4 units of rounding, because both errors are amplified by the same trajectory but start from
  different roundings.

The float32 caps are the project's promise; the floor covers sums taken in another order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stiv_deploy.export.graphs import torch_dtype
from stiv_deploy.export.oracle import Oracle, Tensors
from stiv_deploy.export.parity_requests import Request, parity_requests
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle import Bundle
from stiv_deploy.runtime.contract import block_names, dimensions, graph_specs
from stiv_deploy.runtime.denoiser import Denoiser
from stiv_deploy.runtime.manifest import ParityRow
from stiv_deploy.runtime.sampler import Sampler
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.sampler import sample

UNIT_ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
FLOAT32_CAPS = {"op": 1e-5, "block": 1e-5, "step": 1e-4, "teacher_forced": 1e-4}
FACTORS = {"op": 2.0, "block": 2.0, "step": 2.0, "teacher_forced": 2.0, "free_run": 4.0}
FLOOR = 4.0

Progress = Callable[[str], None]


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
    """All rows of a run; ``yardsticks`` holds plain PyTorch's error, row by row."""

    rows: tuple[ParityRow, ...]
    yardsticks: tuple[float, ...]
    video: tuple[VideoGate, ...]

    @property
    def passed(self) -> bool:
        """Whether every row and every video gate passed."""
        return all(row.passed for row in self.rows) and all(gate.passed for gate in self.video)


def rel_l2(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error in fp64; NaN anywhere gives NaN, which no gate passes."""
    got, truth = got.double(), truth.double()
    return (torch.linalg.vector_norm(got - truth) / torch.linalg.vector_norm(truth).clamp_min(1e-300)).item()


def gate_of(level: str, precision: str, yardstick: float) -> float:
    """The largest relative L2 error that passes; see the module's text for the rule."""
    derived = FACTORS[level] * yardstick + FLOOR * UNIT_ROUNDING[precision]
    return min(derived, FLOAT32_CAPS.get(level, derived)) if precision == "float32" else derived


class _Ladder:
    """Collects rows for one backend."""

    def __init__(self, backend: Backend, bundle: Bundle, checkpoint: Checkpoint, progress: Progress) -> None:
        self.backend, self.bundle, self.checkpoint, self.progress = backend, bundle, checkpoint, progress
        self.manifest = bundle.manifest
        self.precision = bundle.manifest.precision
        self.truth = Oracle(checkpoint, torch.float64)
        self.plain = Oracle(checkpoint, torch_dtype(self.precision))
        self.rows: list[ParityRow] = []
        self.yardsticks: list[float] = []
        self.video: list[VideoGate] = []

    def add(self, level: str, name: str, got: Tensor, plain: Tensor, truth: Tensor) -> None:
        """Record one comparison."""
        error, yardstick = rel_l2(got, truth), rel_l2(plain, truth)
        gate = gate_of(level, self.precision, yardstick)
        row = ParityRow(
            level=level,
            name=name,
            backend=self.backend.name,
            precision=self.precision,
            rel_l2=error,
            max_abs=(got.double() - truth.double()).abs().max().item(),
            gate=gate,
            passed=error <= gate,
        )
        self.rows.append(row)
        self.yardsticks.append(yardstick)

    def dims(self, request: Request) -> dict[str, int]:
        """Symbol values of ``request``."""
        batch, frames, _, height, width = request.inputs.noise.shape
        model = self.manifest.model
        return dimensions(
            model,
            batch=batch,
            branches=request.branches,
            video_frames=frames * model.temporal_factor,
            height=height * model.spatial_factor,
            width=width * model.spatial_factor,
            text_tokens=request.token_ids.shape[1],
        )

    def execute(self, graph: str, inputs: Mapping[str, Tensor], dims: dict[str, int]) -> Tensors:
        """Run one graph of the bundle on host tensors."""
        spec = graph_specs(self.manifest.model, self.precision)[graph]
        buffers = {}
        for tensor in spec.inputs:
            buffers[tensor.name] = self.backend.empty(tensor.sized(dims), tensor.dtype)
            self.backend.write(buffers[tensor.name], inputs[tensor.name].numpy())
        outputs = {tensor.name: self.backend.empty(tensor.sized(dims), tensor.dtype) for tensor in spec.outputs}
        self.backend.bind(graph, buffers, outputs)()
        return {name: torch.from_numpy(self.backend.read(buffer)) for name, buffer in outputs.items()}

    def graphs(self, request: Request) -> None:
        """Levels op and block: every graph alone, on inputs that the oracle really feeds it half-way through a run."""
        dims = self.dims(request)
        for graph, inputs in probe(self.truth, request, self.manifest.model.blocks):
            self.progress(f"{self.backend.name}: {graph}")
            given = self.as_given(graph, inputs)
            truth, plain = self.truth.run(graph, given), self.plain.run(graph, given)
            level = "block" if graph.startswith("block_") else "op"
            for name, got in self.execute(graph, given, dims).items():
                label = graph if level == "block" else f"{graph}.{name}"
                self.add(level, label, got, plain[name], truth[name])

    def as_given(self, graph: str, inputs: Mapping[str, Tensor]) -> Tensors:
        """``inputs`` rounded to the types of the contract, which all three sides then start from."""
        spec = graph_specs(self.manifest.model, self.precision)[graph]
        types = {tensor.name: getattr(torch, tensor.dtype) for tensor in spec.inputs}
        return {name: inputs[name].to(dtype).contiguous() for name, dtype in types.items()}

    def trajectory(self, request: Request) -> None:
        """Levels step and teacher-forced: each step of the oracle's run, from the oracle's latents.

        The teacher-forced row is the step that comes nearest to its gate.
        """
        records: list[tuple[Tensor, Tensor]] = []
        truth_inputs = self.truth.sampling_inputs(request)
        sample(
            self.truth.boundary, truth_inputs, request.settings, lambda _step, before, v: records.append((before, v))
        )
        runner = TeacherForced(self.backend, self.bundle, self.dims(request), request)
        plain_inputs = self.plain.sampling_inputs(request)
        times = request.times()
        worst: tuple[float, Tensor, Tensor, Tensor] | None = None
        for step, (before, truth) in enumerate(records):
            self.progress(f"{self.backend.name}: {request.name}, step {step + 1} of {len(records)}")
            latents = before.float()
            got = runner.velocity(latents, step)
            plain = self.plain.guided_velocity(latents, plain_inputs, request.settings, times[step])
            if step == 0:
                self.add("step", request.name, got, plain, truth)
            gate = gate_of("teacher_forced", self.precision, rel_l2(plain, truth))
            share = rel_l2(got, truth) / gate
            if worst is None or not share <= worst[0]:
                worst = (share, got, plain, truth)
        assert worst is not None
        self.add("teacher_forced", request.name, *worst[1:])

    def free_run(self, request: Request) -> None:
        """Level free_run: the whole loop by itself; given frames must be bit-equal; then the gates on the video."""
        self.progress(f"{self.backend.name}: {request.name}, free run")
        truth = sample(self.truth.boundary, self.truth.sampling_inputs(request), request.settings)
        plain = sample(self.plain.boundary, self.plain.sampling_inputs(request), request.settings)
        denoiser = prepared_denoiser(self.backend, self.bundle, self.dims(request), request)
        noise, clean, mask = (tensor.numpy() for tensor in request.inputs[:3])
        result = Sampler(denoiser).run(noise, clean, mask, request.runtime_settings())
        latents = torch.from_numpy(result)
        self.add("free_run", request.name, latents, plain, truth)
        self.gate_video(request, latents, truth)

    def gate_video(self, request: Request, latents: Tensor, truth: Tensor) -> None:
        """Finite, not constant, not frozen (against the oracle's clip), and given frames untouched."""

        def gate(name: str, value: float, least: float) -> None:
            self.video.append(VideoGate(f"{request.name}: {name}", self.backend.name, value, least))

        decoded = self.execute("decoder", {"latents": latents}, self.dims(request))["video"]
        expected = self.truth.run("decoder", {"latents": truth})["video"]
        gate("finite share", torch.isfinite(decoded).double().mean().item(), 1.0)
        gate("contrast, of the oracle's", decoded.std().item() / expected.std().item(), 0.9)
        if decoded.shape[1] > 1:
            gate("motion, of the oracle's", _motion(decoded) / _motion(expected), 0.9)
        mask = request.inputs.frame_mask
        if mask.any():
            equal = (latents[mask] == request.inputs.clean[mask]).double().mean().item()
            gate("given frames bit-equal, share", equal, 1.0)


def _motion(video: Tensor) -> float:
    return video.diff(dim=1).abs().mean().item()


def probe(oracle: Oracle, request: Request, blocks: int) -> Iterator[tuple[str, Tensors]]:
    """Every graph of the contract with its inputs as they are half-way through ``request``, computed by ``oracle``."""
    inputs = oracle.sampling_inputs(request)
    clean, noise, mask = inputs.clean, inputs.noise, inputs.frame_mask
    count, half = request.branches, 0.5
    tokens: Tensors = {"token_ids": request.token_ids, "token_mask": request.token_mask}
    yield "text_encoder", tokens
    text = oracle.run("text_encoder", tokens)
    yield "text_kv", text
    kv = oracle.run("text_kv", text)
    yield "image_encoder", {"video": request.video}
    latents = half * oracle.run("image_encoder", {"video": request.video})["latents"] + half * noise
    model_input = latents.repeat(count, 1, 1, 1, 1)
    timestep = torch.full((len(model_input),), half, dtype=torch.float64)
    embed = {
        "model_input": model_input,
        "timestep": timestep,
        "micro": inputs.micro.repeat(count, 1),
        "pooled": text["pooled"],
        **oracle.rope(latents),
    }
    yield "embed", embed
    state = oracle.run("embed", embed)
    fixed = {"modulation": state["modulation"], "text_mask": request.text_mask(), **oracle.rope(latents)}
    x = state["x"]
    for index, name in enumerate(block_names(blocks)):
        given = {"x": x, **fixed, "text_k": kv["text_k"][index], "text_v": kv["text_v"][index]}
        yield name, given
        x = oracle.run(name, given)["x_out"]
    head = {"x": x, "condition": state["condition"], "model_input": model_input}
    yield "head", head
    velocity = oracle.run("head", head)["velocity"]
    yield (
        "step",
        {
            "velocity": velocity.unflatten(0, (count, -1)),
            "latents": latents,
            "clean": clean,
            "noise": noise,
            "frame_mask": mask,
            "branch_mask": request.branch_mask(),
            "branch_weights": request.branch_weights(),
            "previous_velocity": torch.zeros_like(noise),
            "solver_weights": torch.tensor([1.0, 0.0]),
            "dt": torch.tensor([0.1]),
            "next_timestep": torch.tensor([0.6]),
            "renorm": torch.tensor([1.0]),
        },
    )
    yield "decoder", {"latents": latents}


def prepared_denoiser(backend: Backend, bundle: Bundle, dims: dict[str, int], request: Request) -> Denoiser:
    """A denoiser that holds the text and micro-conditions of ``request``."""
    denoiser = Denoiser(backend, bundle.manifest, dims)
    denoiser.set_text(request.token_ids.numpy(), request.token_mask.numpy())
    denoiser.set_micro(request.inputs.micro.repeat(request.branches, 1).numpy())
    return denoiser


class TeacherForced:
    """Guided velocity of the bundle at latents that someone else gives: one model call and one ``step``."""

    def __init__(self, backend: Backend, bundle: Bundle, dims: dict[str, int], request: Request) -> None:
        self.backend = backend
        self.times = request.times()
        self.denoiser = prepared_denoiser(backend, bundle, dims, request)
        spec = self.denoiser.specs["step"]
        tensors = (*spec.inputs, *spec.outputs)
        self.buffers = {tensor.name: backend.empty(tensor.sized(dims), tensor.dtype) for tensor in tensors}
        shape = self.buffers["velocity"].shape
        self.buffers["velocity"] = self.denoiser.velocity.reshape(*shape)
        self.buffers["next_model_input"] = self.denoiser.model_input.reshape(*shape)
        self.step = self.denoiser.bind("step", **self.buffers)
        self._write(
            clean=request.inputs.clean,
            noise=request.inputs.noise,
            frame_mask=request.inputs.frame_mask,
            branch_mask=request.branch_mask(),
            branch_weights=request.branch_weights(),
            previous_velocity=torch.zeros(self.buffers["latents"].shape),
            solver_weights=torch.tensor([1.0, 0.0]),
            renorm=torch.tensor([float(request.settings.renorm)]),
            dt=torch.zeros(1),
        )

    def _write(self, **tensors: Tensor) -> None:
        for name, tensor in tensors.items():
            self.backend.write(self.buffers[name], tensor.contiguous().numpy())

    def velocity(self, latents: Tensor, step: int) -> Tensor:
        """Guided velocity [B, T, C, h, w] at ``latents`` and time ``step`` of the schedule."""
        time = torch.tensor([self.times[step]], dtype=torch.float32)
        zeros = torch.zeros(self.buffers["velocity"].shape)
        self._write(latents=latents, next_timestep=time, velocity=zeros)
        self.step()  # dt = 0: makes the model input
        self.backend.write(self.denoiser.timestep, time.repeat(self.denoiser.dims["model_batch"]).numpy())
        self.denoiser()
        self.step()
        return torch.from_numpy(self.backend.read(self.buffers["guided_velocity"]))


def run_parity(
    bundle: Bundle, checkpoint: Checkpoint, backends: Sequence[str], steps: int, progress: Progress
) -> ParityReport:
    """Run the ladder for each of ``backends``, on a T2V and a TI2V request with JIT-CFG and a TI2V one with SIT-CFG."""
    requests = parity_requests(bundle.manifest, checkpoint, steps)
    rows: list[ParityRow] = []
    yardsticks: list[float] = []
    video: list[VideoGate] = []
    for name in backends:
        with open_backend(name, bundle) as backend:
            ladder = _Ladder(backend, bundle, checkpoint, progress)
            ladder.graphs(requests[-1])
            for request in requests:
                ladder.trajectory(request)
            for request in requests:
                ladder.free_run(request)
        rows += ladder.rows
        yardsticks += ladder.yardsticks
        video += ladder.video
    return ParityReport(tuple(rows), tuple(yardsticks), tuple(video))
