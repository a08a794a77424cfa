"""Entry point of a builder process: a job as JSON on standard input, its result as JSON on standard output.

A crash or an exhausted memory of the builder ends this process only. Run as
``python -m stiv_deploy.export.engines.worker``.
"""

import os
import sys

from stiv_deploy.export.engines.engine_from_onnx import build_engine
from stiv_deploy.export.engines.job import EngineJob, EngineResult
from stiv_deploy.runtime.errors import StivError, one_line


def run(text: str) -> EngineResult:
    """Do the job in ``text``; whatever goes wrong becomes the result's error."""
    try:
        return build_engine(EngineJob.from_json(text))
    except StivError as error:
        return EngineResult(error=str(error))
    except Exception as error:  # the parent turns it into one line; a traceback helps nobody there
        return EngineResult(error=one_line(f"{type(error).__name__}: {error}"))


def main() -> None:
    """Answer on a private copy of standard output, as the libraries may print to the real one."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer.write(run(sys.stdin.read()).to_json())
    answer.flush()


if __name__ == "__main__":
    main()
