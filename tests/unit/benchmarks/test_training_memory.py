"""The memory plan: its counting against hand counts, autograd's own, and the real peak of a process; its arithmetic."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stiv_deploy.stiv_ref.config import CONFIGS, StivConfig
from stiv_deploy.stiv_ref.errors import ConfigError
from stiv_deploy.stiv_ref.model import Stiv

NARROW = StivConfig(name="narrow", blocks=3, width=64, heads=4, text_width=32, base_frames=4, frequency_width=32)
MIB = 2**20


@pytest.fixture
def plan(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("training_memory")


@pytest.fixture
def live(benchmark_module: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_module("live_bytes")


def test_live_bytes_by_hand(live: ModuleType) -> None:
    given = torch.ones(1000)
    with live.LiveBytes() as count:
        first = given + 1
        second = first.view(10, 100)  # the same bytes
        assert (count.now, count.peak) == (4000, 4000)
        third = second.double()
        del first, second
        assert (count.now, count.peak) == (8000, 12000)
        third.untyped_storage().resize_(0)
        assert count.now == 0
        third.untyped_storage().resize_(16000)
        assert (count.now, count.peak) == (16000, 16000)
    assert torch.UntypedStorage.resize_.__name__ == "resize_"
    torch.ones(3).untyped_storage().resize_(0)
    assert count.now == 16000


def test_what_existed_does_not_count(live: ModuleType) -> None:
    weight, other = torch.ones(10, 10), torch.ones(10, 10)
    with live.LiveBytes([weight]) as count:
        weight.t()
        assert count.now == 0
        kept = other.t()
        assert count.now == 400
    del kept


def test_saved_bytes_by_hand(live: ModuleType) -> None:
    layer, x = nn.Linear(10, 20), torch.ones(5, 10, requires_grad=True)
    with live.Saved(layer) as saved:
        y = layer(x)  # saves x, and a weight, which does not count
        z = y.sin() * y.sin()  # saves y, once, and two sines
    assert saved.bytes == 4 * (50 + 3 * 100)
    del z


def test_gpu_types_reach_what_is_computed_again(live: ModuleType) -> None:
    originals = (F.linear, F.layer_norm, F.rms_norm)
    seen: list[torch.dtype] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, weight)
        high = F.rms_norm(low, (4,), weight=weight[0], eps=1e-6)
        seen.extend((low.dtype, high.dtype, F.layer_norm(low, (4,)).dtype))
        return low * high

    with FakeTensorMode(), live.gpu_kernels(torch.bfloat16):
        weight = torch.ones(4, 4, requires_grad=True)
        out = torch.utils.checkpoint.checkpoint(block, torch.randn(2, 4), use_reentrant=False)
        out.sum().backward()
        assert weight.grad is not None
    assert seen == [torch.bfloat16, torch.float32, torch.float32] * 2
    assert originals == (F.linear, F.layer_norm, F.rms_norm)


def test_the_fused_norm_saves_its_input_once(live: ModuleType) -> None:
    with FakeTensorMode():
        x, scale = torch.randn(8, 16, requires_grad=True), nn.RMSNorm(16)
        with live.gpu_kernels(None), live.Saved(scale) as saved:
            y = F.rms_norm(x, (16,), weight=scale.weight, eps=1e-6)
            assert saved.bytes == 4 * (8 * 16 + 8)  # and one number a row
        y.sum().backward()
        assert x.grad is not None
        assert (x.grad.shape, scale.weight.grad.shape) == (x.shape, scale.weight.shape)


def counted_peak(plan: ModuleType, live: ModuleType, config: StivConfig, batch: int, size: int) -> int:
    with FakeTensorMode():
        model = Stiv(config)
        with live.LiveBytes(model.parameters()) as count:
            plan.loss_of(model, batch, 4, size, False).backward()
    return count.peak


REAL = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from training_memory import loss_of
from stiv_deploy.stiv_ref.config import StivConfig
from stiv_deploy.stiv_ref.model import Stiv

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

torch.set_num_threads(1)
model = Stiv(StivConfig.model_validate_json(sys.argv[2])).initialize()
loss_of(model, 1, 4, 32, False).backward()
model.zero_grad()
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
loss_of(model, int(sys.argv[3]), 4, int(sys.argv[4]), False).backward()
print(resident("VmHWM") - before)
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures the resident set on Linux")
def test_counting_agrees_with_the_real_peak_of_a_process(plan: ModuleType, live: ModuleType) -> None:
    """fp32 on the CPU: what the kernel says that the process took, against the count on fake tensors.

    Malloc is told to give large blocks back at once. What small blocks and whole pages come to differs by up to a page
    for each of some hundred tensors (1 MiB), and a matrix product may pack a copy of an operand.
    """
    config, batch, size = NARROW.model_copy(update={"width": 128, "blocks": 4}), 4, 128
    counted = counted_peak(plan, live, config, batch, size)
    command = [
        sys.executable,
        "-c",
        REAL,
        str(Path(plan.__file__).parent),
        config.model_dump_json(),
        str(batch),
        str(size),
    ]
    malloc = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=malloc)
    real = int(done.stdout)
    operand = 4 * batch * 4 * (size // 16) ** 2 * 4 * config.width  # of the FFN
    assert counted > 80 * MIB
    assert -MIB < real - counted < MIB + operand


@pytest.mark.parametrize("world", [8, 64])
def test_shares_are_padded_rows(plan: ModuleType, world: int) -> None:
    """FSDP2 shards the first axis; the first process holds ceil(rows / world) rows of every parameter."""
    shards = plan.share(NARROW, world)
    with torch.device("meta"):
        parameters = list(Stiv(NARROW).parameters())
    expected = sum(4 * math.ceil(each.shape[0] / world) * each[0].numel() for each in parameters)
    assert shards.weights == shards.averages == expected
    assert shards.adamw == 2 * expected
    assert shards.weights > 4 * sum(each.numel() for each in parameters) / world


def test_adafactor_has_one_moment_as_large_as_the_weights_and_little_else(plan: ModuleType) -> None:
    """The other is a row and a column of every matrix; of vectors it is whole."""
    parameters = dict(Stiv(NARROW).named_parameters())
    others = [sum(each.shape) if each.dim() == 2 else each.numel() for each in parameters.values()]
    assert {each.dim() for each in parameters.values()} == {1, 2}
    weights = sum(each.numel() for each in parameters.values())
    assert plan.moment_bytes("adafactor", parameters) == 4 * (weights + sum(others))


def test_kept_is_what_autograd_says(plan: ModuleType, live: ModuleType) -> None:
    """Without sharding, what is alive before the backward pass is what autograd saved, and a few conditions."""
    with FakeTensorMode(), live.gpu_kernels(None):
        model = Stiv(NARROW)
        with live.Saved(model) as saved, live.LiveBytes(model.parameters()) as count:
            loss = plan.loss_of(model, 2, 4, 128, False)
            assert saved.bytes <= count.now <= 1.01 * saved.bytes
    del loss


@pytest.mark.slow
def test_every_block_adds_the_same(plan: ModuleType) -> None:
    config = NARROW.model_copy(update={"blocks": 8})
    plain, recomputed = plan.Variant(False, False), plan.Variant(False, "blocks")
    assert plan.extrapolate(config, plain, 8, 1, 4, 64) == plan.simulate(config, plain, 8, 1, 4, 64)
    assert plan.extrapolate(NARROW, recomputed, 8, 1, 4, 64) == plan.simulate(NARROW, recomputed, 8, 1, 4, 64)


@pytest.mark.slow
def test_switches_save_memory(plan: ModuleType) -> None:
    peaks = {each.name: plan.simulate(NARROW, each, 8, 2, 4, 128) for each in plan.VARIANTS[:4]}
    plain, attention, blocks = (
        peaks[f"all tokens{which}"] for which in ("", ", of all but self-attention", ", checkpointing of blocks")
    )
    assert blocks.kept < attention.kept < 0.5 * plain.kept
    assert max(blocks.peak, attention.peak) < plain.peak
    assert peaks["MaskDiT"].gradients > peaks["all tokens"].gradients  # two more blocks


def test_total_swaps_the_gradients_of_the_simulation(plan: ModuleType) -> None:
    step = plan.Step(peak=1000, kept=600, gradients=100)
    simulated = plan.Shards(weights=100, adamw=200, adafactor=5, averages=100)
    own = plan.Shards(weights=10, adamw=20, adafactor=5, averages=10)
    assert plan.total(own, step, simulated=simulated) == 10 + 20 + 10 + (1000 - 100 + 10)
    assert plan.total(own, step, simulated=simulated, optimizer="adafactor", averages=False) == 10 + 5 + 910


def test_what_fits(plan: ModuleType) -> None:
    room = (80e9 - plan.RESERVE) / plan.SLACK
    assert plan.fits(room, 80e9)
    assert not plan.fits(room * 1.001, 80e9)
    cells = [plan._total_cell(each) for each in (room, 1.5 * room, 2 * room)]
    assert [cell[:2] for cell in cells] == [plan.gib(room)[:2], "**", "~~"]


@pytest.mark.slow
def test_the_whole_plan_of_a_narrow_model(
    plan: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(CONFIGS, "narrow", NARROW)
    monkeypatch.setattr(plan, "VARIANTS", plan.VARIANTS[4:])
    plan.main(out=tmp_path / "plan", model=["narrow"], micro_batch=1, frames=4, size=[32], jobs=1)
    result = json.loads((tmp_path / "plan.json").read_text())
    assert set(result["models"]["narrow"]["totals"]["32"]["MaskDiT, checkpointing of blocks"]) == {"8", "64", "256"}
    page = (tmp_path / "plan.md").read_text()
    assert page.strip() == capsys.readouterr().out.strip()
    assert page.count("| narrow |") == 3 + 2
    assert not torch.distributed.is_initialized()


def test_unknown_model(plan: ModuleType) -> None:
    with pytest.raises(ConfigError, match="no model config named 'XS'"):
        plan.main(out=None, model=["XS"], micro_batch=1, frames=4, size=[32], jobs=1)
