"""A bundle as a contestant: prompts and seeds in, frames out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stiv_deploy.runtime.pipeline.output import as_frames
from stiv_deploy.runtime.pipeline.pipeline import StivPipeline
from stiv_deploy.runtime.pipeline.request import GenerationRequest

Clips = Callable[[Sequence[str], Sequence[int]], np.ndarray]


def rival(order: Mapping[str, Any]) -> Clips:
    """``bundle`` on ``backend``, ``device`` and ``threads``; clips of the request ``template``. No prompt is kept."""
    pipe = StivPipeline.from_bundle(
        Path(order["bundle"]), backend=order["backend"], device=order["device"], threads=order["threads"]
    )
    template = GenerationRequest.from_json(order["template"])

    def make(prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        pipe.forget_texts()
        requests = [template.changed(prompt=each, seed=seed) for each, seed in zip(prompts, seeds, strict=True)]
        return np.stack([as_frames(each) for each in pipe.run(pipe.plan(requests)).frames])

    return make
