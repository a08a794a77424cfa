"""Small inputs that the host decides: kept as an array, and written to the device where they have changed."""

import numpy as np

from stiv_deploy.runtime.backends.base import Backend, Buffer


class HostTable:
    """A host array, all zero at first, and the device buffer that :meth:`flush` makes equal to it."""

    def __init__(self, backend: Backend, buffer: Buffer) -> None:
        self.buffer = buffer
        self.values = np.zeros(buffer.shape, dtype=buffer.dtype)
        self._backend = backend
        self._written: bytes | None = None

    def flush(self) -> None:
        """Write the values, unless the buffer has them."""
        values = self.values.tobytes()  # compared in a fraction of what numpy takes
        if values != self._written:
            self._written = values
            self._backend.write(self.buffer, self.values)
