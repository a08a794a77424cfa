"""Inputs of golden answers: for each tensor of the contract values of the kind that it has in use, drawn from its name.

Export and every machine that verifies draw the same, bit for bit but for the last bit of a sine.
"""

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

from stiv_deploy.runtime.bundle.contract import FRAMES, MASKED, DType, GraphSpec, TensorSpec
from stiv_deploy.runtime.bundle.sketch import integers, normal, seed_of, uniform

SMALLEST = 6
"""Tokens have sizes from 1 down to 2 to minus this, so that what a norm adds to the variance shows."""
GIVEN = 0.3
"""Share of frames that are given, and of samples that hold."""
LEVELS = 256
"""Of a picture of 8 bits, from -1 to 1."""
NUMPY: dict[DType, type[np.generic]] = {"float32": np.float32, "int64": np.int64, "bool": np.bool_}
"""Types of arrays; half precisions are drawn in float32, and rounded by who uses them."""


def golden_inputs(graph: str, spec: GraphSpec, dims: Mapping[str, int], vocabulary: int) -> dict[str, np.ndarray]:
    """Values of every input of ``graph``, in float32, int64 or bool.

    Those of :data:`~stiv_deploy.runtime.bundle.contract.FRAMES` are far from where a level of 8 bits ends: there two
    right implementations may differ by a whole one.
    """
    limits = {
        "token_ids": vocabulary,
        "sample_rows": dims.get("model_batch", 1),
        "row_sample": dims.get("batch", 1),
    }
    return {tensor.name: _drawn(graph, tensor, dict(dims), limits) for tensor in spec.inputs}


def _drawn(graph: str, tensor: TensorSpec, dims: dict[str, int], limits: Mapping[str, int]) -> np.ndarray:
    name, shape = tensor.name, tensor.sized(dims)
    stem = name.removesuffix("_cos").removesuffix("_sin")  # a table's cosine and sine share their angles
    seed = seed_of(graph, stem, *shape)
    rules: dict[str, Callable[[], np.ndarray]] = {
        **{each: _indices(limit, shape, seed) for each, limit in limits.items()},
        "token_mask": lambda: _lengths(shape, seed),
        "text_mask": lambda: np.where(_lengths((shape[0], shape[-1]), seed), 0.0, MASKED).reshape(shape),
        "timestep": lambda: uniform(shape, seed),
        "next_timestep": lambda: uniform(shape, seed),
        "dt": lambda: uniform(shape, seed),
        "guidance": lambda: 1 + 7 * uniform(shape, seed),
        "target_time": lambda: uniform(shape, seed),
        "micro": lambda: integers(512, shape, seed),
        "video": lambda: _near_levels(shape, seed) if graph == FRAMES else 2 * uniform(shape, seed) - 1,
        "spatial": lambda: np.pi * (2 * uniform(shape, seed) - 1),
        "temporal": lambda: np.pi * (2 * uniform(shape, seed) - 1),
        **dict.fromkeys(("frame_mask", "row_mask", "hold"), lambda: uniform(shape, seed) < GIVEN),
        "skipped": lambda: np.arange(*shape) % 2 == 0,
        "renorm": lambda: np.ones(shape),
        "x": lambda: normal(shape, seed) * _amplitudes(shape, seed),
    }
    values = rules.get(stem, lambda: normal(shape, seed))()
    values = np.cos(values) if name.endswith("_cos") else np.sin(values) if name.endswith("_sin") else values
    return values.astype(NUMPY.get(tensor.dtype, np.float32))


def _indices(limit: int, shape: tuple[int, ...], seed: int) -> Callable[[], np.ndarray]:
    return lambda: integers(limit, shape, seed)


def _amplitudes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A size [..., 1] for each token of ``shape`` [..., D], a power of two."""
    rows = (*shape[:-1], 1)
    return 2.0 ** -integers(SMALLEST + 1, (prod(rows),), seed + 1).reshape(rows)


def _near_levels(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Values that are up to 0.4 levels from one of 0 to 255, or from one of 8 beyond either end."""
    levels = integers(LEVELS + 16, shape, seed) - 8 + 0.8 * uniform(shape, seed + 1) - 0.4
    return 2 * levels / (LEVELS - 1) - 1


def _lengths(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Bool [rows, length]: true for the first 1 to ``length`` positions of each row."""
    rows, length = shape
    return np.arange(length) <= integers(length, (rows, 1), seed)
