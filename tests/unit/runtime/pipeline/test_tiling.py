"""Tiles cover every pixel, blend to one, and change nothing that the decoder does not see across a quarter overlap."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from stiv_deploy.runtime import StivPipeline
from stiv_deploy.runtime.backends import open_backend
from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.bundle import Bundle
from stiv_deploy.runtime.bundle.contract import FRAMES, ModelFacts, dimensions, graph_specs
from stiv_deploy.runtime.bundle.manifest import Bucket, Range
from stiv_deploy.runtime.errors import RequestError
from stiv_deploy.runtime.pipeline.images import frames_from_video
from stiv_deploy.runtime.pipeline.tiling import (
    PIXELS_AT_ONCE,
    Cut,
    TiledGraph,
    TilePlan,
    check_tile,
    chunks,
    plan_tiles,
    tiles,
)

EPS = float(np.finfo(np.float32).eps)
UNITS = st.sampled_from([1, 2, 8])
CUTS = st.builds(tiles, st.integers(1, 200), st.integers(2, 70))

CONVOLUTIONS = """g (float[B,T,4,h,w] latents) => (float[B,T,3,H,W] video)
{
    size = Shape <start=2, end=5> (latents)
    any = Constant <value_ints=[-1]> ()
    flat = Concat <axis=0> (any, size)
    images = Reshape (latents, flat)
    first = Conv <pads=[1, 1, 1, 1]> (images, inner)
    bent = Tanh (first)
    scales = Constant <value_floats=[1.0, 1.0, 2.0, 2.0]> ()
    large = Resize <mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric">
        (bent, , scales)
    colours = Conv <pads=[1, 1, 1, 1]> (large, outer)
    rows = Shape <start=0, end=2> (latents)
    rest = Shape <start=1, end=4> (colours)
    shape = Concat <axis=0> (rows, rest)
    video = Reshape (colours, shape)
}"""
"""A decoder with a 3x3 convolution before and one after upsampling: it looks 3 pixels far."""
ENCODER = """g (float[B,F,3,H,W] video) => (float[B,F,4,h,w] latents)
{
    size = Shape <start=2, end=5> (video)
    any = Constant <value_ints=[-1]> ()
    flat = Concat <axis=0> (any, size)
    images = Reshape (video, flat)
    small = Conv <pads=[1, 1, 1, 1], strides=[2, 2]> (images, weight)
    rows = Shape <start=0, end=2> (video)
    rest = Shape <start=1, end=4> (small)
    shape = Concat <axis=0> (rows, rest)
    latents = Reshape (small, shape)
}"""


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).uniform(-1, 1, shape).astype(np.float32)


@pytest.fixture(scope="module")
def convolutions(bundle_with: Callable[..., Path]) -> Bundle:
    """A bundle whose VAE has receptive fields."""
    decoder = (CONVOLUTIONS, {"inner": weights(6, 4, 3, 3), "outer": weights(3, 6, 3, 3)})
    return Bundle.open(bundle_with(decoder=decoder, image_encoder=(ENCODER, {"weight": weights(4, 3, 3, 3)})))


@pytest.fixture
def backend(convolutions: Bundle) -> Iterator[Backend]:
    with open_backend("onnxruntime", convolutions, 1) as opened:
        yield opened


@pytest.fixture
def facts(toy_bundle: Bundle) -> ModelFacts:
    return toy_bundle.manifest.model


def bucket_of(low: int = 8, batch: int = 1, frames: int = 1) -> Bucket:
    sizes = Range(min=low, typical=4096, max=4096)
    return Bucket(
        name="any",
        batch=Range(min=batch, typical=8, max=8),
        frames=Range(min=frames, typical=64, max=64),
        height=sizes,
        width=sizes,
    )


def sizes(model: ModelFacts, batch: int, frames: int, height: int, width: int) -> dict[str, int]:
    return dimensions(
        model, batch=batch, model_batch=batch, video_frames=frames, height=height, width=width, text_tokens=1
    )


def summed(cut: Cut, unit: int) -> np.ndarray:
    """Sum of all windows at every value of the axis."""
    total = np.zeros(cut.total * unit)
    for part, window in zip(cut.slices(unit), cut.windows(unit), strict=True):
        total[part] += window
    return total


@given(cut=CUTS, unit=UNITS)
def test_tiles_have_one_size_and_cover_everything(cut: Cut, unit: int) -> None:
    covered = np.zeros(cut.total * unit, dtype=np.bool_)
    for part in cut.slices(unit):
        assert 0 <= part.start < part.stop <= len(covered)
        assert part.stop - part.start == cut.size * unit
        covered[part] = True
    assert covered.all()
    assert len(set(cut.starts)) == len(cut.starts)


@given(cut=CUTS, unit=UNITS)
def test_weights_are_shares_that_sum_to_one(cut: Cut, unit: int) -> None:
    assert all((window >= 0).all() for window in cut.windows(unit))
    np.testing.assert_allclose(summed(cut, unit), 1, rtol=2 * EPS)


@given(cut=CUTS, unit=UNITS)
def test_at_most_two_tiles_make_a_value(cut: Cut, unit: int) -> None:
    used = np.zeros(cut.total * unit, dtype=np.int64)
    for part, window in zip(cut.slices(unit), cut.windows(unit), strict=True):
        used[part] += window > 0
    assert used.max() <= 2


@given(total=st.integers(1, 200), size=st.integers(4, 70), unit=UNITS)
def test_the_quarter_overlap_next_to_a_neighbour_is_not_used(total: int, size: int, unit: int) -> None:
    cut = tiles(total, size)
    margin = (size // 4) * unit // 4
    last = len(cut.starts) - 1
    for index, window in enumerate(cut.windows(unit)):
        assert index == 0 or not window[:margin].any()
        assert index == last or not window[len(window) - margin :].any()


def test_neighbours_cross_over_along_a_straight_line() -> None:
    """Tiles of 16 that overlap by 4: the line runs over the middle 2 latents, 4 pixels each."""
    cut = tiles(28, 16)
    assert cut.starts == (0, 12)
    expected = np.concatenate([np.ones(52), (7.5 - np.arange(8)) / 8, np.zeros(4)])
    np.testing.assert_allclose(cut.windows(4)[0], expected, atol=1e-7)
    np.testing.assert_allclose(cut.windows(4)[1], np.concatenate([expected[::-1]]), atol=1e-7)


@given(total=st.integers(1, 100), size=st.integers(1, 30))
def test_chunks_cover_everything_in_whole_pieces(total: int, size: int) -> None:
    cut = chunks(total, size)
    assert sorted({index for part in cut.slices(1) for index in range(part.start, part.stop)}) == list(range(total))
    assert {part.stop - part.start for part in cut.slices(1)} == {min(size, total)}
    assert len(cut.starts) == -(-total // size)


def test_what_fits_is_one_piece(facts: ModelFacts) -> None:
    plan = plan_tiles(facts, bucket_of(), sizes(facts, 4, 16, 128, 128))
    assert plan.piece(facts) == sizes(facts, 4, 16, 128, 128) | {"text_tokens": facts.max_text_tokens}
    assert not plan.tiled


@given(batch=st.integers(1, 8), frames=st.integers(1, 64), rows=st.integers(4, 512), columns=st.integers(4, 512))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_memory_is_bounded(facts: ModelFacts, batch: int, frames: int, rows: int, columns: int) -> None:
    height, width = 8 * rows, 8 * columns
    piece = plan_tiles(facts, bucket_of(), sizes(facts, batch, frames, height, width)).piece(facts)
    assert piece["batch"] * piece["video_frames"] * piece["height"] * piece["width"] <= PIXELS_AT_ONCE


@pytest.mark.parametrize("tile", [None, 1024])
def test_no_piece_is_smaller_than_the_bucket(facts: ModelFacts, tile: int | None) -> None:
    bucket = bucket_of(low=1024, batch=2, frames=3)
    piece = plan_tiles(facts, bucket, sizes(facts, 5, 7, 2048, 4096), tile).piece(facts)
    assert (piece["batch"], piece["video_frames"], piece["height"], piece["width"]) == (2, 3, 1024, 1024)


def test_zero_is_the_whole_video_at_once(facts: ModelFacts) -> None:
    dims = sizes(facts, 3, 64, 2048, 2048)
    assert plan_tiles(facts, bucket_of(), dims, 0).piece(facts) == dims | {"text_tokens": facts.max_text_tokens}


def test_a_causal_vae_takes_all_frames_in_smaller_tiles(facts: ModelFacts) -> None:
    causal = facts.model_copy(update={"temporal_factor": 8, "causal_vae": True, "spatial_factor": 32})
    small = plan_tiles(causal, bucket_of(), sizes(causal, 2, 33, 448, 448))
    assert not small.tiled
    large = plan_tiles(causal, bucket_of(), sizes(causal, 2, 33, 768, 768))
    assert large.piece(causal) == sizes(causal, 1, 33, 512, 512) | {"text_tokens": causal.max_text_tokens}


@pytest.mark.parametrize("tile", [-8, 6, 63, 1])
def test_impossible_tiles(facts: ModelFacts, tile: int) -> None:
    with pytest.raises(
        RequestError, match=f"decode_tile is {tile}; this bundle takes 8 or more in multiples of 2, or 0"
    ):
        check_tile(facts, bucket_of(), tile)
    for possible in (None, 0, 8, 64):
        check_tile(facts, bucket_of(), possible)


def plan_of(tile: int, batch: int, frames: int, height: int, width: int) -> TilePlan:
    """Latents of this size in tiles of ``tile`` latents, two frames at a time."""
    return TilePlan(
        batch=chunks(batch, 1), frames=chunks(frames, 2), height=tiles(height, tile), width=tiles(width, tile)
    )


def coded(backend: Backend, model: ModelFacts, graph: str, plan: TilePlan, array: np.ndarray) -> np.ndarray:
    spec = graph_specs(model, "float32")[graph]
    whole = sizes(model, plan.batch.total, plan.frames.total, plan.height.total * 2, plan.width.total * 2)
    result = np.full(spec.outputs[0].sized(whole), np.nan, dtype=np.float32)
    run = TiledGraph(backend, spec, lambda inputs, outputs: backend.bind(graph, inputs, outputs), model, plan)
    for rows, frames, part in run(array):
        result[rows, frames] = part
    return result


@pytest.mark.parametrize(("graph", "shape"), [("decoder", (2, 5, 4, 60, 44)), ("image_encoder", (2, 5, 3, 120, 88))])
def test_a_short_sighted_vae_does_not_notice_tiles(
    convolutions: Bundle, backend: Backend, graph: str, shape: tuple[int, ...]
) -> None:
    """Tiles of 24 latents leave out 1.5 latents, 3 pixels, at their edges: as far as this decoder looks."""
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    whole = TilePlan(batch=chunks(2, 2), frames=chunks(5, 5), height=tiles(60, 60), width=tiles(44, 44))
    model = convolutions.manifest.model
    wanted = coded(backend, model, graph, whole, array)
    got = coded(backend, model, graph, plan_of(24, 2, 5, 60, 44), array)
    # Two orders of a sum of 54 products (9 * 6 in the widest convolution): sqrt(54) roundings of the largest value.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=54**0.5 * EPS * np.abs(wanted).max())


def test_the_gate_above_sees_tiles_that_overlap_too_little(convolutions: Bundle, backend: Backend) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 2, 4, 60, 44)).astype(np.float32)
    model = convolutions.manifest.model
    whole = TilePlan(batch=chunks(1, 1), frames=chunks(2, 2), height=tiles(60, 60), width=tiles(44, 44))
    wanted = coded(backend, model, "decoder", whole, latents)
    got = coded(backend, model, "decoder", plan_of(8, 1, 2, 60, 44), latents)
    assert np.abs(got - wanted).max() > 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("tile", [2, 3, 5, 8])
def test_a_constant_video_stays_constant(toy_bundle: Bundle, tile: int) -> None:
    """The toy decoder copies pixels: whatever the tiles, the weights of a constant give it back."""
    model = toy_bundle.manifest.model
    latents = np.full((1, 3, 4, 11, 13), 0.7, dtype=np.float32)
    with open_backend("onnxruntime", toy_bundle, 1) as opened:
        got = coded(opened, model, "decoder", plan_of(tile, 1, 3, 11, 13), latents)
    np.testing.assert_allclose(got, 0.7, rtol=4 * EPS)


def test_pipeline_in_tiles_makes_the_same_video(convolutions: Bundle) -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (120, 88, 3), dtype=np.uint8))
    options: dict[str, Any] = {"image": image, "height": 120, "width": 88, "num_inference_steps": 1, "seed": 0}
    with StivPipeline.from_bundle(convolutions.folder, "onnxruntime", 1) as pipe:
        whole = pipe(["digit", "left"], **options, decode_tile=0)
        again = pipe(["digit", "left"], **options)
        tiled = pipe(["digit", "left"], **options, decode_tile=48)
    np.testing.assert_array_equal(again.frames, whole.frames)
    np.testing.assert_allclose(tiled.latents, whole.latents, rtol=0, atol=1e-5)
    assert isinstance(tiled.frames, np.ndarray)
    assert isinstance(whole.frames, np.ndarray)
    assert np.abs(tiled.frames.astype(int) - whole.frames).max() <= 1  # a value next to the edge of two pixel values


@pytest.mark.parametrize("tile", [None, 0, 8])
def test_frames_are_the_same_with_and_without_their_graph(toy_bundle: Bundle, tile: int | None) -> None:
    """In whole frames by the graph, in tiles by the host; a bundle of an older export always by the host."""
    graphs = {name: record for name, record in toy_bundle.manifest.graphs.items() if name != FRAMES}
    older = Bundle(toy_bundle.folder, toy_bundle.manifest.model_copy(update={"graphs": graphs}))
    made, called = [], []
    for bundle in (toy_bundle, older):
        with open_backend("onnxruntime", bundle, 1) as opened:
            pipe = StivPipeline(bundle, opened)
            made.append(pipe("digit", num_inference_steps=1, seed=3, height=12, width=12, decode_tile=tile).frames)
            called.append(pipe.clock.calls[FRAMES])
    np.testing.assert_array_equal(made[0], made[1])
    assert called == [int(tile != 8), 0]


def test_chunks_go_through_the_graph_of_frames_one_after_another(toy_bundle: Bundle) -> None:
    model, latents = toy_bundle.manifest.model, np.random.default_rng(0).standard_normal((2, 5, 4, 6, 4), np.float32)
    specs = graph_specs(model, "float32")
    plan = TilePlan(batch=chunks(2, 1), frames=chunks(5, 2), height=tiles(6, 6), width=tiles(4, 4))
    frames = np.zeros((2, 5, 12, 8, 3), np.uint8)
    with open_backend("onnxruntime", toy_bundle, 1) as opened:
        wanted = frames_from_video(coded(opened, model, "decoder", plan, latents))
        decoder, after = (partial(opened.bind, name) for name in ("decoder", FRAMES))
        run = TiledGraph(opened, specs["decoder"], decoder, model, plan, (specs[FRAMES], after))
        for rows, columns, part in run(latents):
            frames[rows, columns] = part
    np.testing.assert_array_equal(frames, wanted)


def test_pipeline_refuses_an_impossible_tile_before_it_computes(convolutions: Bundle) -> None:
    with StivPipeline.from_bundle(convolutions.folder, "onnxruntime", 1) as pipe:
        for tile, message in ((3, "decode_tile is 3"), (2.5, "decode_tile must be a whole number")):
            with pytest.raises(RequestError, match=message):
                pipe("digit", decode_tile=tile)  # type: ignore[arg-type]
