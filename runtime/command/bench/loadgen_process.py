"""LoadGen in a process of its own: it asks for samples on standard output, a list of numbers a line.

Every line of standard input is a sample that is done, in the order asked.
"""

import json
import os
import sys
from importlib import import_module
from typing import Any, TextIO

MILLI = 1_000
SCENARIOS = {"singlestream": "SingleStream", "offline": "Offline"}


def settings_of(lg: Any, order: dict[str, Any]) -> Any:
    """Settings of LoadGen, ``lg``, for an order (:class:`~stiv_deploy.runtime.command.bench.loadgen.Order`)."""
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, SCENARIOS[order["scenario"]])
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_query_count = order["queries"]
    settings.min_duration_ms = round(MILLI * order["seconds"])
    settings.offline_expected_qps = order["expected"]
    settings.single_stream_expected_latency_ns = round(1e9 / order["expected"])
    return settings


def logs_in(lg: Any, folder: str) -> Any:
    """Logs in ``folder``, nothing on standard output."""
    output = lg.LogOutputSettings()
    output.outdir = folder
    output.copy_summary_to_stdout = False
    logs = lg.LogSettings()
    logs.log_output = output
    logs.enable_trace = False
    return logs


class Asker:
    """Asks for the samples of a query, and tells LoadGen as each is done."""

    def __init__(self, lg: Any, source: TextIO, target: TextIO) -> None:
        self._lg, self._source, self._target = lg, source, target

    def __call__(self, query: list[Any]) -> None:
        """Ask; where nobody answers any more, the process ends, as an exception would end it in C++."""
        self._target.write(json.dumps([sample.index for sample in query]) + "\n")
        self._target.flush()
        for sample in query:
            if not self._source.readline():
                os._exit(1)
            self._lg.QuerySamplesComplete([self._lg.QuerySampleResponse(sample.id, 0, 0)])


def main(order: dict[str, Any], source: TextIO, target: TextIO) -> None:
    """Run LoadGen, and say that it has ended."""
    lg = import_module("mlperf_loadgen")
    sut = lg.ConstructSUT(Asker(lg, source, target), lambda: None)
    qsl = lg.ConstructQSL(order["prompts"], order["prompts"], lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(sut, qsl, settings_of(lg, order), logs_in(lg, order["folder"]))
    lg.DestroyQSL(qsl)
    lg.DestroySUT(sut)
    target.write("end\n")
    target.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.stdin, sys.stdout)
