"""The requests that the parity ladder runs: real prompts, and a first frame of the kind the model was trained on."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, Student, late_inputs
from stiv_deploy.runtime.bundle.manifest import Manifest
from stiv_deploy.runtime.sampling.guidance import BRANCHES
from stiv_deploy.runtime.sampling.guidance import GuidanceMode as RuntimeMode
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.settings import SamplingSettings as RuntimeSettings
from stiv_deploy.runtime.sampling.settings import Solver as RuntimeSolver
from stiv_deploy.runtime.sampling.skipping import KNOWN
from stiv_deploy.runtime.sampling.text_stage import Tokens
from stiv_deploy.stiv_ref.block import additive_mask
from stiv_deploy.stiv_ref.checkpoint import Checkpoint
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver
from stiv_deploy.stiv_ref.text import UNKNOWN, TextStates, tokenize

PROMPTS = (
    ("a red star moving left", "the big blue ring is going down"),
    ("digit three moving left", "digit seven moving down"),
)
"""Pairs in the words of the world and of the moving digits; a checkpoint is asked the one that it understands best."""
UNEQUAL_SHIFT = 3.0
"""Time shift at which a step is some 1.3 times the one before, so that AB2 weighs every step otherwise."""
STRETCH = 2.0
"""How much longer late steps are in the same request."""
WEIGHT = -0.8
"""AB2's weight of the velocity before in the first step of the same request, and a fifth less in each that follows."""
FROM, UNTIL = 0.1, 0.6
"""The guidance interval of two requests: rows join their clips on the way, and leave them again."""
NULL = {GuidanceMode.NONE: 0, GuidanceMode.JIT: 1, GuidanceMode.SIT: 2}
"""How many branches see the empty prompt."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request of the ladder: one sample, on the host, fp32.

    ``token_ids`` and ``token_mask`` int64 [G, L] hold all guidance branches, each a row of the model; ``inputs.text``
    is not filled: each oracle encodes the tokens itself. ``video`` [1, F, 3, H, W] is the clip whose first frame is
    given. ``student`` is what the model has instead of guidance branches.
    """

    name: str
    settings: SamplingSettings
    inputs: SamplingInputs
    token_ids: Tensor
    token_mask: Tensor
    video: Tensor
    student: Student | None = None

    @property
    def branches(self) -> int:
        """Number of guidance branches."""
        return 1 + NULL[self.settings.guidance_mode]

    def times(self) -> list[float]:
        """Sampling times."""
        return self.settings.times()

    def timed(self, time: float, target: float) -> dict[str, Tensor]:
        """Inputs of the ``embed`` graph for a step from ``time`` to ``target``: fp64 [G] each, those of the model."""
        known = {"timestep": time, "guidance": self.settings.guidance_scale, "target_time": target}
        wanted = ("timestep", *late_inputs(self.student))
        return {name: torch.full((self.branches,), known[name], dtype=torch.float64) for name in wanted}

    def text_mask(self) -> Tensor:
        """Additive text mask [G, 1, 1, L]."""
        return additive_mask(self.token_mask)

    def weight_inputs(self, time: float) -> dict[str, Tensor]:
        """Inputs of the ``step`` graph that say how the rows weigh at ``time``: the conditional one alone, unguided."""
        guided = self.settings.guides(time)
        weights = torch.zeros(1, SAMPLE_ROWS)
        weights[0, : self.branches] = torch.from_numpy(self.runtime_settings().weights())
        alone = torch.eye(SAMPLE_ROWS)[:1]
        renorm = torch.tensor([float(guided and self.settings.renorm)])
        return {"row_weights": weights if guided else alone, "renorm": renorm}

    def guidance_inputs(self) -> dict[str, Tensor]:
        """Inputs of the ``step`` graph that say which rows of the model are the one sample's, and what they see."""
        branches = BRANCHES[RuntimeMode(self.settings.guidance_mode.value)]
        mask = self.inputs.frame_mask[0]
        return {
            "sample_rows": torch.arange(SAMPLE_ROWS).where(torch.arange(SAMPLE_ROWS) < len(branches), 0)[None],
            "row_sample": torch.zeros(len(branches), dtype=torch.int64),
            "row_mask": torch.stack([mask & branch.image for branch in branches]),
        }

    def sample(self) -> Sample:
        """The same clip for the runtime's engine."""
        noise, clean, mask, micro = (value[0].numpy() for value in (*self.inputs[:3], self.inputs.micro))
        text, negative = (Tokens(self.token_ids[row].numpy(), self.token_mask[row].numpy()) for row in (0, -1))
        return Sample(
            noise=noise,
            clean=clean,
            frame_mask=mask,
            micro=micro,
            text=text,
            negative=negative,
            settings=self.runtime_settings(),
        )

    def runtime_settings(self) -> RuntimeSettings:
        """The same settings for the runtime."""
        settings = self.settings
        return RuntimeSettings(
            steps=settings.steps,
            guidance_mode=RuntimeMode(settings.guidance_mode.value),
            guidance_scale=settings.guidance_scale,
            image_scale=settings.image_scale,
            renorm=settings.renorm,
            solver=RuntimeSolver(settings.solver.value),
            time_shift=settings.time_shift,
            late_stretch=settings.late_stretch,
            solver_weights=settings.solver_weights,
            skipped_steps=settings.skipped_steps,
            guidance_from=settings.guidance_from,
            guidance_until=settings.guidance_until,
        )


def understood(tokenizer: Tokenizer) -> tuple[str, str]:
    """The pair of :data:`PROMPTS` with the fewest unknown words; the first of equals."""

    def unknown(pair: tuple[str, str]) -> int:
        return sum(each.tokens.count(UNKNOWN) for each in tokenizer.encode_batch(list(pair)))

    return min(PROMPTS, key=unknown)


def _moving_square(batch: int, frames: int, height: int, width: int) -> Tensor:
    """A clip [B, F, 3, H, W] in [-1, 1]: a bright square on black that moves one pixel a frame."""
    video = -torch.ones(batch, frames, 3, height, width)
    side = min(height, width) // 3
    for frame in range(frames):
        left = min(frame, width - side)
        video[:, frame, :, side : 2 * side, left : left + side] = 0.8
    return video


def parity_requests(manifest: Manifest, checkpoint: Checkpoint, steps: int) -> list[Request]:
    """T2V with JIT-CFG and Euler's solver, TI2V with JIT-CFG and AB2, T2V with the same, TI2V with SIT-CFG and Heun's.

    Where steps can skip the blocks there is TI2V with JIT-CFG once more, which does. The last two are guided only from
    :data:`FROM` until :data:`UNTIL`: there AB2, which looks back, starts anew twice. A student is asked each solver in
    its one row, at its own scale, its least and its greatest, a flow map by Euler's solver alone. One sample each, at
    the bundle's default size; for an image model the first alone.
    """
    defaults, model = manifest.sampling, manifest.model
    video = _moving_square(1, defaults.frames, defaults.height, defaults.width)
    clean = checkpoint.vae.encode(video)
    generator = torch.Generator().manual_seed(0)
    nothing = TextStates(torch.empty(0), torch.empty(0), torch.empty(0))
    conditions = [defaults.height, defaults.width, 0, 0, defaults.stride, defaults.frames]
    micro = torch.tensor([conditions], dtype=torch.float32)
    settings = SamplingSettings(
        steps=steps,
        guidance_scale=defaults.guidance_scale,
        image_scale=defaults.image_scale,
        time_shift=defaults.time_shift,
        late_stretch=defaults.late_stretch,
    )
    first, second = understood(checkpoint.tokenizer)
    cases = _cases(settings) if model.student is None else _student_cases(settings, model.student)
    if manifest.skips and steps > KNOWN:
        cases.insert(2, _skipping_case(cases[1]))
    requests = []
    for name, given, chosen in cases if model.temporal else cases[:1]:
        prompt = second if given else first
        mask = torch.zeros(clean.shape[:2], dtype=torch.bool)
        mask[:, 0] = given
        ids, token_mask = tokenize(checkpoint.tokenizer, [prompt, *[""] * NULL[chosen.guidance_mode]])
        noise = torch.randn(clean.shape, generator=generator)
        shown = clean if given else torch.zeros_like(clean)
        inputs = SamplingInputs(noise, shown, mask, nothing, nothing, micro)
        requests.append(
            Request(
                name=name,
                settings=chosen,
                inputs=inputs,
                token_ids=ids,
                token_mask=token_mask,
                video=video,
                student=model.student,
            )
        )
    return requests


Case = tuple[str, bool, SamplingSettings]
"""What a request is called, whether its first frame is given, and how it is sampled."""


def _cases(settings: SamplingSettings) -> list[Case]:
    before = [WEIGHT * 0.8**step for step in range(settings.steps - 1)]
    weights = tuple((1.01 - each, each) for each in before)
    grid: dict[str, Any] = {"time_shift": UNEQUAL_SHIFT, "late_stretch": STRETCH, "solver_weights": weights}
    interval: dict[str, Any] = {"guidance_from": FROM, "guidance_until": UNTIL}
    ab2, heun = (replace(settings, solver=solver) for solver in (Solver.AB2, Solver.HEUN))
    return [
        ("t2v jit euler", False, settings),
        ("ti2v jit ab2", True, replace(ab2, **grid)),
        ("t2v jit ab2, interval", False, replace(ab2, **interval)),
        ("ti2v sit heun, interval", True, replace(heun, guidance_mode=GuidanceMode.SIT, **interval)),
    ]


def _skipping_case(case: Case) -> Case:
    """``case`` once more, by AB2's own weights, with every second step skipped."""
    name, given, settings = case
    skipped = tuple(range(KNOWN, settings.steps, 2))
    return f"{name}, skips", given, replace(settings, solver_weights=(), skipped_steps=skipped)


def _student_cases(settings: SamplingSettings, student: Student) -> list[Case]:
    own = replace(settings, guidance_mode=GuidanceMode.NONE)
    least, greatest = (replace(own, guidance_scale=scale) for scale in student.guidance)
    uneven = replace(least, time_shift=UNEQUAL_SHIFT, late_stretch=STRETCH)
    if student.flow_map:
        return [
            ("t2v flow map euler", False, own),
            ("ti2v flow map euler", True, uneven),
            ("ti2v flow map, one step", True, replace(greatest, steps=1)),
        ]
    return [
        ("t2v student euler", False, own),
        ("ti2v student ab2", True, replace(uneven, solver=Solver.AB2)),
        ("ti2v student heun", True, replace(greatest, solver=Solver.HEUN)),
    ]
