"""Pre-computing latents and text states: every clip goes through the frozen encoders once, not once an epoch.

What is stored is the VAE's posterior mean, standardized, and the text encoder's output, as training would compute them;
:mod:`~stiv_deploy.stiv_ref.data.latents` reads it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from stiv_deploy.stiv_ref.checkpoint import AnyTextEncoder, AnyVae, load_text_encoder, load_vae
from stiv_deploy.stiv_ref.config import read_config
from stiv_deploy.stiv_ref.data.clips import write_whole
from stiv_deploy.stiv_ref.data.encoder_hash import encoder_hash, is_checkpoint
from stiv_deploy.stiv_ref.data.latents import INDEX, TEXT_PARTS, LatentIndex, LatentSettings, SampleFacts
from stiv_deploy.stiv_ref.data.loader import NAMED, DamagedSampleError, Sample
from stiv_deploy.stiv_ref.data.tars import write_shard
from stiv_deploy.stiv_ref.data.videos import VideoDataset
from stiv_deploy.stiv_ref.data.workers import load_ahead
from stiv_deploy.stiv_ref.errors import DataError
from stiv_deploy.stiv_ref.objective import sample_generator
from stiv_deploy.stiv_ref.pretrained.text import load_pretrained_text
from stiv_deploy.stiv_ref.pretrained.vae import load_pretrained_vae
from stiv_deploy.stiv_ref.progress import Progress, unheard
from stiv_deploy.stiv_ref.text import tokenize

Task = tuple[int, int, int]
"""A clip to be encoded: bucket, number of the video, number of the draw."""
HASHES = ("vae", "text", "videos")


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Frozen encoders on one device, and what identifies them. Without text, captions are encoded while training."""

    vae: AnyVae
    vae_hash: str
    text: tuple[AnyTextEncoder, Tokenizer] | None = None
    text_hash: str | None = None

    @property
    def device(self) -> torch.device:
        """Where they compute."""
        return next(self.vae.parameters()).device

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text."""
        return None if self.text is None else self.text[0].config.max_tokens


def load_encoders(
    vae: Path, text: Path | None = None, *, max_tokens: int | None = None, device: str = "cpu"
) -> Encoders:
    """Load encoders from STIV checkpoints, or from folders of diffusers and of transformers.

    Raises :class:`~stiv_deploy.stiv_ref.errors.CheckpointError` if a folder has none, or if ``max_tokens`` is given for
    a checkpoint's text encoder.
    """
    loaded_vae = load_vae(vae) if is_checkpoint(vae) else load_pretrained_vae(vae)
    loaded_text = None
    if text is not None and is_checkpoint(text):
        loaded_text = load_text_encoder(text)
        if max_tokens not in (None, loaded_text[0].config.max_tokens):
            raise DataError(f"{text}: its texts have {loaded_text[0].config.max_tokens} tokens; leave --max-tokens out")
    elif text is not None:
        loaded_text = load_pretrained_text(text, max_tokens)
    try:
        loaded_vae.to(device)
        if loaded_text is not None:
            loaded_text[0].to(device)
    except (RuntimeError, AssertionError) as error:  # no such device, or torch is built without it
        raise DataError(f"device {device!r}: cannot be used ({str(error).splitlines()[0]})") from None
    return Encoders(
        vae=loaded_vae,
        vae_hash=encoder_hash(vae, "vae"),
        text=loaded_text,
        text_hash=None if text is None else encoder_hash(text, "text"),
    )


class _Clips(Dataset[Sample | DamagedSampleError]):
    """The clips of all tasks, in order."""

    def __init__(self, dataset: VideoDataset, tasks: Sequence[Task], seed: int) -> None:
        self.dataset, self.tasks, self.seed = dataset, tasks, seed

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, at: int) -> Sample | DamagedSampleError:
        group, number, draw = self.tasks[at]
        try:
            return self.dataset.load(group, number, sample_generator(self.seed, 0, number, draw))
        except DamagedSampleError as error:
            return error


def _itself(clip: Sample | DamagedSampleError) -> Sample | DamagedSampleError:
    return clip


def precompute(
    dataset: VideoDataset,
    out: Path,
    encoders: Encoders,
    settings: LatentSettings,
    *,
    workers: int,
    progress: Progress = unheard,
) -> LatentIndex:
    """Encode the clips of ``dataset``, which was opened with ``settings``, to shards in ``out``; returns their index.

    Goes on where an earlier call with the same arguments was stopped: shards are written whole or not at all. Broken
    videos are skipped and listed. Raises :class:`DataError` if ``out`` holds something else, if nothing can be encoded,
    if the sizes do not fit the VAE, or if values are too large for ``settings.dtype``.
    """
    tasks = _tasks(dataset, settings)
    index = _begun(out, _index_of(dataset, encoders, settings))
    broken = {**index.broken, **dataset.broken}
    encoder = _Encoder(encoders, settings)
    done = 0
    for number, at in enumerate(range(0, len(tasks), settings.per_shard)):
        part, path = tasks[at : at + settings.per_shard], out / f"latents-{number:06d}.tar"
        if not path.exists():
            clips = _Clips(dataset, part, settings.seed)
            after = partial(_told, progress, path.name, done, len(tasks))
            write_shard(path, encoder.samples(clips, broken, workers, after))
            index = _write(out, index.model_copy(update={"broken": dict(broken)}))
        done += len(part)
        progress(path.name, done, len(tasks))
    if {dataset.listing.clips[number].name for _, number, _ in tasks} <= set(broken):
        raise DataError(f"{dataset.title}: no video of it can be decoded; {_first(broken)}")
    return _write(out, index.model_copy(update={"complete": True}))


def _told(progress: Progress, shard: str, done: int, total: int, ahead: int) -> None:
    """Tell of ``ahead`` clips of a shard that comes after ``done`` clips."""
    progress(shard, done + ahead, total)


def _tasks(dataset: VideoDataset, settings: LatentSettings) -> list[Task]:
    """All clips, in the order of the videos; :class:`DataError` if there are none."""
    usable = sorted((number, group) for group, members in enumerate(dataset.groups) for number in members)
    if not usable:
        reasons = {**dataset.broken, **dataset.left_out}
        raise DataError(f"{dataset.title}: none of its {dataset.total} videos can be used; {_first(reasons)}")
    return [(group, number, draw) for number, group in usable for draw in range(settings.clips_per_video)]


def _first(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons.items())[:NAMED])


def _index_of(dataset: VideoDataset, encoders: Encoders, settings: LatentSettings) -> LatentIndex:
    """The index of what is going to be written; raises :class:`DataError` if frames or sizes do not fit the VAE."""
    factor = encoders.vae.config.spatial_factor
    for height, width in settings.sizes:
        if height % factor or width % factor:
            raise DataError(f"resolution {height}x{width} is not a multiple of {factor} pixels, as the VAE needs")
    try:
        latent_frames = encoders.vae.config.latent_frames(settings.frames)
    except ValueError as error:
        raise DataError(str(error)) from None
    facts = [(clip.name, clip.caption, clip.size, clip.frames) for clip in dataset.listing.clips]
    return LatentIndex(
        settings=settings,
        vae=encoders.vae_hash,
        text=encoders.text_hash,
        max_tokens=encoders.max_tokens,
        videos=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        latent_frames=latent_frames,
        latent_channels=encoders.vae.config.latent_channels,
    )


def _begun(out: Path, fresh: LatentIndex) -> LatentIndex:
    """Begin in a new folder, or go on in one that was begun alike; :class:`DataError` if it was begun otherwise."""
    if not (out / INDEX).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: is there already, without {INDEX}; give a new folder, or remove it")
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{out}: cannot be made ({error.strerror}); give another folder") from None
        return _write(out, fresh)
    begun = read_config(LatentIndex, out / INDEX)
    now, before = (_flat(index) for index in (fresh, begun))
    differ = [f"{name} was {before[name]}, is {now[name]}" for name in now if now[name] != before[name]]
    if differ:
        raise DataError(f"{out}: was begun otherwise: {'; '.join(differ)}; give another folder, or remove this one")
    return begun


def _flat(index: LatentIndex) -> dict[str, object]:
    """What must be equal to go on, hashes shortened."""
    values = index.model_dump(mode="json", exclude={"complete", "broken"})
    values |= values.pop("settings")
    return {name: value[:12] if name in HASHES and value else value for name, value in values.items()}


def _write(out: Path, index: LatentIndex) -> LatentIndex:
    write_whole(out / INDEX, index.model_dump_json(indent=2) + "\n")
    return index


class _Encoder:
    """Turns clips into samples of a shard."""

    def __init__(self, encoders: Encoders, settings: LatentSettings) -> None:
        self.encoders, self.settings = encoders, settings
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def samples(
        self, clips: _Clips, broken: dict[str, str], workers: int, advance: Callable[[int], None]
    ) -> Iterator[dict[str, bytes]]:
        """The samples of ``clips``; faults go to ``broken``, by the name of the video."""
        ahead = load_ahead(clips, workers, clips.dataset.title, collate=_itself)
        for at, loaded in enumerate(ahead):
            if isinstance(loaded, DamagedSampleError):
                broken[loaded.name] = loaded.fault
            else:
                yield self._sample(loaded, clips.tasks[at][2])
            advance(at + 1)

    def _sample(self, sample: Sample, draw: int) -> dict[str, bytes]:
        assert sample.video is not None
        height, width = sample.video.shape[-2:]
        several = self.settings.clips_per_video > 1
        facts = SampleFacts(
            name=f"{sample.name}#{draw}" if several else sample.name,
            caption=sample.caption,
            size=(height, width),
            micro=tuple(sample.micro.tolist()),
        )
        tensors = {"latents": self._latents(sample), **self._text(sample)}
        return {"safetensors": save(tensors), "json": facts.model_dump_json().encode()}

    @torch.no_grad()
    def _latents(self, sample: Sample) -> Tensor:
        assert sample.video is not None
        latents = self.encoders.vae.encode(sample.video[None].to(self.encoders.device))[0]
        return self._stored(latents, f"latents of {sample.name}")

    @torch.no_grad()
    def _text(self, sample: Sample) -> dict[str, Tensor]:
        """States of the caption; those of the last one are kept, for more clips of one video."""
        if self.encoders.text is None:
            return {}
        if self._last[0] != sample.caption or not self._last[1]:
            encoder, tokenizer = self.encoders.text
            ids, mask = (each.to(self.encoders.device) for each in tokenize(tokenizer, [sample.caption]))
            states = encoder(ids, mask)
            what = f"text states of {sample.name}"
            parts = (
                self._stored(states.states[0], what),
                mask[0].to("cpu", torch.uint8),
                self._stored(states.pooled[0], what),
            )
            self._last = sample.caption, dict(zip(TEXT_PARTS, parts, strict=True))
        return self._last[1]

    def _stored(self, tensor: Tensor, what: str) -> Tensor:
        stored = tensor.to("cpu", self.dtype).contiguous()
        if not torch.isfinite(stored).all():
            reason = f"too large for {self.settings.dtype}" if torch.isfinite(tensor).all() else "not finite"
            raise DataError(f"{what} are {reason}; give --dtype bfloat16 or float32, or another encoder")
        return stored
