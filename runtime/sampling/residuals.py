"""Buffers of the last two residuals of every row, from which a step that skips the blocks goes on."""

from collections.abc import Sequence

import numpy as np

from stiv_deploy.runtime.backends.base import Backend
from stiv_deploy.runtime.bundle.contract import TensorSpec
from stiv_deploy.runtime.sampling.skipping import KNOWN


class Residuals:
    """For the most rows M, tokens as ``spec`` says of one: those in front of the blocks, and their residuals.

    ``first`` is what ``embed`` leaves, ``fresh`` the residual of the last evaluation, both [M, T', S, D]; ``known`` are
    :data:`KNOWN` such buffers, of which each row's clip says what is where.
    """

    def __init__(self, backend: Backend, spec: TensorSpec, dims: dict[str, int]) -> None:
        self._backend = backend
        self.first, self.fresh, *known = (backend.empty(spec.sized(dims), spec.dtype) for _ in range(2 + KNOWN))
        self.known = tuple(known)

    def keep(self, row: int, place: int) -> None:
        """Put the fresh residual of ``row`` in ``place`` of those that are known."""
        self._backend.copy(self.known[place][row], self.fresh[row])

    def move_row(self, target: int, source: int) -> None:
        """Put what is known of row ``source`` into ``target``."""
        for buffer in self.known:
            self._backend.copy(buffer[target], buffer[source])

    def read(self, rows: Sequence[int], places: Sequence[int]) -> np.ndarray:
        """Bytes uint8 [rows, places, n] of what is known of ``rows`` in ``places``; waits for the device."""
        return np.array([[self._backend.read(self.known[place][row].raw) for place in places] for row in rows])

    def write(self, rows: Sequence[int], known: np.ndarray) -> None:
        """Put back what :meth:`read` gave of as many ``rows``, in ascending places."""
        for row, own in zip(rows, known, strict=True):
            for buffer, one in zip(self.known, own, strict=True):
                self._backend.write(buffer[row].raw, np.ascontiguousarray(one))
