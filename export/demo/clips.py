"""The clips of a demo: one for each task that its checkpoint was trained for, by the torch-free runtime.

Text to video, text and image to video, the frames between, what comes after, views of an object. Pictures that are
given are drawn, of the test split.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from stiv_deploy.export.demo.shared import Demo, Stage
from stiv_deploy.runtime.pipeline.long_stage import LongRequest, LongTask
from stiv_deploy.runtime.pipeline.long_tasks import OVERLAP
from stiv_deploy.runtime.pipeline.request import GenerationRequest
from stiv_deploy.runtime.pipeline.stage import ClipsRequest
from stiv_deploy.runtime.pipeline.tasks import covers
from stiv_deploy.runtime.pipeline.views import TASK as VIEWS
from stiv_deploy.runtime.pipeline.views_stage import ViewsRequest
from stiv_deploy.stiv_ref.checkpoint import TrainedOn, open_checkpoint
from stiv_deploy.stiv_ref.data.views.sets import Views
from stiv_deploy.stiv_ref.data.world.clips import World, WorldClip
from stiv_deploy.stiv_ref.world_settings import EASY

PROMPT = "the big yellow star is moving right"
SEED = 7
SCENE, SOLID = 21, 3
"""Which held-out scene and which solid is given."""
FIRST, VIEW = "first.png", "solid.png"
LIKE_T2V, LIKE_TI2V = "t2v.mp4", "ti2v.mp4"
BACKEND = "onnxruntime"


def clip_stages(demo: Demo) -> list[Stage]:
    """A clip from text, one from text and its first frame, and what else the checkpoint of ``demo`` was trained for."""
    config = open_checkpoint(demo.checkpoint).config
    first = demo.out / FIRST
    still: dict[str, Any] = {"prompt": held_out_scene().caption.text, "frames": {0: first}}
    return [
        _clip(demo, LIKE_T2V, "text to video", GenerationRequest(prompt=PROMPT, seed=SEED), ()),
        _clip(demo, LIKE_TI2V, "text and image to video", GenerationRequest(seed=SEED, **still), ("--image", first)),
        *(() if config.trained is None else _further(demo, config.trained, config.sampling.frames)),
    ]


def _further(demo: Demo, trained: TrainedOn, frames: int) -> Iterator[Stage]:
    """Those of the tasks that take a clip or a picture which ``trained`` has."""
    if covers(trained.givings, range(0, frames, 2), frames):
        yield _long(demo, "interpolate", "the frames between", LIKE_T2V, "factor", 2)
    if covers(trained.givings, range(OVERLAP), frames):
        yield _long(demo, "extend", "what comes after", LIKE_TI2V, "frames", 2 * frames - OVERLAP)
    if VIEWS in trained.tasks:
        yield _views(demo)


def _clip(demo: Demo, name: str, what: str, request: GenerationRequest, image: Sequence[object]) -> Stage:
    target = demo.out / name
    return Stage(
        title=f"Generate: {what}",
        words=(demo.bundle, "--prompt", request.prompt, *image, *_how(target)),
        request=ClipsRequest(bundle=demo.bundle, requests=(request,), out=target, backend=BACKEND),
    )


def _long(demo: Demo, task: LongTask, what: str, source: str, option: str, value: int) -> Stage:
    """What becomes of the clip ``source`` of this demo, whose prompt is in its record."""
    video, target = demo.out / source, demo.out / f"{task}.mp4"
    arguments = {"video": video, option: value, "seed": SEED}
    return Stage(
        title=f"{task.capitalize()}: {what}",
        words=(demo.bundle, video, f"--{option}", value, *_how(target)),
        request=LongRequest(bundle=demo.bundle, task=task, arguments=arguments, out=target, backend=BACKEND),
    )


def _views(demo: Demo) -> Stage:
    image, target = demo.out / VIEW, demo.out / "views.mp4"
    return Stage(
        title="Views: an object from all around",
        words=(demo.bundle, image, *_how(target)),
        request=ViewsRequest(bundle=demo.bundle, image=image, out=target, options={"seed": SEED}, backend=BACKEND),
    )


def _how(target: Path) -> tuple[object, ...]:
    return ("--backend", BACKEND, "--seed", SEED, "--out", target)


def write_given(demo: Demo) -> None:
    """The pictures that clips are given, as large as clips are: the first frame of a scene, and a solid."""
    sampling = open_checkpoint(demo.checkpoint).config.sampling
    size = (sampling.width, sampling.height)
    for name, picture in ((FIRST, held_out_scene().frames[0]), (VIEW, Views(split="test").set(SOLID).frames[0])):
        Image.fromarray(picture).resize(size).save(demo.out / name)


def held_out_scene() -> WorldClip:
    """The scene that is given, as the shipped model knows scenes."""
    return World(EASY, frames=16, split="test").clip(SCENE)
