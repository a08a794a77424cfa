"""From a planned video to the engine's sample: tokens, noise of its seed, given latents in their places."""

from collections.abc import Iterable, Mapping

import numpy as np

from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.pipeline.plan import PlannedVideo, VideoSize
from stiv_deploy.runtime.pipeline.tokenization import PromptTokenizer
from stiv_deploy.runtime.sampling.conditioning import frame_mask, scatter_frames
from stiv_deploy.runtime.sampling.noise import draw_noise
from stiv_deploy.runtime.sampling.sample import Sample
from stiv_deploy.runtime.sampling.text_stage import Tokens


class SampleMaker:
    """Makes the samples of planned videos of ``bundle``; raises what its tokenizer does."""

    def __init__(self, bundle: Bundle) -> None:
        self._model = bundle.manifest.model
        self._tokenizer = PromptTokenizer(bundle)

    def lost(self, videos: Iterable[PlannedVideo]) -> dict[str, str]:
        """What the model will not hear of the prompts of ``videos``, by prompt."""
        return self._tokenizer.lost(each for video in videos for each in (video.prompt, video.negative_prompt))

    def __call__(self, video: PlannedVideo, given: Mapping[int, np.ndarray], size: VideoSize) -> Sample:
        """The sample of ``video``, of ``size``, whose given latents [C, h, w] by latent frame are ``given``."""
        shape = self.shape(size)
        encoded = self._tokenizer([video.prompt, video.negative_prompt])
        text, negative = (Tokens(*each) for each in zip(*encoded, strict=True))
        return Sample(
            noise=draw_noise([video.seed], shape)[0] if video.noise is None else video.noise,
            clean=scatter_frames(given, shape),
            frame_mask=frame_mask(shape[0], given),
            micro=video.micro,
            text=text,
            negative=negative,
            settings=video.settings,
        )

    def shape(self, size: VideoSize) -> tuple[int, int, int, int]:
        """Shape of the latents of a video, [T, C, h, w]."""
        factor = self._model.spatial_factor
        frames = self._model.latent_frames(size.frames)
        return frames, self._model.latent_channels, size.height // factor, size.width // factor
