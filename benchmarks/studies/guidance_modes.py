"""JIT-CFG against SIT-CFG over scales, image-to-video with the shipped checkpoint. Sampling only.

    python benchmarks/studies/guidance_modes.py [--smallest] [--seeds 0,1,2]

A seed is a seed of the noise and another draw of test clips. SIT-CFG with equal scales is JIT-CFG, and without an image
its middle branch is its last: only unequal scales and image-to-video have anything to ask.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import above  # noqa: F401  # isort: split
import command
import torch
import typer
from evaluation import Trial, clips_for, generate, scores, validation
from harness import CHECKPOINT, Frozen, frozen_hash, frozen_parts
from records import WORK, part, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table

from stiv_deploy.stiv_ref.checkpoint import load_checkpoint
from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
PASSES = {GuidanceMode.NONE: 1, GuidanceMode.JIT: 2, GuidanceMode.SIT: 3}
TEXT_SCALES = (1.5, 2.0, 4.0, 7.5)
IMAGE_SCALES = (1.0, 1.5, 4.0)
STRONG_IMAGE_TEXT = 2.0  # the one text scale that is tried with an image scale above it


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """One guidance: its mode and scales."""

    mode: GuidanceMode
    text: float = 1.0
    image: float = 1.0
    renorm: bool = True

    @property
    def name(self) -> str:
        """A short name, such as ``jit 2`` or ``sit 4, image 1.5``."""
        scales = {"none": "", "jit": f" {self.text:g}", "sit": f" {self.text:g}, image {self.image:g}"}[self.mode.value]
        return f"{self.mode.value}{scales}{'' if self.renorm else ' no renorm'}"

    def settings(self, steps: int) -> SamplingSettings:
        """For the reference sampler."""
        return SamplingSettings(
            steps=steps, guidance_mode=self.mode, guidance_scale=self.text, image_scale=self.image, renorm=self.renorm
        )


def guidances(scales: tuple[float, ...]) -> list[Guidance]:
    """None, JIT-CFG at every scale, and SIT-CFG at every text scale with image scales up to it, and one above."""
    jit = [Guidance(mode=GuidanceMode.JIT, text=scale) for scale in scales]
    sit = [
        Guidance(mode=GuidanceMode.SIT, text=scale, image=image)
        for image in IMAGE_SCALES
        for scale in scales
        if scale != image and (image < scale or scale == STRONG_IMAGE_TEXT)
    ]
    return [Guidance(mode=GuidanceMode.NONE), *jit, *sit]


def shipped_model() -> Stiv:
    """The transformer of the shipped checkpoint."""
    return load_checkpoint(CHECKPOINT).model


def measure(
    model: Stiv, frozen: Frozen, guidance: Guidance, seed: int, trial: Trial, folder: Path, *, image: bool = True
) -> Result:
    """Scores of one guidance and seed, kept in ``folder``; also the norm of the latents over that of real ones."""

    def make() -> Result:
        clips = clips_for(trial.clips, seed)
        video, latents = generate(model, frozen, clips, guidance.settings(trial.steps), trial, seed, image=image)
        with torch.no_grad():
            real = frozen.vae.encode(clips.video)
        norm = float(latents[:, 1:].norm() / real[:, 1:].norm())
        return scores(video, clips, image=image) | {"latent_norm": norm}

    name = f"{'ti2v' if image else 't2v'} {guidance.name} {seed}".replace(",", "").replace(" ", "-")
    return part(folder, name, (frozen_hash(), guidance, trial, image, seed), make)


def rest(row: Result) -> float:
    """Mean PSNR of the frames after the first."""
    return sum(row["psnr"][1:]) / len(row["psnr"][1:])


def line(guidance: Guidance, rows: list[Result]) -> list[str]:
    """A table row."""
    cells = [guidance.name, str(PASSES[guidance.mode])]
    cells += [shown([row[key] for row in rows]) for key in ("digit", "direction", "motion")]
    return [*cells, shown([row["psnr"][0] for row in rows], 2), shown([rest(row) for row in rows], 2)]


def comparisons(rows: dict[str, list[Result]], scales: tuple[float, ...]) -> list[Comparison]:
    """JIT minus SIT at equal text scales."""
    found = []
    for scale in scales:
        jit = rows[f"jit {scale:g}"]
        for image in IMAGE_SCALES:
            sit = rows.get(f"sit {scale:g}, image {image:g}")
            if sit:
                what = f"JIT {scale:g} minus SIT {scale:g}, image {image:g}"
                found.append(
                    Comparison(
                        what=f"{what}: PSNR of later frames",
                        first=[*map(rest, jit)],
                        second=[*map(rest, sit)],
                        unit="dB",
                        digits=2,
                    )
                )
                found.append(
                    Comparison(
                        what=f"{what}: motion",
                        first=[r["motion"] for r in jit],
                        second=[r["motion"] for r in sit],
                        unit="points of real speed",
                    )
                )
    return found


def draw(figure: "Figure", rows: dict[str, list[Result]], scales: tuple[float, ...]) -> None:
    """Later-frame PSNR, motion and digit accuracy over the text scale."""
    kinds = {"JIT (2 passes)": "jit {:g}"} | {
        f"SIT, image {i:g} (3 passes)": f"sit {{:g}}, image {i:g}" for i in IMAGE_SCALES
    }
    panels = (
        ("PSNR of later frames [dB]", rest),
        ("motion [% of real]", lambda row: row["motion"]),
        ("digit right [%]", lambda row: row["digit"]),
    )
    for axes, (title, value) in zip(figure.subplots(1, 3), panels, strict=True):
        for label, pattern in kinds.items():
            known = [scale for scale in scales if pattern.format(scale) in rows]
            columns = [[value(row) for row in rows[pattern.format(scale)]] for scale in known]
            band(axes, known, list(zip(*columns, strict=True)), label=label)
        none = [value(row) for row in rows["none"]]
        axes.axhline(sum(none) / len(none), color="#888888", linewidth=1, linestyle="--", label="no guidance (1 pass)")
        axes.set(title=title, xlabel="text scale")
        axes.grid(linewidth=0.3)


def main(smallest: Smallest = False, seeds: Seeds = "0,1,2", out: Out = None, work: Work = WORK) -> None:
    """Compare the two ways of guidance."""
    torch.set_num_threads(1)
    trial = Trial(clips=2, steps=2) if smallest else Trial(clips=20, steps=20, batch=20)
    scales = (2.0,) if smallest else TEXT_SCALES
    numbers = seeds_of("0" if smallest else seeds)
    model, frozen = shipped_model(), frozen_parts()
    asked = guidances(scales)
    rows: dict[str, list[Result]] = {one.name: [] for one in asked}
    for seed in numbers:
        for one in asked:
            rows[one.name].append(measure(model, frozen, one, seed, trial, work / "guidance"))
            typer.echo(f"seed {seed} {one.name}: {rows[one.name][-1]}", err=True)
    real = [validation(frozen, seed, trial) for seed in numbers]
    head = [
        "guidance",
        "passes a step",
        "digit %",
        "direction %",
        "motion %",
        "first frame PSNR dB",
        "later frames PSNR dB",
    ]
    lines = [line(one, rows[one.name]) for one in asked]
    lines.append(["*real clips through the VAE*", "", *line(asked[0], real)[2:]])
    report = Report(
        title="JIT-CFG against SIT-CFG",
        question="Is joint guidance (two passes, one scale) as good as separate guidance (three passes, two scales)?",
        setup=(
            f"Sampling only, checkpoint {frozen_hash()} (`checkpoints/tiny`), image-to-video, {trial.clips} test clips "
            f"a seed, {trial.steps} Euler steps, CFG-Renorm on. Every guidance gets the same clips and noise."
        ),
        paper=(
            "FVD on MSRVTT (section 3.4.2): JIT-CFG at 7.5 has 94.1; SIT-CFG over 5 text and 5 image scales from 1.1 "
            "to 10.5 has 95.2 at best (text 7.5, image 1.5), and gets much worse with larger image scales. Prompts "
            "that lean on the first frame may want one."
        ),
        tables=table(head, lines),
        comparisons=comparisons(rows, scales),
        data={"rows": rows, "real": real},
        seeds=numbers,
    )
    typer.echo(save(report, out or default_out("guidance-modes"), lambda figure: draw(figure, rows, scales), (11, 3.4)))


if __name__ == "__main__":
    command.run(main)
