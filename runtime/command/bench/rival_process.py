"""One contestant in a process of its own.

Its first line of standard input is an order, whose ``module`` has a function ``rival`` that takes the order and gives
one from prompts and seeds to frames uint8 [B, F, H, W, 3]. Every further line asks for clips, and is answered by a line
with the wall and CPU seconds that they took. What goes wrong is a line too, and ends the process.
"""

import json
import sys
import time
from importlib import import_module
from typing import Any, TextIO

import numpy as np


def main(source: TextIO, target: TextIO) -> int:
    """Serve until standard input ends; 1 if something went wrong."""

    def say(**values: object) -> None:
        target.write(json.dumps(values) + "\n")
        target.flush()

    try:
        order: dict[str, Any] = json.loads(source.readline())
        make = import_module(order["module"]).rival(order)
        say(ready=True)
        for line in source:
            asked: dict[str, Any] = json.loads(line)
            began = time.perf_counter()
            frames = make(asked["prompts"], asked["seeds"])
            seconds = time.perf_counter() - began
            if asked["keep"]:
                np.save(asked["keep"], frames)
            say(seconds=seconds, cpu_seconds=time.process_time())
    except Exception as error:  # whatever it is, it is for whoever asked
        say(error=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    speaking, sys.stdout = sys.stdout, sys.stderr  # nothing but answers on standard output, whatever libraries print
    sys.exit(main(sys.stdin, speaking))
