"""The ``step`` graph of an engine: its buffers, its bindings, and the small tables that the host fills."""

import numpy as np

from stiv_deploy.runtime.backends.base import Buffer, Call
from stiv_deploy.runtime.bundle.contract import SAMPLE_ROWS
from stiv_deploy.runtime.sampling.denoiser import Denoiser
from stiv_deploy.runtime.sampling.guidance import GuidanceRow
from stiv_deploy.runtime.sampling.host_table import HostTable
from stiv_deploy.runtime.sampling.solvers import EULER, Evaluation

BY_SAMPLE = ("frame_mask", "sample_rows", "row_weights", "solver_weights", "dt", "next_timestep", "renorm", "hold")
BY_ROW = ("row_sample", "row_mask")


class StepInputs:
    """Buffers for ``dims["batch"]`` samples over the rows of ``denoiser``, and what the host says of each.

    Latents and guided velocities lie in two buffers each, read and written by turns: ``latents[side]`` are those that
    the call of ``side`` reads. A sample at rest holds its latents, and takes no row's velocity.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self._denoiser = denoiser
        self._specs = {tensor.name: tensor for tensor in denoiser.specs["step"].inputs}
        self.noise, self.clean = self._empty("noise"), self._empty("clean")
        self.latents = (self._empty("latents"), self._empty("latents"))
        self._velocities = (self._empty("previous_velocity"), self._empty("previous_velocity"))
        self._tables = {name: HostTable(denoiser.backend, self._empty(name)) for name in (*BY_SAMPLE, *BY_ROW)}
        self._timestep = HostTable(denoiser.backend, denoiser.timestep)
        for slot in range(denoiser.dims["batch"]):
            self.rest(slot)

    def _empty(self, name: str) -> Buffer:
        spec = self._specs[name]
        return self._denoiser.backend.empty(spec.sized(self._denoiser.dims), spec.dtype)

    def both_ways(self, rows: int) -> tuple[Call, Call]:
        """The graph over the first ``rows`` rows, from either side to the other."""
        return self._bind(rows, 0), self._bind(rows, 1)

    def _bind(self, rows: int, side: int) -> Call:
        return self._denoiser.bind(
            "step",
            **{name: self._tables[name].buffer for name in BY_SAMPLE},
            **{name: self._tables[name].buffer.first(rows) for name in BY_ROW},
            velocity=self._denoiser.velocity.first(rows),
            noise=self.noise,
            clean=self.clean,
            latents=self.latents[side],
            previous_velocity=self._velocities[side],
            next_latents=self.latents[1 - side],
            guided_velocity=self._velocities[1 - side],
            next_model_input=self._denoiser.model_input.first(rows),
        )

    def _set(self, index: int, **values: object) -> None:
        for name, value in values.items():
            self._tables[name].values[index] = value

    def rest(self, slot: int) -> None:
        """Leave the latents of ``slot`` as they are from now on."""
        self._set(slot, hold=True, dt=0, solver_weights=EULER, row_weights=0, sample_rows=0, renorm=0)

    def guide(self, slot: int, frame_mask: np.ndarray, guidance: list[GuidanceRow], *, renorm: bool) -> None:
        """Set what stays the same for the sample in ``slot``."""
        weights = [row.weight for row in guidance]
        padded = weights + [0.0] * (SAMPLE_ROWS - len(weights))
        self._set(slot, frame_mask=frame_mask, row_weights=padded, renorm=renorm)

    def see(self, row: int, slot: int, mask: np.ndarray) -> None:
        """``row`` is one of the sample in ``slot``, and gets its frames of ``mask``, bool [T], clean."""
        self._set(row, row_sample=slot, row_mask=mask)

    def move_row(self, target: int, source: int) -> None:
        """What is said of row ``source`` is said of ``target``."""
        self.see(target, self._tables["row_sample"].values[source], self._tables["row_mask"].values[source])

    def schedule(self, slot: int, rows: list[int], evaluation: Evaluation) -> None:
        """Set the next evaluation of the sample in ``slot``, whose rows are ``rows``, the conditional one first."""
        self._timestep.values[rows] = evaluation.timestep
        self._set(
            slot,
            sample_rows=rows + rows[:1] * (SAMPLE_ROWS - len(rows)),
            solver_weights=evaluation.weights,
            dt=evaluation.dt,
            next_timestep=evaluation.next_timestep,
            hold=evaluation.hold,
        )

    def flush(self) -> None:
        """Write to the device what has changed."""
        for table in (self._timestep, *self._tables.values()):
            table.flush()
