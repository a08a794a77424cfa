"""Where generated clips come from: the reference sampler on a checkpoint, or the runtime on a bundle."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from clip_source import Given, Settings, Source, Video, digest

from stiv_deploy.stiv_ref.checkpoint import Checkpoint, load_checkpoint
from stiv_deploy.stiv_ref.generation import sampling_inputs
from stiv_deploy.stiv_ref.guidance import GuidanceMode, Unseen
from stiv_deploy.stiv_ref.sampler import SamplingInputs, SamplingSettings, Solver, sample
from stiv_deploy.stiv_ref.training.state import find_state


class ReferenceSource:
    """The PyTorch reference sampler on a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, what: dict[str, str]) -> None:
        self.checkpoint, self.what = checkpoint, what
        self.frames = checkpoint.config.sampling.frames if checkpoint.config.model.temporal else 1
        self.side, self.stride = checkpoint.config.sampling.height, checkpoint.config.sampling.stride or 1

    def describe(self) -> dict[str, str]:
        """Sampler and checkpoint or training state."""
        return {"sampler": "stiv_ref (PyTorch fp32)", **self.what}

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, given: Given | None) -> Video:
        """As :class:`Source` says, with the reference sampler."""
        own = self.checkpoint.config.sampling
        chosen = SamplingSettings(
            steps=settings.steps,
            guidance_mode=GuidanceMode(settings.mode),
            guidance_scale=settings.scale,
            image_scale=settings.image_scale,
            renorm=settings.renorm,
            unseen=Unseen(settings.unseen),
            solver=Solver(settings.solver),
            time_shift=own.time_shift if settings.time_shift is None else settings.time_shift,
            late_stretch=own.late_stretch if settings.late_stretch is None else settings.late_stretch,
        )
        inputs = self._inputs(prompts, seeds, settings, given or {})
        with torch.no_grad():
            return self.checkpoint.vae.decode(sample(self.checkpoint.model, inputs, chosen)).numpy()

    @torch.no_grad()
    def _inputs(self, prompts: Sequence[str], seeds: Sequence[int], settings: Settings, given: Given) -> SamplingInputs:
        """Inputs with the given frames; a frame of this VAE is a latent frame."""
        frames = settings.frames or self.frames
        inputs = sampling_inputs(self.checkpoint, prompts, seeds, None, frames=frames)
        clean, mask, micro = inputs.clean.clone(), inputs.frame_mask.clone(), inputs.micro.clone()
        micro[:, 4] = settings.stride or self.stride
        for number, pictures in given.items():
            coded = self.checkpoint.vae.encode(torch.from_numpy(np.ascontiguousarray(pictures)).unsqueeze(1))
            clean[:, number : number + 1], mask[:, number] = coded, True
        return inputs._replace(clean=clean, frame_mask=mask, micro=micro)

    @torch.no_grad()
    def reconstruct(self, video: Video) -> Video | None:
        """As :class:`Source` says."""
        vae = self.checkpoint.vae
        return vae.decode(vae.encode(torch.from_numpy(video))).numpy()


def from_run(run: Path) -> ReferenceSource:
    """A look into a *running* training: the averaged weights of its last saved state. Only reads its files."""
    from stiv_deploy.stiv_ref.training.consolidate import consolidate_run

    with TemporaryDirectory() as folder:
        position = consolidate_run(run, Path(folder) / "checkpoint")
        checkpoint = load_checkpoint(Path(folder) / "checkpoint")
    return ReferenceSource(checkpoint, {"run": str(run), "stage": str(position.stage), "step": str(position.step)})


def open_source(path: Path, backend: str, threads: int) -> Source:
    """The source behind ``path``: a checkpoint folder, a bundle folder, or the folder of a training run."""
    if (path / "manifest.json").is_file():
        from bundle_source import BundleSource

        return BundleSource(path, backend, threads)
    if not (path / "config.json").is_file() and find_state(path) is not None:
        return from_run(path)
    what = {"checkpoint": str(path), "model_sha256": digest(path / "model.safetensors")} if path.is_dir() else {}
    return ReferenceSource(load_checkpoint(path), what)
