"""Times and tables of the kernel benchmark, its cases, contenders and the guidance step."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from stiv_deploy.stiv_ref.config import model_config

Load = Callable[[str], ModuleType]
Program = Callable[[str, str], Path]


# Cases: the definition of the limit


@pytest.mark.parametrize(
    ("name", "megabytes", "goal"),
    [
        ("temporal-XL-S256-T20", 94, 0.70),
        ("temporal-XL-S1024-T20", 377, 0.85),
        ("temporal-M-S1024-T20", 1007, 0.85),
        ("temporal-M-S1024-T40", 2013, 0.85),
        ("temporal-M-S1024-T40-fp8", 2013 * 7 / 8, 0.85),
        ("spatial-XL-S1024-T20", 377 * 12 / 8, 0.85),
        ("spatial-XL-S1024-T20-fp8", 377 * 9 / 8, 0.85),
    ],
)
def test_bytes_and_goals_of_the_roofline(kernels: Load, name: str, megabytes: float, goal: float) -> None:
    (case,) = [case for case in kernels("cases").all_cases() if case.name == name]
    assert case.nbytes / 1e6 == pytest.approx(megabytes, rel=0.01)
    assert case.goal == goal


def test_cases_have_the_models_sizes_and_names_of_their_own(kernels: Load) -> None:
    cases = kernels("cases").all_cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        config = model_config(case.model)
        assert (case.heads, case.head_dim, case.width) == (config.heads, config.head_dim, config.width)


# Times


def test_functions_take_turns(times: ModuleType) -> None:
    calls: list[tuple[str, int]] = []
    works = {name: lambda number, name=name: calls.append((name, number)) for name in "ab"}
    found = times.interleaved(works, 3, 2, "cpu")
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 3
    for timing in found.values():
        assert 0 <= timing.low_us <= timing.median_us <= timing.high_us
        assert timing.how == "host"


def test_rates_follow_from_times(times: ModuleType) -> None:
    assert times.Timing(20.0, 19.0, 21.0).rate(94e6) == pytest.approx(4.7e12)
    assert times.copy_rate("cpu", 4096) > 0


def test_buffers_together_exceed_every_cache(times: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "cold_bytes", lambda device: 150_000_000)
    for nbytes in (1_000_000, 94_000_000, 2_000_000_000):
        # what lies between two uses of the same set
        assert (times.buffer_sets(nbytes, "cuda") - 1) * nbytes >= 150_000_000


class FakeCuda:
    """Stands in for the parts of ``torch.cuda`` that timing uses; launches take 3 us, everything is logged."""

    def __init__(self, patch: pytest.MonkeyPatch, *, capturable: bool) -> None:
        self.log: list[str] = []
        self.clock = 0.0
        self._recording = False
        context = contextlib.nullcontext()
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "device": lambda device: context,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: context,
            "synchronize": lambda: self.log.append("synchronize"),
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": self.graph,
            "Event": self.event,
            "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60_000_000),
        }.items():
            patch.setattr(torch.cuda, name, value)
        self._capturable = capturable

    def launch(self, number: int) -> None:
        self.log.append(f"launch {number}")
        if self._recording and not self._capturable:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.clock += 3e-3

    def replay(self) -> None:
        self.log.append("replay")
        self.clock += 5 * 3e-3

    @contextlib.contextmanager
    def graph(self, graph: object) -> Iterator[None]:
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(time=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "time", self.clock)
        event.elapsed_time = lambda stop: stop.time - event.time
        return event


@pytest.mark.parametrize("capturable", [True, False])
def test_graphs_are_replayed_and_what_cannot_be_captured_is_launched(
    times: ModuleType, monkeypatch: pytest.MonkeyPatch, capturable: bool
) -> None:
    cuda = FakeCuda(monkeypatch, capturable=capturable)
    (timing,) = times.interleaved({"kernel": cuda.launch}, 4, 5, "cuda").values()
    assert timing.how == ("graph" if capturable else "stream")
    assert timing.median_us == pytest.approx(3)
    assert cuda.log[:3] == ["launch 0", "launch 1", "launch 2"]  # warm-up, before anything is captured
    assert cuda.log.count("replay") == (2 * (4 + 1) if capturable else 0)  # each with one before it that hides gaps
    assert times.buffer_sets(94e6, "cuda") == 3


def test_no_case_is_begun_without_time(kernels: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    speed = kernels("speed")
    monkeypatch.setattr(speed, "copy_rate", lambda device, nbytes: 4e12)
    bench = kernels("contenders").Bench(library=None, device=torch.device("cuda"), deadline=0.0)
    outcome = speed.measure(bench, kernels("cases").all_cases(), None, lambda outcome: None)
    assert outcome.status == "not run"
    assert outcome.markdown.count("no time left") == len(kernels("cases").all_cases())


def test_cases_that_do_not_fit_are_left_out(kernels: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    speed, contenders = kernels("speed"), kernels("contenders")
    FakeCuda(monkeypatch, capturable=True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(speed, "copy_rate", lambda device, nbytes: 4e12)
    monkeypatch.setattr(speed, "plan_of", lambda bench, case: None)
    bench = contenders.Bench(library=None, device=torch.device("cuda"), deadline=time.monotonic() + 60)
    (large,) = [case for case in kernels("cases").all_cases() if case.name == "temporal-M-S1024-T40"]
    outcome = speed.measure(bench, [large], None, lambda outcome: None)
    assert "out of memory: 8 GiB are free, too few" in outcome.markdown


def test_contenders_that_fail_or_compute_something_else_are_told(kernels: Load) -> None:
    contenders = kernels("contenders")

    def fails(number: int) -> torch.Tensor:
        raise ValueError("head size must be a power of two\nand more")

    lineup = contenders.Field(
        {"flex": fails, "compile": lambda number: -torch.ones(3), "eager": lambda _: torch.ones(3)}
    )
    for name in ("flex", "compile", "eager"):
        contenders._check_same(lineup, name, torch.ones(3))
    assert list(lineup.works) == ["eager"]
    assert lineup.absent["flex"] == "ValueError: head size must be a power of two"
    assert "relative distance 2" in lineup.absent["compile"]


def test_machine_is_described(kernels: Load, program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = kernels("machine")
    gpu = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141e9, L2_cache_size=60e6
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    found = machine.describe_machine(torch.device("cuda"))
    assert (found["capability"], found["peak_bytes_per_second"]) == ("9.0", 4.8e12)
    assert machine.slug(found["device"]) == "nvidia-h200"
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    program("nvidia-smi", "echo 'NVIDIA H200, 580.1, 1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 40, 700.00 W'")
    assert machine.clocks()["clocks.sm"] == "1980 MHz"
    program("nvidia-smi", "exit 9")
    assert machine.clocks() == {}


# Tables


def timings(times: ModuleType, **medians: float) -> dict[str, object]:
    return {name: times.Timing(us, us, us) for name, us in medians.items()}


def test_speed_report_has_ratios_goals_and_gaps(kernels: Load, times: ModuleType) -> None:
    speed, cases = kernels("speed"), kernels("cases").all_cases()
    rows = [
        speed.Row(cases[1], timings(times, kernel=100, copy=90, eager=900, compile=400), {"flex": "no"}, 4e12, 4.8e12),
        speed.Row(cases[0], timings(times, kernel=50, copy=25, eager=90, compile=100), {}, 4e12, None),
        speed.Row(cases[4], {}, {"kernel": "out of memory"}, 4e12, None),
    ]
    assert rows[0].goals() == {"85% of copy": True, "3x over compile": True}
    assert rows[1].goals() == {"70% of copy": False, "3x over compile": False}
    outcome = speed.report(rows, 4e12, 1.0)
    assert outcome.status == "measured"
    assert "Goals met: 2 of 4" in outcome.markdown
    rate = cases[1].nbytes / 100e-6
    assert f"| 90% | {rate / 4e12:.0%} | {rate / 4.8e12:.0%} | 85% of copy: met" in outcome.markdown
    assert "900.0 (9.00x) | 400.0 (4.00x) | -" in outcome.markdown
    assert "FlexAttention: no" in outcome.markdown
    assert "out of memory" in outcome.markdown
    json.dumps(outcome.data, allow_nan=False)


# Step


def test_guided_step_replaces_frames_and_hides_them_from_the_unconditional_branch(kernels: Load) -> None:
    step = kernels("step")
    state = step.new_state(torch.Generator().manual_seed(0), 16)
    latents, branches = step.guided_step(state)
    assert torch.equal(latents[:, 0], state.clean[:, 0])
    assert torch.equal(branches[0], latents)
    assert torch.equal(branches[1, :, 1:], latents[:, 1:])
    assert torch.allclose(branches[1, :, 0], 0.5 * state.clean[:, 0] + 0.5 * state.noise[:, 0])
    moved = (latents - state.latents)[:, 1:] / step.STEP  # renormalized: as long as the conditional velocity
    norms = [v.flatten(1).norm(dim=1) for v in (moved, state.velocity[0][:, 1:])]
    assert torch.allclose(*norms, rtol=1e-3)


def test_what_a_kernel_for_the_step_saves_of_a_sampling_step(kernels: Load) -> None:
    times = {"copy": 2.0, "eager": 60.0, "compile": 12.0}
    row = {"pixels": 256, "times": {name: {"median_us": value} for name, value in times.items()}}
    blocks = [
        {"case": {"model": "XL", "pixels": 256}, "timing": {"median_us": us} if us else None}
        for us in (900.0, 500.0, 0)
    ]
    (line,) = kernels("step").verdict({"rows": [row]}, blocks)
    assert "at most 10.0 us" in line
    assert f"{10 / (28 * 500 + 12):.3%}" in line
    assert kernels("step").verdict({"rows": [row]}, []) == []


# Sweep


def test_sweep_changes_constants_that_are_there(kernels: Load) -> None:
    sweep = kernels("sweep")
    source = (sweep.ROOT / sweep.HEURISTICS).read_text()
    for constants in sweep.VARIANTS.values():
        changed = sweep.changed(source, constants)
        for name, value in constants.items():
            assert f"constexpr int {name} = {value};" in changed
    with pytest.raises(kernels("errors").BenchmarkError, match="no constant kGone"):
        sweep.changed(source, {"kGone": "1"})
