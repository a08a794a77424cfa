"""Calibration: ranges of the reference model over its real sampling loop, and which layers run in 8 bits."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; see README
