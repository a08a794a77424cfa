"""The reference: STIV in plain PyTorch, trainable, and the oracle that every shipped form is compared with."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; see README
