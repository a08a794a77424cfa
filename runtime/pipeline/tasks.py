"""Tasks: what it is called to be given just these frames of a video, and what a VAE must be able to do for it.

The reference trains for patterns of the same names (all of them are frame replacement, arXiv 2412.07730, section 3); a
request may be given any frames.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

RANDOM = "random"
"""The giving of any frames, as long as one is left."""


@dataclass(frozen=True)
class Task:
    """``fits`` says whether the task is meant by sorted given frames and the number of all frames.

    ``leading`` tasks are given nothing but the beginning: a VAE that codes each frame from those before it can do them.
    """

    name: str
    fits: Callable[[Sequence[int], int], bool]
    leading: bool = True


TASKS = (
    Task("t2i", lambda given, frames: not given and frames == 1),
    Task("t2v", lambda given, _: not given),
    Task("ti2v", lambda given, _: given == [0]),
    Task("predict", lambda given, _: given == list(range(len(given)))),
    Task("interpolate", lambda given, _: given[0] == 0, leading=False),
    Task("frames", lambda _given, _frames: True, leading=False),
)
"""All tasks; the first that fits is meant. ``interpolate`` is given the first frame and others, with gaps; ``frames``
are any others."""


def task_of(given: Collection[int], frames: int) -> Task:
    """The task of a video of ``frames`` frames that is given the frames ``given``, from 0 on."""
    ordered = sorted(given)
    return next(task for task in TASKS if task.fits(ordered, frames))


def giving_frames(name: str, frames: int) -> list[int] | None:
    """Latent frames, of ``frames``, that the giving ``name`` of a training gives; ``None`` if it gives no certain ones.

    Names are those of the reference: ``none``, ``first``, ``first K``, ``every N``, ``ends`` and ``random``.
    """
    kind, _, number = name.partition(" ")
    count = int(number) if number.isdecimal() else 1
    match kind:
        case "none":
            return []
        case "first":
            return list(range(min(count, frames)))
        case "every":
            return list(range(0, frames, count))
        case "ends":
            return sorted({0, frames - 1})
    return None


def covers(givings: Collection[str], given: Collection[int], frames: int) -> bool:
    """Whether a model that was trained for ``givings`` has learnt to be given the latent frames ``given``."""
    if given and RANDOM in givings:
        return True
    return any(giving_frames(name, frames) == sorted(given) for name in givings)
