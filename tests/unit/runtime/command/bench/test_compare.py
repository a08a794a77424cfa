"""Two measurements side by side."""

import pytest
from measured import SECONDS, a_point, a_report

from stiv_deploy.runtime.command.bench.compare import compare
from stiv_deploy.runtime.errors import MeasurementError, RequestError


def test_ratios_are_of_ours_over_base() -> None:
    found = compare(a_report(), a_report((a_point([0.5 * each for each in SECONDS]),), backend="tensorrt"))
    (point,) = found.points
    assert point.latency.value == pytest.approx(0.5)
    assert point.latency.low < 0.5 < point.latency.high < 0.51
    assert (point.base_seconds, point.our_seconds) == (pytest.approx(1.003), pytest.approx(0.5015))
    assert point.stages["load"] is None
    assert (found.base.backend, found.ours.backend, found.said, found.invalid) == ("onnxruntime", "tensorrt", {}, ())


def test_what_is_meant_is_told() -> None:
    assert compare(a_report(), a_report(caches=("texts",)), ["caches"]).said == {"caches": "none against texts"}
    with pytest.raises(RequestError, match="what may differ, if it is meant, are steps, guidance, solver"):
        compare(a_report(), a_report(), ["threads"])


def test_anyway_is_invalid() -> None:
    with pytest.raises(MeasurementError, match="threads"):
        compare(a_report(), a_report(threads=1))
    assert compare(a_report(), a_report(threads=1), anyway=True).invalid == ("A and B differ in threads (2 against 1)",)
