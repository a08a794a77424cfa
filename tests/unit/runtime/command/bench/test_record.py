"""A measurement as a file: read as it was written, or one line."""

import pytest
from measured import a_report

from stiv_deploy.runtime.command.bench.record import BenchReport, share_of


def test_it_is_read_as_it_was_written() -> None:
    assert BenchReport.model_validate_json(a_report().model_dump_json()) == a_report()


@pytest.mark.parametrize("name", ["p0", "p100", "90", "pp90", "p", "pnan", "pinf", "p-5"])
def test_what_is_no_percentile(name: str) -> None:
    with pytest.raises(ValueError, match="percentile|could not convert"):
        share_of(name)
    assert (share_of("p90"), share_of("p99.9")) == (0.9, pytest.approx(0.999))
