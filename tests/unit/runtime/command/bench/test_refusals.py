"""Each way to measure or compare unfairly is refused, and no fair one is."""

from typing import Any

import pytest
from measured import MODEL, SECONDS, WORK, a_point, a_report, a_sample

from stiv_deploy.runtime.bundle.verified import State
from stiv_deploy.runtime.command.bench.record import BenchReport, CacheProbe, Clocks, Machine, Verification, WarmUp
from stiv_deploy.runtime.command.bench.refusals import SAID, faults, pair_faults, refuse
from stiv_deploy.runtime.command.bench.statistics import ratio
from stiv_deploy.runtime.errors import MeasurementError

WIDE = WORK.model_copy(update={"width": 12})
UNFAIR: dict[str, tuple[dict[str, Any], str]] = {
    "warm-up of another size": (
        {"warm_up": WarmUp(work=WIDE, seconds=(1.0,) * 6, stable=True)},
        "the warm-up was 1 clip of 4x8x12, 4 steps, what was measured 1 clip of 4x8x8, 4 steps; warm up with the same",
    ),
    "buffers were made": (
        {"samples": (a_sample(1.0, bound=5), *map(a_sample, SECONDS[1:]))},
        "samples of 1 clip of 4x8x8, 4 steps had to load graphs or make buffers: the warm-up was of another size",
    ),
    "still faster": (
        {"warm_up": WarmUp(work=WORK, seconds=(2.0,) * 40, stable=False)},
        "after 40 samples of warm-up those of 1 clip of 4x8x8, 4 steps still got faster; measure when it is quiet",
    ),
    "too few samples": (
        {"samples": tuple(map(a_sample, SECONDS[:35]))},
        "35 samples are too few for the percentile 90; take 36 or more",
    ),
    "other work": ({"others": 0.2}, "other processes keep 20% of this machine's cores busy, 5% are allowed"),
    "who knows what": ({"others": None}, "what else this machine does is not known"),
}


def test_a_fair_measurement_has_no_fault() -> None:
    assert faults(a_report()) == []


@pytest.mark.parametrize("case", UNFAIR)
def test_an_unfair_measurement_is_told(case: str) -> None:
    values, words = UNFAIR[case]
    report = a_report((a_point(SECONDS, **values),))
    (fault,) = faults(report)
    assert fault.startswith(words)
    (found,) = pair_faults(a_report(), report)
    assert found.startswith(f"B: {words}"), "nor does a file that hides it compare"


def test_results_that_are_kept_are_told() -> None:
    kept = CacheProbe(repeated=(0.1,) * 6, fresh=(1.0,) * 6, ratio=ratio((0.1,) * 6, (1.0,) * 6))
    (fault,) = faults(a_report(probe=kept))
    assert fault.startswith("a request that comes again takes 10% of the time of a new one")


@pytest.mark.parametrize("state", ["not verified", "failed"])
def test_outputs_that_nobody_has_proven_are_told(state: State) -> None:
    told = Verification(state=state, reason="block_01 gave wrong results")
    assert faults(a_report(verification=told)) == [
        f"the outputs are {state}: block_01 gave wrong results; run 'stiv verify' on the bundle here"
    ]


def worked(**values: Any) -> BenchReport:
    """A measurement of other work."""
    work = WORK.model_copy(update=values)
    return a_report((a_point(SECONDS, work=work, warm_up=WarmUp(work=work, seconds=(1.0,) * 6, stable=True)),))


def clocked(**values: Any) -> BenchReport:
    return a_report((a_point(SECONDS, clocks=Clocks(**values)),))


APART = {
    "steps": (worked(steps=8, evaluations=8), "steps (4 against 8)"),
    "guidance": (worked(guidance="none", rows=1), "guidance (jit 3 against none)"),
    "solver": (worked(solver="heun", evaluations=8), "solver (euler against heun)"),
    "size": (worked(width=12), "size (1x4x8x8 against 1x4x8x12)"),
    "batch": (worked(batch=2, rows=4), "size (1x4x8x8 against 2x4x8x8)"),
    "pictures": (worked(given=1), "given pictures (0 against 1)"),
    "caches": (a_report(caches=("texts",)), "caches (none against texts)"),
    "threads": (a_report(threads=1), "threads (2 against 1)"),
    "governor": (
        clocked(governor="powersave", cpu_most_mhz=3000.0),
        "clocks (CPU performance up to 3000.0 MHz against powersave up to 3000.0 MHz)",
    ),
    "gpu clock": (
        clocked(governor="performance", cpu_most_mhz=3000.0, gpu_mhz=1500),
        "clocks (GPU unknown against 1500 MHz)",
    ),
    "transport": (a_report(transport="http"), "transport (in-process against http)"),
    "ranges": (a_report(nvtx=True), "ranges of NVTX (without against with)"),
    "points": (a_report((a_point(SECONDS), a_point(SECONDS))), "number of points (1 against 2)"),
    "machine": (
        a_report(machine=Machine(cpu="another", cores=2, memory_gib=8.0, gpus=(), system="Linux")),
        "machine (a processor, 2 cores, no GPU against another, 2 cores, no GPU)",
    ),
    "model": (
        a_report(bundle=a_report().bundle.model_copy(update={"model": MODEL.model_copy(update={"blocks": 3})})),
        "model (of one shape against of another)",
    ),
}


@pytest.mark.parametrize("case", APART)
def test_measurements_of_different_things_do_not_compare(case: str) -> None:
    other, words = APART[case]
    for base, ours in ((a_report(), other), (other, a_report())):
        assert len(pair_faults(base, ours)) == 1
    (fault,) = pair_faults(a_report(), other)
    assert fault.startswith(f"A and B differ in {words}")
    name = words.partition(" (")[0]
    assert (f"if that is meant, say --differ {name}" in fault) == (name in SAID)
    assert (pair_faults(a_report(), other, SAID) == []) == (name in SAID)


def test_gpu_clocks_may_differ_a_little() -> None:
    one, other = (clocked(gpu_mhz=each) for each in (1980, 1965))
    assert pair_faults(one, other) == []
    assert pair_faults(one, clocked(gpu_mhz=1900)) == ["A and B differ in clocks (GPU 1980 against 1900 MHz)"]


def test_other_bundles_backends_and_versions_compare() -> None:
    quantized = a_report().bundle.model_copy(update={"hash": "1" * 64, "quantization": "int8"})
    assert pair_faults(a_report(), a_report(bundle=quantized, backend="tensorrt", versions={})) == []


def test_what_is_invalid_stays_so() -> None:
    assert pair_faults(a_report(invalid=("too loud",)), a_report()) == ["A is invalid: too loud"]


def test_a_refusal_is_one_line_and_names_the_way_around() -> None:
    refuse([], anyway=False)
    refuse(["a", "b"], anyway=True)
    with pytest.raises(MeasurementError, match=r"^a; and 1 more; --anyway measures all the same and marks"):
        refuse(["a", "b"], anyway=False)
