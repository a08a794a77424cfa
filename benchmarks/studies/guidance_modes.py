"""JIT-CFG against SIT-CFG over scales, image-to-video with a shipped checkpoint. Sampling only.

    python benchmarks/studies/guidance_modes.py [--smallest] [--ground world] [--seeds 0,1] [--clips 20] [--scales 2,4]

A seed is a seed of the noise and another draw of test clips. SIT-CFG with equal scales is JIT-CFG, and without an image
its middle branch is its last: only unequal scales and image-to-video have anything to ask. In the world clips are also
asked for by captions that contradict the first frame: which of the two does a guidance follow?
"""

from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import above  # noqa: F401  # isort: split
import command
import contradictions
import torch
import typer
from columns import cells, compared, heads
from evaluation import Trial, generate, sampled, trial_on, validation
from ground import Ground, Result, Shape
from grounds import DIGITS, Stand, folder_of
from harness import Frozen, frozen_parts
from records import WORK, part, scales_of, seeds_of, shown
from report import Comparison, Out, Report, Seeds, Smallest, Work, band, default_out, save, table

from stiv_deploy.stiv_ref.guidance import GuidanceMode
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.sampler import SamplingSettings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPS = 20
"""Test clips of a seed."""
PASSES = {GuidanceMode.NONE: 1, GuidanceMode.JIT: 2, GuidanceMode.SIT: 3}
TEXT_SCALES = "1.5,2,4,7.5"
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

    def settings(self, others: SamplingSettings) -> SamplingSettings:
        """For the reference sampler, with the ``others`` as they are."""
        return replace(
            others, guidance_mode=self.mode, guidance_scale=self.text, image_scale=self.image, renorm=self.renorm
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


def measure(
    model: Stiv,
    frozen: Frozen,
    guidance: Guidance,
    seed: int,
    trial: Trial,
    folder: Path,
    shape: Shape,
    *,
    image: bool = True,
) -> Result:
    """Scores of one guidance and seed, kept in ``folder``; also the norm of the latents over that of real ones.

    With ``image``, also what is followed where words contradict it.
    """

    def make() -> Result:
        clips, settings = frozen.ground.clips(trial.clips, seed, shape), guidance.settings(frozen.sampling(trial.steps))
        video, latents = generate(model, frozen, clips, settings, trial, seed, image=image)
        with torch.no_grad():
            real = frozen.vae.encode(clips.video)
        result = clips.scores(video, image=image) | {"latent_norm": float(latents[:, 1:].norm() / real[:, 1:].norm())}
        return result | (contradictions.followed(model, frozen, settings, trial, seed, shape) if image else {})

    name = f"{'ti2v' if image else 't2v'} {guidance.name} {seed}".replace(",", "").replace(" ", "-")
    return part(folder, name, (frozen.hash, guidance, trial, image, seed), make)


def rest(row: Result) -> float:
    """Mean PSNR of the frames after the first."""
    return sum(row["psnr"][1:]) / len(row["psnr"][1:])


def line(ground: Ground, guidance: Guidance, rows: list[Result]) -> list[str]:
    """A table row."""
    psnr = [shown([row["psnr"][0] for row in rows], 2), shown([rest(row) for row in rows], 2)]
    return [guidance.name, str(PASSES[guidance.mode]), *cells(ground, rows), *psnr]


def comparisons(ground: Ground, rows: dict[str, list[Result]], scales: tuple[float, ...]) -> list[Comparison]:
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
                found += compared(what, ground, jit, sit, ground.whole, ground.speed)
                found += contradictions.comparisons(what, jit, sit)
    return found


def draw(figure: "Figure", ground: Ground, rows: dict[str, list[Result]], scales: tuple[float, ...]) -> None:
    """Later-frame PSNR, speed and accuracy over the text scale."""
    kinds = {"JIT (2 passes)": "jit {:g}"} | {
        f"SIT, image {i:g} (3 passes)": f"sit {{:g}}, image {i:g}" for i in IMAGE_SCALES
    }
    panels = {
        "PSNR of later frames [dB]": rest,
        f"{ground.columns[ground.speed]} [% of real]": itemgetter(ground.speed),
        f"{ground.columns[ground.whole]} right [%]": itemgetter(ground.whole),
    }
    if contradictions.KEY in rows["none"][0]:
        panels["follow words, not picture [%]"] = lambda row: row[contradictions.KEY]["words"]
        figure.set_figwidth(figure.get_figwidth() * 4 / 3)
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for label, pattern in kinds.items():
            known = [scale for scale in scales if pattern.format(scale) in rows]
            columns = [[value(row) for row in rows[pattern.format(scale)]] for scale in known]
            band(axes, known, list(zip(*columns, strict=True)), label=label)
        none = [value(row) for row in rows["none"]]
        axes.axhline(sum(none) / len(none), color="#888888", linewidth=1, linestyle="--", label="no guidance (1 pass)")
        axes.set(title=title, xlabel="text scale")
        axes.grid(linewidth=0.3)


def size_note(clips: int, seeds: int) -> str:
    """What a study of so many clips a seed cannot tell."""
    one = f"There are {clips * seeds} clips of each guidance; one of them is {100 / (clips * seeds):.2g} points."
    return f"{one} With one seed nothing here is told from chance." if seeds == 1 else one


def main(
    smallest: Smallest = False,
    ground: Stand = DIGITS,
    seeds: Seeds = "0,1,2",
    clips: Annotated[int, typer.Option(min=1, help="Test clips a seed.")] = CLIPS,
    scales: Annotated[str, typer.Option(help="Text scales, with commas.")] = TEXT_SCALES,
    out: Out = None,
    work: Work = WORK,
) -> None:
    """Compare the two ways of guidance."""
    torch.set_num_threads(1)
    numbers, frozen = seeds_of("0" if smallest else seeds), frozen_parts(ground)
    stand, work = frozen.ground, folder_of(frozen.ground, work)
    trial = trial_on(stand, smallest=smallest, clips=clips)
    text_scales = scales_of("2" if smallest else scales)
    asked = guidances(text_scales)
    rows: dict[str, list[Result]] = {one.name: [] for one in asked}
    for seed in numbers:
        for one in asked:
            found = measure(frozen.checkpoint.model, frozen, one, seed, trial, work / "guidance", stand.shipped)
            rows[one.name].append(found)
            typer.echo(f"seed {seed} {one.name}: {found}", err=True)
    real = [validation(frozen, seed, trial, stand.shipped) for seed in numbers]
    head = ["guidance", "passes a step", *heads(stand), "first frame PSNR dB", "later frames PSNR dB"]
    lines = [line(stand, one, rows[one.name]) for one in asked]
    lines.append(["*real clips through the VAE*", "", *line(stand, asked[0], real)[2:]])
    report = Report(
        title=f"JIT-CFG against SIT-CFG{stand.place}",
        question="Is joint guidance (two passes, one scale) as good as separate guidance (three passes, two scales)?",
        setup=(
            f"Sampling only, checkpoint {frozen.hash} (`checkpoints/{stand.checkpoint.name}`), image-to-video, "
            f"{trial.clips} test clips a seed, {sampled(frozen, trial)}, CFG-Renorm on. Every guidance gets the same "
            f"clips and noise. PSNR against the true continuation.{stand.continuation}"
        ),
        paper=(
            "FVD on MSRVTT (section 3.4.2): JIT-CFG at 7.5 has 94.1; SIT-CFG over 5 text and 5 image scales from 1.1 "
            "to 10.5 has 95.2 at best (text 7.5, image 1.5), and gets much worse with larger image scales. Prompts "
            "that lean on the first frame may want one."
        ),
        tables=[*table(head, lines), *contradictions.tables("guidance", rows)],
        comparisons=comparisons(stand, rows, text_scales),
        data={"rows": rows, "real": real},
        seeds=numbers,
        notes=[size_note(trial.clips, len(numbers))],
    )
    target = out or default_out("guidance-modes", stand)
    typer.echo(save(report, target, lambda figure: draw(figure, stand, rows, text_scales), (11, 3.4)))


if __name__ == "__main__":
    command.run(main)
