"""Contact sheets while a model trains, and one picture of all of them over time.

Sheets of a stage show the same prompts, noise and given frames, drawn with the averaged weights, so that they compare.
Drawing leaves the training as it was: its weights, its random numbers, its modes.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from stiv_deploy.stiv_ref.checkpoint import SamplingDefaults
from stiv_deploy.stiv_ref.data.source import Batch
from stiv_deploy.stiv_ref.files import replaced_file
from stiv_deploy.stiv_ref.generation import seeded_noise, settings_of
from stiv_deploy.stiv_ref.guidance import Unseen
from stiv_deploy.stiv_ref.model import Stiv
from stiv_deploy.stiv_ref.plots import STRIP_GAP, Row, contact_sheet, label_font
from stiv_deploy.stiv_ref.recipe import Logging, Stage
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, sample
from stiv_deploy.stiv_ref.text import TextStates

if TYPE_CHECKING:
    from PIL import Image

FOLDER = "samples"
INDEX = "index.png"
SHEET_FRAMES, SHEET_PIXELS = 8, 128
"""A sheet shows at most so many frames of a clip, each at most so many pixels wide and high."""
LISTED = 4
"""At most so many given frames are listed before a prompt; of more their number is told."""
INDEX_COLUMNS = 8
"""The picture over time shows at most so many steps of a stage."""

Encode = Callable[[Sequence[str]], TextStates]
"""Captions to text states, on the device of the model."""


class LatentCoder(Protocol):
    """What is asked of a VAE: the small one, or a pretrained one."""

    config: Any

    def encode(self, video: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] of video [B, F, 3, H, W]."""

    def decode(self, latents: Tensor) -> Tensor:
        """Video [B, F, 3, H, W] of latents [B, T, C, h, w]."""


@dataclass(frozen=True, kw_only=True)
class Subjects:
    """What all sheets of a stage show: ``prompts`` N; ``shape`` (T, C, h, w) of their latents; ``micro`` fp32 [N, 6].

    ``given`` bool [N, T] says which latent frames are given, ``clean`` fp32 [N, T, C, h, w] what they are; it is 0 at
    the others. ``unseen`` is what the unconditional branch gets there, as the stage's task has it.
    """

    prompts: list[str]
    shape: tuple[int, ...]
    given: Tensor
    clean: Tensor
    micro: Tensor
    unseen: Unseen = Unseen.NOISED

    def __len__(self) -> int:
        return len(self.prompts)


def wanted(logging: Logging) -> int:
    """How many samples a sheet shows, and so how many the batch for :func:`choose` should have."""
    return len(logging.prompts) or logging.sample_count


@torch.no_grad()
def choose(stage: Stage, logging: Logging, batch: Batch, vae: LatentCoder, stride: int) -> Subjects:
    """The subjects of ``stage``: the recipe's prompts, or the batch's captions; its sizes, and its givings in turn.

    They are conditioned as a generation of the same is: on a whole picture of this size, on the recommended ``stride``,
    or, where several frames are given, on the stride that these have.

    ``batch`` has :func:`wanted` samples of the stage's data; with fewer, the sheet has fewer, and it leaves out those
    that have tasks of their own.
    """
    batch = _of_the_stage(batch)
    if batch.latents is not None:
        latents = batch.latents
    else:
        assert batch.video is not None
        latents = vae.encode(batch.video)
    count = min(wanted(logging), len(latents))
    height, width = (side * vae.config.spatial_factor for side in latents.shape[-2:])
    micro = batch.micro[:count].float().clone()
    micro[:, :4] = torch.tensor([height, width, 0, 0])
    given = torch.stack([stage.kind.shown(number, latents.shape[1]) for number in range(count)])
    micro[given.sum(1) < 2, 4] = stride
    return Subjects(
        prompts=list(logging.prompts or batch.captions)[:count],
        shape=tuple(latents.shape[1:]),
        given=given,
        clean=latents[:count].float() * given[:, :, None, None, None].to(latents.device),
        micro=micro,
        unseen=stage.kind.unseen,
    )


def _of_the_stage(batch: Batch) -> Batch:
    """``batch`` without the samples that have tasks of their own, unless all have."""
    own = [number for number, task in enumerate(batch.tasks or []) if task is None]
    if not own:
        return batch
    return replace(
        batch,
        video=None if batch.video is None else batch.video[own],
        captions=[batch.captions[number] for number in own],
        micro=batch.micro[own],
        names=[batch.names[number] for number in own],
    )


@contextmanager
def averaged(weights: Sequence[Tensor], averages: Sequence[Tensor]) -> Iterator[None]:
    """Exchange ``weights`` with their ``averages`` for the block, in place and one at a time: the model is not copied.

    Both are of one type; averages may be on another device. Values come back bit-equal. An interrupt must be held back
    meanwhile.
    """
    _exchange(weights, averages)
    try:
        yield
    finally:
        _exchange(weights, averages)


@torch.no_grad()
def _exchange(first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        kept = one.clone()
        one.copy_(other)
        other.copy_(kept)


@contextmanager
def _undisturbed(model: Stiv) -> Iterator[None]:
    """Evaluation mode, without compiling for new shapes; random numbers and modes are as before afterwards."""
    training, device = model.training, next(model.parameters()).device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.compiler.set_stance("force_eager"),
        torch.no_grad(),
    ):
        model.eval()
        try:
            yield
        finally:
            model.train(training)


def generate_clips(
    model: Stiv, encode: Encode, vae: LatentCoder, subjects: Subjects, settings: SamplingSettings, at_once: int
) -> Tensor:
    """Clips fp32 [N, F, 3, H, W] of the subjects on the CPU, ``at_once`` at a time; sample n has seed n."""
    device = next(model.parameters()).device
    clips = []
    with _undisturbed(model):
        for start in range(0, len(subjects), at_once):
            part = slice(start, min(start + at_once, len(subjects)))
            noise = seeded_noise(range(part.start, part.stop), subjects.shape).to(device)
            clean, given = subjects.clean[part].to(device), subjects.given[part].to(device)
            text, null = encode(subjects.prompts[part]), encode([""] * len(noise))
            inputs = SamplingInputs(noise, clean, given, text, null, subjects.micro[part].to(device))
            clips.append(vae.decode(sample(model, inputs, settings)).float().cpu())
    return torch.cat(clips)


def _given_words(given: Tensor) -> str:
    """What stands before a prompt on a sheet, of a frame mask bool [T]: that an image was given, or which frames."""
    frames = given.nonzero().flatten().tolist()
    if not frames:
        return ""
    if len(frames) > LISTED:
        return f"{len(frames)} frames + "
    return "image + " if frames == [0] else f"frames {', '.join(map(str, frames))} + "


def _for_sheet(clip: Tensor) -> Tensor:
    """``clip`` [F, 3, H, W] with no more frames, evenly spread, and no more pixels than a sheet shows."""
    frames = torch.linspace(0, len(clip) - 1, min(len(clip), SHEET_FRAMES)).round().long()
    scale = SHEET_PIXELS / max(clip.shape[-2:])
    if scale >= 1:
        return clip[frames]
    height, width = (max(1, round(side * scale)) for side in clip.shape[-2:])
    return F.interpolate(clip[frames], size=(height, width), mode="area")


def draw_samples(
    model: Stiv,
    encode: Encode,
    vae: LatentCoder,
    subjects: Subjects,
    sampling: SamplingDefaults,
    run: Path,
    *,
    stage: int,
    name: str,
    step: int,
    at_once: int | None = None,
    write: bool = True,
) -> Path:
    """Sample the subjects and write ``run/samples/<name>-<step>.png`` and the picture over time; the sheet's path.

    ``model`` has the weights to show (:func:`averaged`). With a sharded model all ranks must call this, and only one
    should ``write``.
    """
    out = run / FOLDER / f"{name}-{step:07d}.png"
    settings = replace(settings_of(sampling), unseen=subjects.unseen)
    clips = generate_clips(model, encode, vae, subjects, settings, at_once or len(subjects))
    if write:
        rows = [
            Row(video=_for_sheet(clip).numpy(), caption=_given_words(given) + prompt)
            for clip, prompt, given in zip(clips, subjects.prompts, subjects.given, strict=True)
        ]
        out.parent.mkdir(parents=True, exist_ok=True)
        zoom = max(1, SHEET_PIXELS // 2 // max(rows[0].video.shape[-2:]))
        about = {"stage": stage, "name": name, "step": step}
        contact_sheet(rows, out, columns=1, zoom=zoom, heading=f"{name}, step {step}", about=about)
        draw_index(run)
    return out


class Sheet(NamedTuple):
    """A sheet on disk: its PNG, and what the text chunk of that says."""

    path: Path
    about: dict[str, Any]

    @property
    def order(self) -> tuple[int, int]:
        """Its place in the training: stage, then step."""
        return self.about["stage"], self.about["step"]

    def clips(self) -> "list[Image.Image]":
        """Of every strip the first, middle and last frame, side by side."""
        from PIL import Image

        with Image.open(self.path) as image:
            pixels = image.convert("RGB")
        width, height, frames = self.about["frame"]
        shown = sorted({0, frames // 2, frames - 1})
        pictures = []
        for x, y in self.about["strips"]:
            picture = Image.new("RGB", (len(shown) * (width + 1) - 1, height), "white")
            for place, frame in enumerate(shown):
                left = x + frame * (width + STRIP_GAP)
                picture.paste(pixels.crop((left, y, left + width, y + height)), (place * (width + 1), 0))
            pictures.append(picture)
        return pictures


def read_sheets(folder: Path) -> list[Sheet]:
    """All sheets of ``folder`` in the order of training; other pictures and half-written ones are passed over."""
    from PIL import Image

    sheets = []
    for path in folder.glob("[!.]*.png"):
        try:
            with Image.open(path) as image:
                about = json.loads(image.info.get("stiv", "{}"))
        except OSError:
            continue  # not a picture
        if "stage" in about:
            sheets.append(Sheet(path, about))
    return sorted(sheets, key=lambda sheet: sheet.order)


def spread(sheets: Sequence[Sheet]) -> list[Sheet]:
    """At most as many sheets as the index has columns, evenly spread, first and last among them."""
    count = min(len(sheets), INDEX_COLUMNS)
    return [sheets[round(place * (len(sheets) - 1) / max(1, count - 1))] for place in range(count)]


def _stage_band(name: str, sheets: Sequence[Sheet]) -> "Image.Image":
    """One stage: a column for every step, a row for every prompt."""
    from PIL import Image, ImageDraw

    captions, gap, line = sheets[-1].about["captions"], 6, 16
    columns = {sheet.about["step"]: sheet.clips() for sheet in sheets if sheet.about["captions"] == captions}
    width, height = next(iter(columns.values()))[0].size
    across, down = max(width, 60) + gap, height + line + gap
    top = 2 * line + gap
    band = Image.new("RGB", (max(300, across * len(columns) + gap), top + down * len(captions)), "white")
    draw = ImageDraw.Draw(band)
    draw.font = label_font()
    draw.text((gap, 2), name, fill="#1f4e9c")
    for left, (step, clips) in zip(range(gap, band.width, across), columns.items(), strict=False):
        draw.text((left, 2 + line), f"step {step}", fill="black")
        for row, clip in enumerate(clips):
            band.paste(clip, (left, top + row * down + line))
    for row, caption in enumerate(captions):
        draw.text((gap, top + row * down), caption, fill="#222222")
    return band


def draw_index(run: Path) -> Path | None:
    """Draw ``run/samples/index.png``, what the sheets of a run show over time; its path, or ``None`` without sheets.

    Stage under stage; columns are steps, rows are prompts, a cell has the first, the middle and the last frame.
    """
    from PIL import Image

    stages: dict[tuple[int, str], list[Sheet]] = {}
    for sheet in read_sheets(run / FOLDER):
        stages.setdefault((sheet.about["stage"], sheet.about["name"]), []).append(sheet)
    if not stages:
        return None
    bands = [_stage_band(name, spread(sheets)) for (_, name), sheets in stages.items()]
    picture = Image.new("RGB", (max(band.width for band in bands), sum(band.height for band in bands)), "white")
    top = 0
    for band in bands:
        picture.paste(band, (0, top))
        top += band.height
    out = run / FOLDER / INDEX
    with replaced_file(out) as temporary:
        picture.save(temporary, format="PNG")
    return out
