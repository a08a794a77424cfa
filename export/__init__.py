"""From a checkpoint to a bundle: ONNX graphs, their checks, engines, parity."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; see README
