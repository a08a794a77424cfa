"""Does the graph of 8-bit frames cost a CPU more than numpy does? The same decoded video both ways, in turns.

    python benchmarks/frames_on_cpu.py --json benchmarks/results/frames-on-cpu-DATE.json

Each way starts from the decoder's float32 buffer and ends in the clip's array, as in the pipeline: by the graph in ONNX
Runtime, whose result is copied out of its buffer, and by a copy of the float32 buffer that numpy converts. CPU time of
the process, on one thread; of each turn the ratio counts, so that other load changes little.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from stiv_deploy.export.graphs.modules import FramesGraph
from stiv_deploy.export.graphs.onnx_from_module import trace, write_graph
from stiv_deploy.runtime.backends.onnxruntime import session_options
from stiv_deploy.runtime.bundle.contract import FRAMES, ModelFacts, graph_specs
from stiv_deploy.runtime.pipeline.images import frames_from_video

FACTS = ModelFacts(
    name="any",
    blocks=1,
    width=8,
    heads=1,
    patch=(1, 1),
    latent_channels=4,
    text_width=8,
    max_text_tokens=8,
    base_frames=8,
    base_grid=(8, 8),
    rope_theta=100.0,
    temporal=True,
    spatial_factor=8,
    temporal_factor=1,
)


def bound_graph(video: np.ndarray, target: np.ndarray) -> Callable[[], None]:
    """A call that converts ``video`` into ``target`` by the exported graph."""
    import onnxruntime

    spec = graph_specs(FACTS, "float32")[FRAMES]
    with tempfile.TemporaryDirectory() as folder:
        write_graph(trace(FramesGraph(), FRAMES, spec, FACTS), {}, Path(folder), FRAMES)
        session = onnxruntime.InferenceSession(Path(folder) / f"{FRAMES}.onnx", session_options(1))
    binding = session.io_binding()
    binding.bind_input("video", "cpu", 0, np.float32, video.shape, video.ctypes.data)
    binding.bind_output("frames", "cpu", 0, np.uint8, target.shape, target.ctypes.data)
    return lambda: session.run_with_iobinding(binding)


def cpu_seconds(call: Callable[[], None]) -> float:
    """CPU time of this process in ``call``."""
    before = time.process_time()
    call()
    return time.process_time() - before


def measure(frames: int, size: int, turns: int) -> dict[str, Any]:
    """The two ways at one size, in turns."""
    video = np.random.default_rng(0).uniform(-1, 1, (1, frames, 3, size, size)).astype(np.float32)
    target, clip = (np.zeros((1, frames, size, size, 3), np.uint8) for _ in range(2))
    run = bound_graph(video, target)

    def by_graph() -> None:
        run()
        clip[:] = target

    def by_numpy() -> None:
        clip[:] = frames_from_video(video.copy())

    by_graph()
    first = clip.copy()
    by_numpy()
    pairs = [(cpu_seconds(by_graph), cpu_seconds(by_numpy)) for _ in range(turns)]
    return {
        "frames": frames,
        "size": size,
        "bit_equal": bool(np.array_equal(first, clip)),
        "ratio_median": round(statistics.median(graph / numpy for graph, numpy in pairs), 2),
        "ratio_of_best": round(min(graph for graph, _ in pairs) / min(numpy for _, numpy in pairs), 2),
    }


def main(
    turns: Annotated[int, typer.Option(min=1, help="How often each way runs.")] = 21,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the result here.")] = None,
) -> None:
    """Compare the graph's CPU time with numpy's; a ratio below 1 is the graph's win."""
    rows = [measure(frames, size, turns) for frames, size in ((8, 32), (20, 256), (4, 512))]
    for row in rows:
        typer.echo(row)
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": f"python benchmarks/frames_on_cpu.py --turns {turns}",
        "machine": platform.machine(),
        "versions": {tool: version(tool) for tool in ("numpy", "onnxruntime")},
        "rows": rows,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from command import run

    run(main)
