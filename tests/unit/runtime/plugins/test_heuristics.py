"""How work is cut into thread blocks: everything is covered, shared memory suffices, segments fill their sectors."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stiv_deploy.runtime.plugins.library import POINTERS, KernelDtype, KernelLibrary, SpatialQkv, TemporalAttention

HEAD_DIMS = (32, 48, 64, 72, 96, 128)
MAX_SHARED = 48 << 10  # without opt-in
H200_SHARED, H200_SMS = 227 << 10, 132
NO_INPUTS = dict.fromkeys(POINTERS, 0)
BF16 = {"dtype": KernelDtype.BFLOAT16, "output_dtype": KernelDtype.BFLOAT16}
XL = TemporalAttention(**NO_INPUTS, **BF16, output=0, batch=2, frames=20, positions=256, heads=18, head_dim=64)
M = replace(XL, positions=1024, heads=48)

sizes = st.tuples(
    st.integers(1, 4), st.integers(1, 64), st.integers(1, 5000), st.integers(1, 48), st.sampled_from(HEAD_DIMS)
)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@settings(max_examples=300, deadline=None)
@given(size=sizes, dtype=st.sampled_from([KernelDtype.FLOAT32, KernelDtype.FLOAT16, KernelDtype.BFLOAT16]))
def test_temporal_blocks_cover_everything_once(
    emulated: KernelLibrary, size: tuple[int, int, int, int, int], dtype: KernelDtype
) -> None:
    batch, frames, positions, heads, head_dim = size
    call = replace(XL, batch=batch, frames=frames, positions=positions, heads=heads, head_dim=head_dim)
    plan = emulated.temporal_attention_plan(replace(call, dtype=dtype, output_dtype=dtype))
    assert plan.blocks == batch * ceil_div(positions, plan.positions_per_block) * ceil_div(heads, plan.heads_per_block)
    assert 1 <= plan.heads_per_block <= heads
    assert 1 <= plan.positions_per_block <= positions
    assert plan.shared_bytes <= MAX_SHARED
    assert plan.threads in (128, 256)
    items = plan.heads_per_block * plan.positions_per_block
    if dtype == KernelDtype.FLOAT32:
        assert (plan.tiles, items) == (0, 1)
        assert plan.shared_bytes >= frames * head_dim * 4 + plan.threads // 32 * head_dim * 4
    else:
        assert plan.tiles == ceil_div(frames, 16)
        assert plan.shared_bytes >= 3 * items * frames * head_dim * 2
        assert 1 <= plan.splits <= items


@settings(max_examples=200, deadline=None)
@given(size=sizes, fp32=st.booleans())
def test_pre_processing_blocks_cover_everything_once(
    emulated: KernelLibrary, size: tuple[int, int, int, int, int], fp32: bool
) -> None:
    rows, _, positions, heads, head_dim = size
    dtype = KernelDtype.FLOAT32 if fp32 else KernelDtype.BFLOAT16
    sizes = {"rows": rows, "positions": positions, "heads": heads, "head_dim": head_dim}
    call = SpatialQkv(**NO_INPUTS, q=0, k=0, v=0, **sizes, dtype=dtype, output_dtype=dtype)
    plan = emulated.spatial_qkv_plan(call)
    assert plan.blocks == rows * ceil_div(positions, plan.positions_per_block) * ceil_div(heads, plan.heads_per_block)
    assert plan.shared_bytes <= MAX_SHARED
    tile = plan.positions_per_block * plan.heads_per_block
    assert plan.shared_bytes >= 3 * tile * head_dim * dtype.itemsize


@pytest.mark.parametrize(
    "call", [XL, replace(XL, positions=1024), M, replace(M, frames=40), replace(M, heads=24, head_dim=128)], ids=str
)
def test_model_sizes_keep_memory_busy(emulated: KernelLibrary, call: TemporalAttention) -> None:
    """29 KB in flight on an SM hide 0.8 us at 4.8 TB/s; blocks must come in several waves for their phases to mix."""
    plan = emulated.temporal_attention_plan(call)
    blocks_per_sm = min(4, H200_SHARED // (plan.shared_bytes + 1024))
    assert blocks_per_sm >= 4
    assert blocks_per_sm * plan.shared_bytes >= 3 * (29 << 10)
    assert plan.blocks >= 2 * H200_SMS * blocks_per_sm
    assert plan.heads_per_block * call.head_dim * 2 % 32 == 0  # whole sectors


@pytest.mark.parametrize("frames", [1, 8, 16, 20, 33])
def test_heads_of_72_come_in_pairs(emulated: KernelLibrary, frames: int) -> None:
    assert emulated.temporal_attention_plan(replace(XL, frames=frames, heads=16, head_dim=72)).heads_per_block % 2 == 0


def test_few_positions_are_spread_over_the_gpu(emulated: KernelLibrary) -> None:
    small = replace(XL, frames=1, positions=64, batch=1, heads=2)
    assert emulated.temporal_attention_plan(small).positions_per_block == 1
    assert emulated.temporal_attention_plan(replace(small, positions=200_000)).positions_per_block > 1
