"""Which clips a task takes: overlaps, spacings and strides that the model was trained for, and what is refused."""

from collections.abc import Callable, Sequence

import pytest

from stiv_deploy.runtime import Bundle, GenerationRequest, RequestError
from stiv_deploy.runtime.bundle.manifest import TrainedOn
from stiv_deploy.runtime.pipeline.chained import Chain
from stiv_deploy.runtime.pipeline.long_tasks import extend_chain, interpolate_chain, long_chain

REQUEST = GenerationRequest(prompt="digit", seed=5)
Taught = Callable[..., Bundle]


@pytest.fixture
def taught(toy_bundle: Bundle) -> Taught:
    """Makes the toy bundle, with clips of 4 of at most 6 frames, of a model trained for some givings and strides."""

    def make(*givings: str, strides: Sequence[int] = (1,), frames: Sequence[int] = (4,)) -> Bundle:
        trained = TrainedOn(
            tasks=("mix",), givings=givings or ("none",), strides=tuple(strides), sizes=((8, 8),), frames=tuple(frames)
        )
        sampling = toy_bundle.manifest.sampling.model_copy(update={"stride": min(strides)})
        changes = {"trained": trained if givings else None, "sampling": sampling}
        return Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update=changes))

    return make


def shape(chain: Chain) -> list[tuple[str, int, int, int]]:
    """Of each pass its name, spacing, stride and longest clip."""
    return [(one.name, one.spacing, one.stride, max(chunk.frames for chunk in one.chunks)) for one in chain.passes]


def lap(chain: Chain) -> int:
    return len(chain.passes[0].chunks[0].given)


@pytest.mark.parametrize(
    ("givings", "known", "overlap"),
    [
        ((), 9, 3),
        ((), 2, 2),
        (("none", "first"), 9, 1),
        (("first", "first 2"), 9, 2),
        (("first", "first 2"), 1, 1),
        (("first", "random"), 9, 1),
        (("random",), 9, 3),
    ],
)
def test_an_extension_is_given_as_many_frames_as_were_trained(
    taught: Taught, givings: tuple[str, ...], known: int, overlap: int
) -> None:
    chain = extend_chain(taught(*givings), REQUEST, known, known + 5, None, "0" * 64)
    assert lap(chain) == overlap
    assert (chain.task, chain.known, chain.frames, chain.template.seed) == ("extend", known, known + 5, 5)
    assert {chunk.frames for chunk in chain.passes[0].chunks} == {4}


@pytest.mark.parametrize(
    ("known", "frames", "overlap", "message"),
    [
        (8, 8, None, "the video has 8 frames, and 8 are wanted; ask for more than it has"),
        (8, 0, None, "num_frames must be from 1 to 65536, got 0"),
        (8, 9, 4, "overlap is 4; a clip has 4 frames, take 1 to 3"),
        (8, 9, 0, "overlap is 0; a clip has 4 frames, take 1 to 3"),
        (2, 9, 3, "the video has 2 frames, and the overlap is 3; give a smaller overlap"),
    ],
)
def test_extensions_that_cannot_be(taught: Taught, known: int, frames: int, overlap: int | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        extend_chain(taught(), REQUEST, known, frames, overlap, "")


def test_what_a_model_was_not_trained_for_is_refused(taught: Taught) -> None:
    plain = taught("none", strides=(1, 3))
    for plan, wanted in (
        (
            lambda: extend_chain(plain, REQUEST, 8, 12, None, ""),
            "extend: .* to be given the first 3 frames or fewer",
        ),
        (
            lambda: interpolate_chain(plain, REQUEST, 8, 2, ""),
            "interpolate: .* be given every 2, nor frames 2 apart",
        ),
        (lambda: long_chain(plain, REQUEST, 7, None, None), "long: this model was not trained to be given every 3"),
        (
            lambda: long_chain(taught("ends", strides=(2,)), REQUEST, 7, None, None),
            "not trained for key frames: the strides that it knows are 2, and its clips are made at 2; give a spacing",
        ),
    ):
        with pytest.raises(RequestError, match=wanted):
            plan()
    assert lap(extend_chain(plain, REQUEST, 8, 12, 2, "")) == 2  # asked for, it is tried, with a warning


@pytest.mark.parametrize(
    ("givings", "factor", "passes"),
    [
        ((), 2, [("between-0", 2, 1, 4)]),
        ((), 4, [("between-0", 2, 2, 4), ("between-1", 2, 1, 4)]),
        (("every 2",), 2, [("between-0", 2, 1, 4)]),
        (("every 2",), 4, [("between-0", 2, 1, 4), ("between-1", 2, 1, 4)]),
        (("ends",), 2, [("between-0", 2, 1, 3)]),
        (("ends",), 4, [("between-0", 4, 1, 5)]),
        (("random",), 2, [("between-0", 2, 1, 4)]),
    ],
)
def test_interpolation_as_it_was_trained(
    taught: Taught, givings: tuple[str, ...], factor: int, passes: list[tuple[str, int, int, int]]
) -> None:
    """Strides are those of training, and there is but one here, unless nobody tells."""
    chain = interpolate_chain(taught(*givings), REQUEST, 6, factor, "")
    assert shape(chain) == passes
    assert (chain.frames, chain.fps) == (5 * factor + 1, 8 * factor)


@pytest.mark.parametrize(
    ("known", "factor", "message"),
    [(6, 3, "factor must be 2 or 4, got 3"), (1, 2, "the video has 1 frame, and there is nothing between")],
)
def test_interpolations_that_cannot_be(taught: Taught, known: int, factor: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        interpolate_chain(taught(), REQUEST, known, factor, "")


def test_a_long_video_has_key_frames_at_the_large_stride_and_fills_in_at_the_small_one(taught: Taught) -> None:
    bundle = taught("none", "first", "ends", strides=(2, 6))
    chain = long_chain(bundle, REQUEST, 13, None, None)
    assert shape(chain) == [("key-frames", 1, 6, 4), ("between-0", 3, 2, 4)]
    keys, between = chain.passes
    assert [(chunk.given, chunk.kept) for chunk in keys.chunks] == [((), (0, 1, 2, 3)), ((0,), (1,))]
    assert [(chunk.given, chunk.kept) for chunk in between.chunks] == [((0, 3), (1, 2))] * 4
    assert long_chain(taught(), REQUEST, 13, None, None).passes[1].spacing == 3  # as the paper, if nobody tells


@pytest.mark.parametrize(("frames", "nearest"), [(12, "10 or 13"), (3, "4"), (14, "13 or 16")])
def test_frames_that_cannot_be_reached(taught: Taught, frames: int, nearest: str) -> None:
    with pytest.raises(RequestError, match=f"{frames} frames cannot be made .* is {nearest}"):
        long_chain(taught("first", "ends", strides=(2, 6)), REQUEST, frames, None, None)


def test_vaes_that_code_several_frames_as_one_cannot_be_joined(taught: Taught) -> None:
    bundle = taught()
    for changes, message in (
        ({"causal_vae": True, "temporal_factor": 2}, "extend joins clips in latents, .* codes 2 frames as one"),
        ({"temporal": False}, "extend makes video, and this bundle is of an image model"),
    ):
        model = bundle.manifest.model.model_copy(update=changes)
        other = Bundle(bundle.folder, bundle.manifest.model_copy(update={"model": model}))
        with pytest.raises(RequestError, match=message):
            extend_chain(other, REQUEST, 8, 12, None, "")
