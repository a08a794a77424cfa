"""What a video asks of a model that its training did not show it: a line for each, since the result may be poor."""

from collections.abc import Collection, Iterator, Sequence

from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.tasks import covers


def beyond_training(
    trained: TrainedOn | None,
    *,
    stride: int,
    size: tuple[int, int],
    frames: int,
    given: Collection[int],
    latent_frames: int,
) -> tuple[str, ...]:
    """One line for the stride, the size (height, width), the frames and the given latent frames, if each is unknown.

    Numbers between the least and the greatest that were trained are known. Without ``trained`` nothing is told.
    """
    if trained is None:
        return ()
    return tuple(_lines(trained, stride, size, frames, given, latent_frames))


def _lines(
    trained: TrainedOn, stride: int, size: tuple[int, int], frames: int, given: Collection[int], latent_frames: int
) -> Iterator[str]:
    if frames > 1 and _outside(stride, trained.strides):
        yield f"stride {stride}: the model was trained at {_listed(trained.strides)}"
    if any(_outside(side, sides) for side, sides in zip(size, zip(*trained.sizes, strict=True), strict=True)):
        sizes = _listed([f"{width}x{height}" for height, width in trained.sizes])
        yield f"{size[1]}x{size[0]} pixels: the model was trained at {sizes}"
    if _outside(frames, trained.frames):
        yield f"{frames} frames: the model was trained on {_listed(trained.frames)}"
    if not covers(trained.givings, given, latent_frames):
        what = f"given frames {', '.join(map(str, sorted(given)))}" if given else "no given frame"
        yield f"{what}: the model was trained to be given {_listed(trained.givings)}"


def _outside(value: int, known: Sequence[int]) -> bool:
    return not min(known) <= value <= max(known)


def _listed(values: Sequence[object]) -> str:
    """``a, b or c``."""
    words = [str(value) for value in values]
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))
