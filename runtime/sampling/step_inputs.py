"""The ``step`` graph of an engine: its buffers, its bindings, and the small tables that the host fills."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from stiv_deploy.runtime.backends.base import Buffer, Call
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS, DType
from stiv_deploy.runtime.sampling.denoiser import TIMED, RowModel
from stiv_deploy.runtime.sampling.guidance import GuidanceRow
from stiv_deploy.runtime.sampling.host_tables import HostTables
from stiv_deploy.runtime.sampling.solvers import EULER, Evaluation

BY_SAMPLE = ("frame_mask", "sample_rows", "row_weights", "solver_weights", "dt", "next_timestep", "renorm", "hold")
BY_ROW = ("row_sample", "row_mask")
SKIPPING = ("residual_weights", "skipped")
"""What ``extrapolate`` takes of the host, for each row."""
BY_TICK = ("dt", "next_timestep", "solver_weights", "hold")


class StepInputs:
    """Buffers for ``dims["batch"]`` samples over the rows of ``denoiser``, and what the host says of each.

    ``timed`` are those of the rows that the model itself reads: their times and, of a student, guidance scales;
    ``skipping`` those of models that can skip their blocks, which only such calls read.

    Latents and guided velocities lie in two buffers each, read and written by turns: ``latents[side]`` and
    ``velocities[side]`` are those that the call of ``side`` reads. A sample at rest holds its latents, and takes no
    row's velocity.
    """

    def __init__(self, denoiser: RowModel) -> None:
        self._denoiser = denoiser
        self._shapes = {
            tensor.name: (tensor.sized(denoiser.dims), tensor.dtype) for tensor in denoiser.specs["step"].inputs
        }
        self.noise, self.clean = self._empty("noise"), self._empty("clean")
        self.latents = (self._empty("latents"), self._empty("latents"))
        self.velocities = (self._empty("previous_velocity"), self._empty("previous_velocity"))
        tables = {name: self._shapes[name] for name in (*BY_SAMPLE, *BY_ROW)}
        times: dict[str, tuple[tuple[int, ...], DType]] = {
            name: ((denoiser.dims["model_batch"],), "float32") for name in denoiser.timed
        }
        skipping = {
            each.name: (each.sized(denoiser.dims), each.dtype)
            for each in (denoiser.specs["extrapolate"].inputs if denoiser.skips else ())
            if each.name in SKIPPING
        }
        self._tables = HostTables(denoiser.backend, tables | times | skipping)
        self._values = self._tables.values
        # The few numbers of every tick: a memoryview takes one in a fraction of what numpy does.
        self._numbers: dict[str, Any] = {name: self._values[name].data for name in (*BY_TICK, *times)}
        self._times = tuple((self._numbers[name], TIMED[name]) for name in times)
        self.timed = {name: self._tables.buffers[name] for name in times}
        self.skipping = {name: self._tables.buffers[name] for name in skipping}
        for slot in range(denoiser.dims["batch"]):
            self.rest(slot)

    def _empty(self, name: str) -> Buffer:
        return self._denoiser.backend.empty(*self._shapes[name])

    def both_ways(self, rows: int) -> tuple[Call, Call]:
        """The graph over the first ``rows`` rows, from either side to the other."""
        return self._bind(rows, 0), self._bind(rows, 1)

    def _bind(self, rows: int, side: int) -> Call:
        tables = self._tables.buffers
        return self._denoiser.bind(
            "step",
            **{name: tables[name] for name in BY_SAMPLE},
            **{name: tables[name].first(rows) for name in BY_ROW},
            velocity=self._denoiser.velocity.first(rows),
            noise=self.noise,
            clean=self.clean,
            latents=self.latents[side],
            previous_velocity=self.velocities[side],
            next_latents=self.latents[1 - side],
            guided_velocity=self.velocities[1 - side],
            next_model_input=self._denoiser.model_input.first(rows),
        )

    def rest(self, slot: int) -> None:
        """Leave the latents of ``slot`` as they are from now on."""
        self._set(slot, hold=True, dt=0, solver_weights=EULER, row_weights=0, sample_rows=0, renorm=0)

    def guide(self, slot: int, frame_mask: np.ndarray, guidance: list[GuidanceRow], *, renorm: bool) -> None:
        """Set what stays the same for the sample in ``slot``."""
        weights = _padded([row.weight for row in guidance], 0.0)
        self._set(slot, frame_mask=frame_mask, row_weights=weights, renorm=renorm)

    def _set(self, index: int, **values: object) -> None:
        for name, value in values.items():
            self._values[name][index] = value

    def gather(self, slot: int, rows: list[int]) -> None:
        """The sample in ``slot`` has ``rows``, the conditional one first."""
        self._values["sample_rows"][slot] = _padded(rows, rows[0])

    def given(self, slot: int) -> np.ndarray:
        """Which frames of the sample in ``slot`` are given, bool [T]."""
        return self._values["frame_mask"][slot]

    def see(self, row: int, slot: int, mask: np.ndarray) -> None:
        """``row`` is one of the sample in ``slot``, and gets its frames of ``mask``, bool [T], clean."""
        self._set(row, row_sample=slot, row_mask=mask)

    def move_row(self, target: int, source: int) -> None:
        """What is said of row ``source`` is said of ``target``."""
        self.see(target, self._values["row_sample"][source], self._values["row_mask"][source])

    def schedule(self, slot: int, rows: list[int], evaluation: Evaluation) -> None:
        """Set the next evaluation of the sample in ``slot``, at whose time its ``rows`` are."""
        numbers = self._numbers
        for values, what in self._times:
            for row in rows:
                values[row] = getattr(evaluation, what)
        numbers["dt"][slot] = evaluation.dt
        numbers["next_timestep"][slot] = evaluation.next_timestep
        numbers["solver_weights"][slot, 0], numbers["solver_weights"][slot, 1] = evaluation.weights
        numbers["hold"][slot] = evaluation.hold

    def skip(self, rows: Iterable[int], weights: Sequence[float] | None) -> None:
        """The next evaluation of ``rows`` skips the blocks, with ``weights`` of known residuals by place; or not."""
        for row in rows:
            self._set(row, skipped=weights is not None, residual_weights=weights or 0)

    def flush(self) -> None:
        """Write the tables to the device."""
        self._tables.flush()


def _padded(values: list[Any], padding: object) -> list[Any]:
    """One value for each row that a sample may have."""
    return values + [padding] * (SAMPLE_ROWS - len(values))
