"""Golden answers of the sampling loop: short runs of the reference's own sampler in float64, on samples drawn anew.

They speak of what is between the graphs. Where a run is forced, each of its steps has an error of its own, and the gate
is that of a step in the parity ladder: twice what plain PyTorch loses in the bundle's precision, at the step where it
loses most, and 4 units of rounding. Where it goes on from what it has made, the gate is that of a free run: four times.
In 8 bits gates follow from draws, as those of graphs do (:mod:`~stiv_deploy.export.graphs.draws`).

Blocks of a large model are taken one after another, so that memory holds one of them in float64.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stiv_deploy.export.graphs.draws import DRAWS, UNIT_ROUNDING, WIGGLE, quantized_gate, rel_l2
from stiv_deploy.export.graphs.reference import Boundary, in_turn
from stiv_deploy.export.graphs.writer import GraphWriter, in_precision
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, ModelFacts, Student
from stiv_deploy.runtime.bundle.golden import RunAnswer, RunAnswers, RunSettings, Sizes, answer, inputs_of, latents_of
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.runtime.bundle.sketch import seed_of, uniform
from stiv_deploy.runtime.sampling.golden_samples import golden_sample, teacher
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.text_stage import Tokens
from stiv_deploy.stiv_ref.conditioning import noise_frames, replace_frames
from stiv_deploy.stiv_ref.guidance import GuidanceMode, Unseen
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, guided_velocity, sample
from stiv_deploy.stiv_ref.text import TextStates

STEP_FACTOR, RUN_FACTOR, FLOOR = 2.0, 4.0, 4.0
LEAST_FRAMES = 3
"""Latent frames that runs have where the bucket allows: a given one, one beside it, and one more."""
SIDE_BY_SIDE = 2
"""Runs that go at once where the bucket allows."""
RUNS: Mapping[str, RunSettings] = {
    "without guidance": RunSettings(steps=1, guidance_mode="none"),
    "sit by heun": RunSettings(steps=2, guidance_mode="sit", renorm=False, solver="heun", unseen="zero", given=(1,)),
    "forced jit": RunSettings(
        steps=3, guidance_mode="jit", guidance_until=0.4, time_shift=2.0, given=(0,), forced=True
    ),
    "jit by ab2": RunSettings(steps=3, guidance_mode="jit", solver="ab2", guidance_from=0.2, given=(0,)),
}
"""Each guidance mode, each solver, both ways not to see a given frame, rows that come and rows that leave.

The first ends early, so that a row of the second takes its place and goes on there.
"""
SEES = {GuidanceMode.NONE: (True,), GuidanceMode.JIT: (True, False), GuidanceMode.SIT: (True, True, False)}
"""Which branches see given frames, in the order of their rows."""
Outputs = dict[str, Tensor]


def runs_of(student: Student | None) -> Mapping[str, RunSettings]:
    """:data:`RUNS`; of a student runs in one row, by each solver, at its least and its greatest scale."""
    if student is None:
        return RUNS
    least, greatest = student.guidance
    if student.flow_map:
        return {
            "flow map": RunSettings(steps=1, guidance_mode="none", guidance_scale=least),
            "flow map, shifted": RunSettings(
                steps=3, guidance_mode="none", guidance_scale=greatest, time_shift=2.0, given=(1,)
            ),
            "forced flow map": RunSettings(
                steps=3, guidance_mode="none", guidance_scale=least, given=(0,), forced=True
            ),
        }
    return {
        "student by euler": RunSettings(steps=1, guidance_mode="none", guidance_scale=least),
        "student by heun": RunSettings(steps=2, guidance_mode="none", guidance_scale=greatest, solver="heun"),
        "forced student": RunSettings(
            steps=3, guidance_mode="none", guidance_scale=greatest, time_shift=2.0, given=(0,), forced=True
        ),
        "student by ab2": RunSettings(steps=3, guidance_mode="none", guidance_scale=least, solver="ab2", given=(0,)),
    }


def run_answers(writer: GraphWriter, bucket: Bucket, simulated: "Simulated | None") -> RunAnswers:
    """The answers of :func:`runs_of` at the smallest sizes of ``bucket``; ``simulated`` where layers are in 8 bits."""
    sizes = run_sizes(bucket, writer.facts)
    frames = writer.facts.latent_frames(sizes.video_frames)
    outputs_of = _exact(writer) if simulated is None else _simulated(writer, simulated)
    runs = []
    for name, settings in runs_of(writer.facts.student).items():
        own = settings if frames > max(settings.given, default=0) + 1 else settings.model_copy(update={"given": ()})
        drawn = golden_sample(name, own, sizes, writer.facts, writer.checkpoint.config.text.vocabulary)
        outputs, gates = outputs_of(Clip(name, own, drawn))
        answers = tuple(answer(each, truth[0].numpy(), gates[each]) for each, truth in outputs.items())
        runs.append(RunAnswer(name=name, settings=own, outputs=answers))
    return RunAnswers(size=f"smallest of bucket {bucket.name}", sizes=sizes, runs=tuple(runs))


def run_sizes(bucket: Bucket, facts: ModelFacts) -> Sizes:
    """Small, not square, with :data:`LEAST_FRAMES` latent frames and :data:`SIDE_BY_SIDE` clips; if there is room."""
    first, last = (
        (end + facts.frame_padding) // facts.frame_multiple for end in (bucket.frames.min, bucket.frames.max)
    )
    units = min(max(first, -(-LEAST_FRAMES // facts.patch[0])), last)
    batch = max(bucket.batch.min, min(SIDE_BY_SIDE, bucket.batch.max))
    return Sizes(
        batch=batch,
        model_batch=batch * SAMPLE_ROWS,
        video_frames=units * facts.frame_multiple - facts.frame_padding,
        height=bucket.height.min,
        width=_other(bucket.width, bucket.height.min, facts.pixel_multiple),
        text_tokens=facts.max_text_tokens,
    )


def _other(allowed: Range, than: int, multiple: int) -> int:
    """The smallest size of ``allowed`` that is another one, where there is one."""
    return min(allowed.min + (allowed.min == than) * multiple, allowed.max)


@dataclass(frozen=True)
class Clip:
    """A run and its sample."""

    name: str
    settings: RunSettings
    drawn: Sample

    @property
    def sampling(self) -> SamplingSettings:
        """The reference's own form of the settings."""
        values = self.settings.model_dump(exclude={"given", "forced"})
        own = {
            "guidance_mode": GuidanceMode(self.settings.guidance_mode),
            "solver": Solver(self.settings.solver),
            "unseen": Unseen(self.settings.unseen),
        }
        return SamplingSettings(**values | own)


Encode = Callable[[Tokens], TextStates]
Change = Callable[[Tensor, str], Tensor]
"""Latents [1, ...] by a name, as another implementation has them [B, ...]."""


class Reference(NamedTuple):
    """A model with its text encoder, and the type of its latents."""

    model: Any
    encode: Encode
    dtype: torch.dtype


class Simulated(NamedTuple):
    """The fake-quantized model: in the bundle's precision, and in float32 on the same grid."""

    plain: Boundary
    wide: Boundary


def _same(value: Tensor, _name: str) -> Tensor:
    return value


Judge = Callable[[Clip], tuple[Outputs, dict[str, float]]]
"""What is right for a clip, and the gate of each output."""


def _exact(writer: GraphWriter) -> Judge:
    truth_of, plain_of = (
        Reference(
            in_turn(writer.checkpoint.model, dtype), encoder(writer, dtype), torch.promote_types(dtype, torch.float32)
        )
        for dtype in (torch.float64, writer.dtype)
    )
    unit = UNIT_ROUNDING[_name(writer.dtype)]

    def judged(clip: Clip) -> tuple[Outputs, dict[str, float]]:
        factor = STEP_FACTOR if clip.settings.forced else RUN_FACTOR
        truth, plain = played(truth_of, clip), played(plain_of, clip)
        return truth, _by_kind({name: factor * rel_l2(plain[name], truth[name]) + FLOOR * unit for name in truth})

    return judged


def _simulated(writer: GraphWriter, simulated: Simulated) -> Judge:
    """What the fake-quantized reference gives in float32, and gates from the distances of other draws to it."""
    precision = _name(writer.dtype)
    wide = Reference(simulated.wide, encoder(writer, torch.float32), torch.float32)
    plain = Reference(simulated.plain, encoder(writer, writer.dtype), torch.float32)

    def moved(value: Tensor, name: str) -> Tensor:
        changes = (2 * uniform(tuple(value.shape), seed_of("wiggle", name, seed)) - 1 for seed in range(1, DRAWS))
        found = (value.double() * (1 + WIGGLE[precision] * torch.from_numpy(change)) for change in changes)
        return torch.cat(list(found)).to(value.dtype)

    def judged(clip: Clip) -> tuple[Outputs, dict[str, float]]:
        truth, first, others = played(wide, clip), played(plain, clip), played(wide, clip, moved)
        gates = {}
        for name, right in truth.items():
            known = answer(name, right[0].numpy(), 1.0)
            draws = (*first[name], *others[name])
            gates[name] = quantized_gate(precision, [known.error(each.numpy()) for each in draws])
        return truth, _by_kind(gates)

    return judged


def _by_kind(gates: Mapping[str, float]) -> dict[str, float]:
    """The largest gate of all latents, and that of all inputs, for each of them."""
    kinds = {name: name.partition(" ")[0] for name in gates}
    return {name: max(gates[each] for each in gates if kinds[each] == kinds[name]) for name in gates}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def encoder(writer: GraphWriter, dtype: torch.dtype) -> Encode:
    """Encodes one prompt in ``dtype``; in the bundle's own precision as its graph does."""
    graph = (
        writer.plain("text_encoder") if dtype == writer.dtype else in_precision(writer.modules["text_encoder"], dtype)
    )

    @torch.no_grad()
    def encode(tokens: Tokens) -> TextStates:
        ids, mask = (torch.from_numpy(each)[None] for each in tokens)
        states, pooled = graph(ids, mask)
        return TextStates(states.to(dtype), mask, pooled.to(dtype))

    return encode


def played(reference: Reference, clip: Clip, change: Change = _same) -> Outputs:
    """What ``clip`` gives, [B, ...] by the names of its outputs, with the latents that it is given as ``change`` is."""
    inputs = _inputs(reference, clip, change)
    settings = clip.sampling
    times = settings.times()[1:]
    outputs: Outputs = {}
    for step, (latents, time) in enumerate(zip(_steps(reference, inputs, clip, change), times, strict=True), 1):
        outputs[latents_of(step)] = latents
        if step < settings.steps:
            outputs[inputs_of(step)] = _seen(latents, inputs, settings, time)
    return outputs


def _inputs(reference: Reference, clip: Clip, change: Change) -> SamplingInputs:
    drawn, dtype = clip.drawn, reference.dtype
    noise = change(_tensor(drawn.noise, dtype), f"{clip.name} noise")

    def each(value: Tensor) -> Tensor:
        return value.expand(len(noise), *value.shape[1:])

    text, null = (
        TextStates(*(each(part) for part in reference.encode(tokens))) for tokens in (drawn.text, drawn.negative)
    )
    mask = torch.from_numpy(drawn.frame_mask)[None]
    clean, micro = _tensor(drawn.clean, dtype), _tensor(drawn.micro, dtype)
    return SamplingInputs(noise, each(clean), each(mask), text, null, each(micro))


def _tensor(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(values).to(dtype)[None]


def _steps(reference: Reference, inputs: SamplingInputs, clip: Clip, change: Change) -> Sequence[Tensor]:
    """Latents after each step."""
    if clip.settings.forced:
        return list(_forced(reference, inputs, clip, change))
    before: list[Tensor] = []

    def keep(_step: int, latents: Tensor, _velocity: Tensor) -> None:
        before.append(latents)

    last = sample(reference.model, inputs, clip.sampling, keep)
    return [*before[1:], last]


def _forced(reference: Reference, inputs: SamplingInputs, clip: Clip, change: Change) -> Iterator[Tensor]:
    """Steps of Euler, each from a teacher's latents."""
    settings, clean, mask = clip.sampling, inputs.clean, inputs.frame_mask
    velocity = guided_velocity(reference.model, inputs, settings)
    latents = replace_frames(inputs.noise, clean, mask)
    times = settings.times()
    for step, (time, following) in enumerate(pairwise(times), 1):
        yield replace_frames(latents + (following - time) * velocity(latents, time, following), clean, mask)
        given = _tensor(teacher(clip.name, step, clip.drawn.noise.shape), reference.dtype)
        latents = replace_frames(change(given, f"{clip.name} teacher {step}"), clean, mask)


def _seen(latents: Tensor, inputs: SamplingInputs, settings: SamplingSettings, time: float) -> Tensor:
    """What the rows see at ``time``, [B, rows, T, C, h, w]."""
    clean, mask = inputs.clean, inputs.frame_mask
    if settings.unseen is Unseen.ZERO:
        hidden = replace_frames(latents, torch.zeros_like(clean), mask)
    else:
        hidden = noise_frames(latents, clean, inputs.noise, latents.new_full((len(latents),), time), mask)
    sees = SEES[settings.guidance_mode if settings.guides(time) else GuidanceMode.NONE]
    return torch.stack([latents if each else hidden for each in sees], dim=1)
