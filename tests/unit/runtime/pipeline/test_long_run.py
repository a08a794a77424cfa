"""A pipeline that is used for long stays as large as it was after its first calls."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = 60
WARM = 30
"""Two rounds of all kinds: what is kept, and pieces of memory of every size, are there."""
USE = """
import json, os, sys
from pathlib import Path
import numpy as np
from stiv_deploy.runtime import StivPipeline

SIZES = [(4, 32, 32), (8, 32, 32), (8, 16, 48), (4, 64, 16), (6, 24, 40)]
GUIDANCE = [{"guidance_mode": "none"}, {"guidance_scale": 4.0}, {"guidance_mode": "sit", "solver": "heun"}]
BATCHES = [1, 3, 2, 1, 2]
WORDS = "zero one two three four".split()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def opened():
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

def call(pipe, index):
    frames, height, width = SIZES[index % len(SIZES)]
    guidance = GUIDANCE[index % len(GUIDANCE)]
    image = np.zeros((height, width, 3), np.uint8) if index % len(GUIDANCE) else None
    prompts = [f"digit {WORDS[(index + at) % len(WORDS)]} moving up" for at in range(BATCHES[index % len(BATCHES)])]
    size = {"num_frames": frames, "height": height, "width": width, "num_inference_steps": 1}
    output = pipe(prompts, image=image, seed=index, **size, **guidance)
    return output.frames.nbytes + output.latents.nbytes

warm, calls = int(sys.argv[2]), int(sys.argv[3])
with StivPipeline.from_bundle(sys.argv[1], "onnxruntime", threads=1) as pipe:
    for index in range(warm):
        call(pipe, index)
    before, there = resident(), opened()
    given = sum(call(pipe, warm + index) for index in range(calls))
    print(json.dumps({"growth": resident() - before, "given": given, "before": there, "after": opened()}))
"""


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measures the resident set on Linux")
def test_sixty_calls_of_mixed_kinds_leave_nothing_behind(bundle: Path) -> None:
    """Sizes, batches and guidance change from call to call, more sizes than engines are kept.

    A run that kept just what its calls give, the least thing that they make, would grow by the sum of that; buffers and
    weights of a size that was left would be many times more. Malloc is told to give large blocks back at once.
    """
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", USE, str(bundle), str(WARM), str(CALLS)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=300, env={**os.environ, **malloc}
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["growth"] < found["given"]
    assert found["after"] == found["before"]
