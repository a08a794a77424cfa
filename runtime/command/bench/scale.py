"""How a step would get shorter on several GPUs: what each computes, what it sends, and how fast a link is.

Predicted, as :mod:`~stiv_deploy.runtime.command.bench.predict` is: the time of one GPU, cut to the largest share, and
behind it the exchange, not overlapped: the most that a device sends over what the link moves a second. Shares and bytes
are those of :mod:`~stiv_deploy.runtime.sampling.parallel.shards`, which the runtime moves. Guidance is split first.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

from stiv_deploy.runtime.bundle.contract import Frozen
from stiv_deploy.runtime.command.bench.predict import HALF_BYTES, Load, Prediction, Shape, seen_tokens
from stiv_deploy.runtime.command.bench.roofline import GIGA
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.sampling.parallel.placement import MOST_DEVICES, Layout, layout
from stiv_deploy.runtime.sampling.parallel.shards import group_rows, spans

Link = Literal["nvlink", "pcie5", "pcie4"]
LINKS: tuple[Link, ...] = ("nvlink", "pcie5", "pcie4")
NVLINK = {"A100": 300 * GIGA, "H100": 450 * GIGA, "H200": 450 * GIGA, "B200": 900 * GIGA}
"""Bytes a second of a GPU in one direction, from NVIDIA's data sheets; other GPUs have none."""
NVLINK_REACHED = 0.7
"""Of that, what copies are taken to reach."""
PCIE: dict[Link, float] = {"pcie5": 40 * GIGA, "pcie4": 20 * GIGA}
"""Bytes a second of a GPU in x16, taken to be reached."""
SPATIAL_SQUARES = 4
"""Weights of width x width in the first half of a block: qkv and out of attention in space."""
PAYS = 0.9
"""More GPUs pay where the step takes at most this part of what it took with fewer."""


class Scaled(Frozen):
    """A predicted step on ``gpus`` GPUs that share it as ``parallel`` says.

    ``exchange`` seconds of ``seconds`` are for the ``sent`` bytes of the GPU that sends most, ``memory`` bytes those of
    weights, x, and the FFN's hidden layer on a GPU; ``speedup`` is over one GPU, and it ``pays`` to have so many.
    """

    gpu: str
    precision: str
    form: str
    gpus: int
    parallel: str
    seconds: float
    exchange: float
    sent: float
    memory: float
    speedup: float
    pays: bool


def parse_counts(text: str) -> tuple[int, ...]:
    """``1,2,4,8``: numbers of GPUs, ascending; :class:`RequestError`."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 4 and 1 <= int(part) <= MOST_DEVICES for part in parts):
        raise RequestError(f"--gpus {text!r}: give numbers of GPUs from 1 to {MOST_DEVICES}, as in 1,2,4,8")
    return tuple(sorted({int(part) for part in parts}))


def bandwidth(gpu: str, link: Link) -> float | None:
    """Bytes a second that a GPU sends; None where it has no such link."""
    if link in PCIE:
        return PCIE[link]
    return NVLINK_REACHED * NVLINK[gpu] if gpu in NVLINK else None


def sent_bytes(shape: Shape, load: Load, plan: Layout) -> float:
    """Of the GPU that sends most, in one evaluation: both switches of x in every block."""
    rows = group_rows(load.rows, plan.guidance, 0)
    shares = zip(spans(load.frames, plan.sequence), spans(load.places, plan.sequence), strict=True)
    tokens = [time.size * (load.places - place.size) + place.size * (load.frames - time.size) for time, place in shares]
    return float(max(tokens) * rows * shape.width * HALF_BYTES * shape.blocks)


def _largest(total: int, parts: int) -> float:
    """The largest share, as a part of all."""
    return spans(total, parts)[0].size / total


def compute_seconds(one: Prediction, shape: Shape, load: Load, plan: Layout) -> float:
    """Of the GPU that has most to do: its frames in the first half of a block, its positions in the second."""
    seen = seen_tokens(shape, load)
    first = (one.linear + one.memory) * SPATIAL_SQUARES / shape.squares + one.attention * load.places / seen
    frames, places = _largest(load.frames, plan.sequence), _largest(load.places, plan.sequence)
    rows = group_rows(load.rows, plan.guidance, 0) / load.rows
    return rows * (first * frames + (one.seconds - first) * places)


def memory_bytes(shape: Shape, load: Load, plan: Layout, weight: int) -> float:
    """Of weights of so many bytes each, of x in its four shares, and of the FFN's hidden layer."""
    share = max(_largest(load.frames, plan.sequence), _largest(load.places, plan.sequence))
    tokens = group_rows(load.rows, plan.guidance, 0) * load.frames * load.places * share
    buffers = 2 if plan.sequence == 1 else 4
    weights = shape.squares * shape.width**2 * shape.blocks * weight
    return weights + tokens * shape.width * HALF_BYTES * (buffers + shape.ffn)


def scaled(one: Prediction, shape: Shape, load: Load, counts: Sequence[int], link: Link) -> list[Scaled]:
    """The prediction of ``one`` GPU for each of ``counts`` that can share the frames; none for one without the link."""
    speed = bandwidth(one.gpu, link)
    found: list[Scaled] = []
    for gpus in counts if speed is not None else ():
        plan = layout(gpus, branches=load.rows > 1)
        if plan.sequence > min(load.frames, load.places):
            continue
        sent = sent_bytes(shape, load, plan)
        exchange = sent / (speed or 1)
        seconds = compute_seconds(one, shape, load, plan) + exchange
        before = found[-1].seconds if found else None
        found.append(
            Scaled(
                gpu=one.gpu,
                precision=one.precision,
                form=one.form,
                gpus=gpus,
                parallel=str(plan),
                seconds=seconds,
                exchange=exchange,
                sent=sent,
                memory=memory_bytes(shape, load, plan, HALF_BYTES if one.precision == "bfloat16" else 1),
                speedup=one.seconds / seconds,
                pays=before is None or seconds <= PAYS * before,
            )
        )
    return found


def all_scaled(
    ones: Iterable[Prediction], shape: Shape, load: Load, counts: Sequence[int], link: Link
) -> tuple[Scaled, ...]:
    """Of all predictions; :class:`RequestError` where none of the GPUs has the link."""
    ones = list(ones)
    if not any(bandwidth(one.gpu, link) for one in ones):
        with_it = ", ".join(NVLINK)
        raise RequestError(f"{ones[0].gpu} has no NVLink; give --link pcie5 or pcie4, or a --gpu of {with_it}")
    return tuple(each for one in ones for each in scaled(one, shape, load, counts, link))
